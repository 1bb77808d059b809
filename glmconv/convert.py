"""The main flow: open, plan, refuse or run, finish. What `glmconv convert` and `glmconv plan` do, as functions."""

from __future__ import annotations

import heapq
import os
import resource
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from glmconv.archs import preset_of
from glmconv.checkpoint import Checkpoint, open_checkpoint
from glmconv.codecs.ggml import GgmlEncoder
from glmconv.engine.files import Disk
from glmconv.engine.plan import Plan, by_source, parts_of
from glmconv.engine.preflight import Target, preflight, refuse_source, resolved
from glmconv.engine.queue import JobQueue, ranks_here
from glmconv.engine.run import Outcome
from glmconv.engine.run import run as run_plans
from glmconv.errors import CapacityError, SourceError, UsageError, printable
from glmconv.formats import FORMATS
from glmconv.formats.binding import refuse
from glmconv.formats.coded import CodedRows
from glmconv.formats.format import LayoutOptions, row_size
from glmconv.formats.gguf_imatrix import Importance, open_importance
from glmconv.formats.gguf_layout import GgufPlan, name_of
from glmconv.formats.gguf_metadata import ARCHITECTURES
from glmconv.formats.gguf_options import GgufOptions, recorded_importance
from glmconv.formats.selection import QuantOptions
from glmconv.targets import GGUF, PLAIN, TargetSpec, parse_target, parse_targets

CHUNK = 4 << 20
SMALLEST_CHUNK = 1 << 20
MIB = 1 << 20
# options that only a GGUF target understands
GGUF_ALONE = ("imatrix", *(field.name for field in fields(GgufOptions) if field.name != "importance"))
SPELLED = {"tensor_types": "--tensor-type", "mtp_only": "--mtp only"}
COMPILED = 128 << 20  # numba and its compiled loops, seen at 105 MB


@dataclass(frozen=True)
class Options:
    """What a conversion may be told. `file_size` in bytes; `max_memory` in bytes of resident memory; `mtp` False drops the MTP layers.

    `megatron_dialect` is the trainer whose names and row orders a torch_dist target is written in, `source_dialect` the one of the source, where its
    tensors do not tell; `mtp_from` is a checkpoint to take the MTP layers from, `mmproj` the file of a GGUF source's vision tower, `lora` an
    adapter to merge. `strict` False leaves out tensors that are missing or unknown, and names each: an hf target is then no whole model.

    For quantized targets: `keep` are regular expressions of tensors to leave as they are, `first_layers_bf16` and `last_layers_bf16` whole
    layers; `ragged` "quantize" encodes even what no serving engine loads; `serve_tp`, `serve_ep` are the ranks it is to be served on;
    `nonfinite` "keep" encodes NaN and Inf too instead of refusing them.

    For GGUF targets: `imatrix` is an importance file; all others, and `tensor_types` ("REGEX=TYPE"), as in `formats.gguf_options`.
    """

    workers: int | None = None
    max_memory: int | None = None
    file_size: int | None = None
    chunk_size: int = 64 << 20
    iteration: int | None = None
    mtp: bool = True
    origin: str | None = None
    megatron_dialect: str = "auto"
    source_dialect: str = "auto"
    mtp_from: str | None = None
    mmproj: str | None = None
    lora: str | None = None
    strict: bool = True
    resume: bool = True
    resume_check: str = "full"
    overwrite: bool = False
    keep: tuple[str, ...] = ()
    first_layers_bf16: int = 0
    last_layers_bf16: int = 0
    ragged: str = "keep"
    serve_tp: int = 1
    serve_ep: int = 1
    nonfinite: str = "error"
    imatrix: str | Path | None = None
    tensor_types: tuple[str, ...] = ()
    token_embedding_type: str = ""
    output_tensor_type: str = ""
    pure: bool = False
    split_max_size: int | None = None
    split_max_tensors: int | None = None
    mtp_only: bool = False
    embed_source: bool = False
    quantize_from: str = "bf16"

    @property
    def quant(self) -> QuantOptions:
        return QuantOptions(
            tuple(self.keep), self.first_layers_bf16, self.last_layers_bf16, self.ragged == "quantize", self.serve_tp, self.serve_ep,
            self.nonfinite == "error",
        )  # fmt: skip

    def gguf(self, importance: Importance | None) -> GgufOptions:
        """UsageError for values that do not go together."""
        return GgufOptions(
            importance, tuple(self.tensor_types), self.token_embedding_type, self.output_tensor_type, self.pure, self.split_max_size,
            self.split_max_tensors, self.mtp_only, self.embed_source, self.quantize_from,
        )  # fmt: skip

    def layout(self, target: TargetSpec, importance: Importance | None = None) -> LayoutOptions:
        name = target.path.name if target.path else f"{target.to.replace(':', '-')}.gguf"
        return LayoutOptions(
            self.file_size, self.chunk_size, self.iteration, self.mtp, self.megatron_dialect, file_type=target.file_type, name=name,
            gguf=self.gguf(importance), codec=target.codec, quant=self.quant,
        )  # fmt: skip

    def open(self, src: str | Path) -> Checkpoint:
        source = open_checkpoint(
            src, mtp=self.mtp, origin=self.origin, dialect=self.source_dialect, mtp_from=self.mtp_from, mmproj=self.mmproj, lora=self.lora,
            strict=self.strict,
        )  # fmt: skip
        if source.opened.wrong or not source.tensors:
            source.close()
            refuse(source.path, (), (), source.opened.wrong, source.arch)
            raise SourceError(f"holds no tensor of {source.arch.spec.model_type}.", file=source.path)
        return source


def options_of(chosen: Mapping[str, object]) -> Options:
    """Options from the command line's names and values."""
    known = {name: value for name, value in chosen.items() if name in Options.__dataclass_fields__}
    turned = {"mtp": chosen.get("mtp") != "drop", "mtp_only": chosen.get("mtp") == "only", "strict": not chosen.get("not_strict")}
    return Options(**{**known, **turned})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Resources:
    """Threads and buffers of a run; `peak` is the resident memory that it should not exceed, in bytes."""

    workers: int
    chunk: int
    peak: int


def resources(options: Options, source: Checkpoint, plans: Sequence[Plan]) -> Resources:
    """Workers and buffer size that `max_memory` allows: two buffers a worker, and what codecs hold, beside what the process holds.

    CapacityError if not even one worker fits.
    """
    codecs, held = codec_memory(source, plans)
    workers = options.workers or max(1, min(8, (os.cpu_count() or 1) // ranks_here()))
    base = resident() + codecs + (64 << 20)  # what reading headers, journals and marks takes at most, seen with 44,691 tensors
    chunk = CHUNK
    limit = options.max_memory
    if limit is not None:
        while workers > 1 and base + workers * (2 * chunk + held) > limit:
            workers -= 1
        while chunk > SMALLEST_CHUNK and base + 2 * chunk + held > limit:
            chunk //= 2
        if base + 2 * chunk + held > limit:
            raise CapacityError(
                f"--max-memory {limit / MIB:,.1f} MiB is less than one worker needs here: {(base + 2 * chunk + held) / MIB:,.1f} MiB.",
                hint="Allow more memory.",
            )
    return Resources(workers, chunk, base + workers * (2 * chunk + held))


def codec_memory(source: Checkpoint, plans: Sequence[Plan]) -> tuple[int, int]:
    """(bytes of a process, bytes of a worker) that encoding and decoding add: compiled loops, and the parts of one tensor that are held."""
    held: dict[int, int] = {}
    for piece in (piece for made in plans for file in made.files for piece in file.pieces if piece.encoder):
        if isinstance(piece.encoder, GgmlEncoder):
            held[id(piece.encoder)] = piece.encoder.held
        elif piece.encoder and (piece.part or not piece.encoder.row_bytes):
            held[id(piece.encoder)] = held.get(id(piece.encoder), 0) + piece.payload
    coded = [reader for reader in source.opened.tensors.values() if isinstance(reader, CodedRows)]
    read = max((sum(row_size(part.shape, part.dtype) * (part.shape or (1,))[0] for part in reader.parts.values()) for reader in coded), default=0)
    return (COMPILED if held or coded else 0), max(held.values(), default=0) + read


def resident() -> int:
    """The process's resident memory now, in bytes."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan_targets(source: Checkpoint, targets: Sequence[TargetSpec], options: Options, *, importance: Importance | None = None) -> list[Plan]:
    """One plan a target: every file of the output, before one weight is read. `importance` is the file `options.imatrix`, if it is open already."""
    refuse_misplaced(options, {target.format for target in targets})
    refuse_incomplete(options, targets)
    if options.imatrix is not None and importance is None:
        importance = open_importance(Path(options.imatrix))
    refuse_towerless(source, targets)
    return [FORMATS[target.format].plan(source.opened, options.layout(target, importance)) for target in targets]


def refuse_misplaced(options: Options, formats: Collection[str]) -> None:
    """UsageError for an option that none of the targets' formats understands."""
    if options.iteration is not None and "torch_dist" not in formats:
        raise UsageError("--iteration is a torch_dist checkpoint's; no target is one.")
    if options.megatron_dialect != "auto" and "torch_dist" not in formats:
        raise UsageError("--megatron-dialect is a torch_dist target's; no target is one.", hint="A source's is --source-dialect.")
    for name in GGUF_ALONE:
        given = getattr(options, name)
        if given and given != Options.__dataclass_fields__[name].default and GGUF not in formats:
            raise UsageError(f"{SPELLED.get(name, '--' + name.replace('_', '-'))} is a GGUF target's; no target is one.")
    if options.file_size is not None and set(formats) == {GGUF}:
        raise UsageError("--shard-size means nothing for a GGUF target.", hint="Several files: --split-max-size.")
    if options.mtp_only and (set(formats) != {GGUF} or not options.mtp):
        raise UsageError("--mtp only is a GGUF target's, and each other target would get all layers.", hint="Convert in two commands.")


def refuse_incomplete(options: Options, targets: Sequence[TargetSpec]) -> None:
    """UsageError for targets that cannot be incomplete: fused and stacked tensors have no place for a part that is not there."""
    other = next((target.to for target in targets if target.to != PLAIN), None)
    if not options.strict and other is not None:
        raise UsageError(f"--not-strict is an hf target's; {other} holds whole models only.", hint="Write an hf folder, or complete the source.")


def refuse_towerless(source: Checkpoint, targets: Sequence[TargetSpec]) -> None:
    """SourceError for a target that is not complete without what the source keeps in a file that was not given."""
    apart = source.opened.apart
    if apart and any(target.format != source.format for target in targets):
        raise SourceError(
            f"is missing (and {len(apart) - 1:,} more): this is the language model alone, its vision tower lies in an mmproj file.",
            file=source.path, tensor=apart[0], hint="Name that file with --mmproj.",
        )  # fmt: skip


def plan_again(source: Checkpoint, to: str, chosen: Mapping[str, object], *, imatrix: str | Path | None = None) -> Plan:
    """The plan of an earlier conversion, by its target and options as its manifest has them.

    imatrix: the importance file that it was made with, under whatever name. SourceError if options are none of ours, UsageError without that file.
    """
    named: dict[str, object] = {"ragged": "quantize" if chosen.get("ragged") else "keep", "imatrix": imatrix}
    named |= {name: tuple(str(text) for text in _list(chosen.get(name))) for name in ("keep", "tensor_types")}
    known = {name: value for name, value in chosen.items() if name in Options.__dataclass_fields__}
    importance = importance_again(chosen, imatrix)
    try:
        path = Path(str(chosen["name"])) if "name" in chosen else None  # of an output that is a file
        options = Options(**{**known, **named})  # type: ignore[arg-type]
        return plan_targets(source, [parse_target(to, path)], options, importance=importance)[0]
    except (TypeError, UsageError) as error:
        raise SourceError("has a manifest of a target or with options that this version of glmconv does not know.", file=to) from error


def importance_again(chosen: Mapping[str, object], path: str | Path | None) -> Importance | None:
    """The importance file of an earlier conversion, called what it was called then. UsageError if it is not given, or another one is."""
    recorded = recorded_importance(chosen)
    if recorded is None:
        if path is not None:
            raise UsageError("--imatrix: this output was made without one.")
        return None
    name, digest = recorded
    if path is None:
        raise UsageError(f"this output was made with importance: {printable(name)} (sha256 {printable(digest)}).", hint="Pass --imatrix FILE.")
    found = open_importance(Path(path))
    if found.digest != digest:
        raise UsageError(f"--imatrix {path} is not the file that this output was made with: that has the sha256 {printable(digest)}.")
    return replace(found, name=name)


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else []


@dataclass(frozen=True)
class Summary:
    """What a conversion would do: `plan --json` prints it."""

    targets: list[dict[str, object]]
    bytes_read: int
    bytes_written: int
    peak_memory: int
    disk_needed: int
    jobs: int
    ranks: list[dict[str, int]]
    notes: list[str]


def plan(src: str | Path, to: Sequence[str], dst: str | Path | None = None, *, options: Options | None = None, ranks: int = 1) -> Summary:
    """Plan a conversion without writing anything. Raises as `convert` does for a source that is not in order."""
    options = options or Options()
    targets = parse_targets(to, None if dst is None else Path(dst), need_path=False)
    with options.open(src) as source:
        targets = named(targets, source)
        plans = plan_targets(source, targets, options)
        needed = sum(p.size for p in plans)
        if all(target.path for target in targets):
            made = _engine_targets(targets, plans)
            refuse_sources(source, made)
            needed = preflight(made, source_root=source.path, disk=Disk(), resume=options.resume, overwrite=options.overwrite)
        return Summary(
            targets=[_described(target, p) for target, p in zip(targets, plans, strict=True)],
            bytes_read=bytes_read(source, plans),
            bytes_written=sum(p.size for p in plans),
            peak_memory=resources(options, source, plans).peak,
            disk_needed=needed,
            jobs=sum(len(parts_of(p.files)) for p in plans),
            ranks=balance(source, plans, ranks),
            notes=list(dict.fromkeys(note for p in plans for note in p.notes)),
        )


def named(targets: Sequence[TargetSpec], source: Checkpoint) -> list[TargetSpec]:
    """The targets with their files' names filled in. UsageError if two are one then."""
    preset = preset_of(source.config)
    values = {"preset": preset.name if preset else name_of(source.opened), "arch": ARCHITECTURES[source.arch.spec.model_type]}
    found = [target.named(values) for target in targets]
    paths = [target.path for target in found if target.path is not None]
    if len(set(paths)) < len(paths):
        raise UsageError(f"two targets are {next(path for path in paths if paths.count(path) > 1)}.", hint="Write {type} into the name.")
    return found


def _described(target: TargetSpec, plan: Plan) -> dict[str, object]:
    count = sum(1 for file in plan.files for piece in file.pieces if piece.digested)
    said: dict[str, object] = {
        "to": target.to, "path": str(target.path) if target.path else None, "files": len(plan.files) + len(plan.marks), "bytes": plan.size,
        "tensors": count, "tensor_count": count, "plan_id": plan.id,
    }  # fmt: skip
    if isinstance(plan, GgufPlan):
        said["bits_per_weight"] = plan.bits_per_weight
        said["tensors"] = [
            {"name": t.tensor.name, "type": t.kind.name, "shape": list(t.tensor.ne[::-1]), "bytes": t.size, "why": t.why} for t in plan.tensors
        ]
    return said


def bytes_read(source: Checkpoint, plans: Sequence[Plan]) -> int:
    """Bytes that leave the source's disk: what several targets share is read once, then comes from the page cache."""
    most = 0
    for made in plans:
        pieces = [piece for file in made.files for piece in file.pieces if piece.runs]
        most = max(most, sum(run.rows * source.row_size(run.tensor) * (1 + len(piece.equals)) for piece in pieces for run in piece.runs))
    return most


def balance(source: Checkpoint, plans: Sequence[Plan], ranks: int) -> list[dict[str, int]]:
    """Jobs and bytes of each rank, if all are equally fast: each takes the next job of the queue when it has finished its last."""
    parts = [parts_of(made.files) for made in plans]
    sizes = [every[number].size for every in parts for number in by_source(every, source)]
    heap = [(0, rank, 0) for rank in range(ranks)]
    for size in sizes:
        done, rank, jobs = heapq.heappop(heap)
        heapq.heappush(heap, (done + size, rank, jobs + 1))
    return [{"rank": rank, "jobs": jobs, "bytes": done} for done, rank, jobs in sorted(heap, key=lambda entry: entry[1])]


@dataclass(frozen=True)
class Converted:
    """What a conversion made: for each of `targets` an outcome."""

    targets: list[TargetSpec]
    outcomes: list[Outcome]
    source: Mapping[str, object]
    tensors: int
    dropped: int
    notes: list[str]
    workers: int


def convert(
    src: str | Path,
    targets: Mapping[str, str | Path] | Sequence[TargetSpec],
    *,
    options: Options | None = None,
    progress: Callable[[int], None] | None = None,
    started: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    queue: JobQueue | None = None,
    log: Callable[[str], None] | None = None,
) -> Converted:
    """Convert `src` into every target (`{"torch_dist": DIR}`), the source read once; the same call again resumes.

    `started` is told the bytes to be written, then `progress` each number of bytes done; `stop`, once set, ends the run within a chunk.
    Raises one of `glmconv.errors`; a finished output is never left half changed.
    """
    options = options or Options()
    specs = [parse_target(to, Path(path)) for to, path in targets.items()] if isinstance(targets, Mapping) else list(targets)
    if not specs or any(spec.path is None for spec in specs):
        raise UsageError("every target needs a folder.")
    with options.open(src) as source:
        specs = named(specs, source)
        plans = plan_targets(source, specs, options)
        made = _engine_targets(specs, plans)
        refuse_sources(source, made)
        has = resources(options, source, plans)
        if started:
            started(sum(p.size for p in plans))
        outcomes = run_plans(
            made, source, workers=has.workers, chunk_size=has.chunk, queue=queue, resume=options.resume, resume_check=options.resume_check,
            overwrite=options.overwrite, stop=stop, progress=progress, source_root=source.path, log=log,
        )  # fmt: skip
        facts = {"path": str(source.path), "format": source.format, "model_type": source.arch.spec.model_type}
        notes = [*dict.fromkeys(note for p in plans for note in p.notes), *_nonfinite(outcomes)]
        return Converted(specs, outcomes, facts, len(source), len(source.opened.dropped), notes, has.workers)


def refuse_sources(source: Checkpoint, targets: Sequence[Target]) -> None:
    """DestinationError for a target in or around any folder that is read: the checkpoint as a whole, its iteration, its origin."""
    roots = dict.fromkeys([FORMATS[source.format].manifest_at(source.path), *source.opened.roots])
    for target in map(resolved, targets):
        for root in roots:
            refuse_source(target.root, root, Disk())


def _nonfinite(outcomes: Sequence[Outcome]) -> list[str]:
    """The warning about NaN or Inf that was passed on, if there was any in what this process wrote."""
    found = {tensor: row for outcome in outcomes for tensor, row in outcome.nonfinite.items()}
    if not found:
        return []
    first = min(found)
    return [f"{len(found):,} tensors hold NaN or Inf, which was passed on as it is; {first} does in row {found[first]:,}"]


def _engine_targets(specs: Sequence[TargetSpec], plans: Sequence[Plan]) -> list[Target]:
    return [Target(made, spec.root.absolute()) for spec, made in zip(specs, plans, strict=True) if spec.root is not None]
