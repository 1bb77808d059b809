"""Plans a GGUF file: header, then each tensor's bytes in llama-quantize's order, encoded as its mix says, padded to the alignment."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from glmconv.archs import Model, preset_of
from glmconv.codecs.ggml import TYPES, GgmlEncoder, GgmlType, row_size
from glmconv.dtypes import BY_NAME
from glmconv.engine.journal import BESIDE
from glmconv.engine.plan import OutputFile, Piece, Plan, Run
from glmconv.errors import UnsupportedError
from glmconv.formats.format import LayoutOptions, Opened, RowReader
from glmconv.formats.gguf_header import padded, write_header
from glmconv.formats.gguf_metadata import ARCHITECTURES, metadata, quantized
from glmconv.formats.gguf_mix import Choice, Facts, Tensor, choose, mix_named
from glmconv.formats.gguf_rows import AS_STORED, DECAY, FLOAT32, turned
from glmconv.formats.gguf_stored import GgufRows, StoredBlocks, stored_as
from glmconv.formats.gguf_tensors import GGUFTensor, Transform, gguf_tensors
from glmconv.formats.gguf_types import Entry

APPENDED = ("general.quantization_version", "general.file_type")
COMMIT = re.compile(r"[0-9a-f]{40}")
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "README.md")


def plan(opened: Opened, options: LayoutOptions) -> Plan:
    """One file, beside the folder of its own. UnsupportedError for what no encoder makes."""
    mix = mix_named(options.file_type)
    tensors = gguf_tensors(opened.model, opened.tensors)
    given = [Tensor(tensor.name, tensor.ne, tensor.dtype) for tensor in tensors]
    choices = choose(mix.name, given, facts_of(opened.model))
    described = [(tensor.name, TYPES[choice.type], tensor.ne) for tensor, choice in zip(tensors, choices, strict=True)]
    refuse_unaided(tensors, choices, mix.name)
    kv = entries(opened) + quantized(mix.name)
    pieces: list[Piece] = []
    for tensor, (_, kind, _) in zip(tensors, described, strict=True):
        pieces += stored(tensor, kind, opened.tensors)
    file = OutputFile(BESIDE + options.name, write_header(kv, described), tuple(pieces))
    chosen: dict[str, object] = {"mtp": options.mtp, "name": options.name}
    return Plan(f"gguf:{mix.name}", chosen, opened.fingerprint, (file,), (), (*opened.notes, *notes(opened, described, choices)))


def name_of(opened: Opened) -> str:
    """What the model's own name is guessed from: its folder's, or the release's where the folder is one of the Hub's cache, named after a commit."""
    preset = preset_of(opened.config)
    return preset.hub.rpartition("/")[2] if preset and COMMIT.fullmatch(opened.path.name) else opened.path.name


def entries(opened: Opened) -> list[Entry]:
    """The keys before those that a quantizer appends: of a GGUF source its own, but for the architecture's if MTP layers were dropped or added."""
    kept = [entry for entry in opened.entries if entry.key not in APPENDED]
    if kept and not opened.dropped and "mtp_from" not in opened.fingerprint:
        return kept
    made = metadata(opened.model, opened.config, side_bytes(opened), name_of(opened))
    own = f"{ARCHITECTURES[opened.model.spec.model_type]}."
    at = next((n for n, entry in enumerate(kept) if entry.key.startswith(own)), 0)
    others = [entry for entry in kept[at:] if not entry.key.startswith(own)]
    return [*kept[:at], *(entry for entry in made if entry.key.startswith(own)), *others] if kept else made


def facts_of(model: Model) -> Facts:
    s, nextn = model.sizes, len(model.layers.get("mtp", ()))
    latent = 0 if 0 in model.layers.get("linear", ()) else 1  # of the first layer
    kv_heads = latent if "kv_rank" in s else s["groups"]
    return Facts(ARCHITECTURES[model.spec.model_type], s["layers"] + nextn, nextn, s.get("experts", 0), s["heads"], kv_heads)


def refuse_unaided(tensors: Sequence[GGUFTensor], choices: Sequence[Choice], file_type: str) -> None:
    for tensor, choice in zip(tensors, choices, strict=True):
        if choice.needs_imatrix:
            raise UnsupportedError(
                f"{tensor.name} would be {choice.type}, which needs an importance matrix; gguf:{file_type} is not written without one.",
                hint="Take Q2_K, a larger k-quant or IQ4_XS.",
            )


def side_bytes(opened: Opened) -> dict[str, bytes]:
    """The files beside the weights that metadata are made of."""
    found = {}
    for name in TOKENIZER:
        if name in opened.side_files:
            content = bytearray(opened.side_files[name].shape[0])
            opened.side_files[name].read_into(0, memoryview(content))
            found[name] = bytes(content)
    return found


def stored(tensor: GGUFTensor, kind: GgmlType, readers: Mapping[str, RowReader]) -> Iterator[Piece]:
    """The tensor's piece and its padding. What a GGUF source stores in this type passes byte for byte."""
    columns, rows = tensor.ne[0], math.prod(tensor.ne[1:])
    wide = any(isinstance(readers[run.tensor], GgufRows) for run in tensor.runs)
    source = BY_NAME["float32"] if wide or tensor.transform is Transform.NEGATIVE_EXPONENTIAL else readers[tensor.runs[0].tensor].dtype
    runs = tuple(engine_run(tensor, run.tensor, run.first, run.rows, readers, FLOAT32 if wide else "") for run in tensor.runs)
    if len(tensor.ne) == 1:
        columns, rows = 1, tensor.ne[0]
    size = rows * row_size(kind, columns)
    dtype = FLOATS.get(kind.name, "uint8")
    shape = tensor.ne[::-1] if kind.name in FLOATS else (rows, row_size(kind, columns))
    same = dtype == source.name
    if already := stored_already(tensor, kind, readers):
        runs, same = (Run(f"{AS_STORED}{tensor.name}:{tensor.runs[0].tensor}", 0, already.shape[0]),), True
    encoder = None if same else GgmlEncoder(kind, (rows, columns), source, strict=kind.name not in FLOATS)
    yield Piece(tensor.name, dtype, shape, size, runs, encoder=encoder)
    if gap := padded(size) - size:
        yield Piece(f"padding of {tensor.name}", "uint8", (gap,), gap, literal=bytes(gap), digested=False)


def stored_already(tensor: GGUFTensor, kind: GgmlType, readers: Mapping[str, RowReader]) -> StoredBlocks | None:
    """The tensor of a GGUF source that is of this type already."""
    found = stored_as([readers[run.tensor] for run in tensor.runs], tensor.name)
    return StoredBlocks(found) if found and found.tensor.type == kind else None


def engine_run(tensor: GGUFTensor, name: str, first: int, rows: int, readers: Mapping[str, RowReader], prefix: str) -> Run:
    """Rows as the engine asks for them: of a matrix that is transposed its columns."""
    if tensor.transform is Transform.TRANSPOSED:
        return Run(turned(prefix + name, first, rows), 0, readers[name].shape[1])
    return Run((DECAY if tensor.transform is Transform.NEGATIVE_EXPONENTIAL else prefix) + name, first, rows)


def notes(opened: Opened, described: Sequence[tuple[str, GgmlType, Sequence[int]]], choices: Sequence[Choice]) -> Iterator[str]:
    """Bits per weight and types; what fell back; what a language model's file leaves out."""
    bits = 8 * sum(math.prod(ne) // kind.block * kind.size for _, kind, ne in described)
    counts = Counter(kind.name for _, kind, _ in described)
    weights = sum(math.prod(ne) for _, _, ne in described)
    yield f"{bits / weights:.2f} bits per weight: " + ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    fallen = Counter(choice.why for choice in choices if choice.why.startswith(("fallback", "no importance")))
    for why, count in fallen.items():
        yield f"{count:,} of the tensors: {why}"
    tower = sum("visual." in name for name in opened.tensors)
    if tower:
        yield f"the {tower:,} tensors of the vision tower are not part of a language model's GGUF; mmproj files are not written yet"
