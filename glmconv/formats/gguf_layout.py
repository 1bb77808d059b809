"""Plans a GGUF target: header, then each tensor's bytes in llama-quantize's order, encoded as its mix says, padded; in one file or in several."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from glmconv.archs import Model, preset_of
from glmconv.codecs.ggml import TYPES, WEIGHTED, GgmlType
from glmconv.engine.journal import BESIDE
from glmconv.engine.plan import OutputFile, Plan, in_sections
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.format import LayoutOptions, Opened, RowReader, content_of
from glmconv.formats.gguf_embed import embedded_source
from glmconv.formats.gguf_header import data_size, padded, write_header
from glmconv.formats.gguf_imatrix import Importance
from glmconv.formats.gguf_metadata import ARCHITECTURES, SOURCE, metadata, quantized
from glmconv.formats.gguf_mix import Facts, Tensor, choose, mix_named
from glmconv.formats.gguf_options import GgufOptions
from glmconv.formats.gguf_originals import originals
from glmconv.formats.gguf_pieces import SECTION, stored
from glmconv.formats.gguf_split import groups, split_entries, split_name
from glmconv.formats.gguf_tensors import GGUFTensor, gguf_tensors, layer_of
from glmconv.formats.gguf_types import Entry

APPENDED = ("general.quantization_version", "general.file_type")
IMATRIX = "quantize.imatrix."
COMMIT = re.compile(r"[0-9a-f]{40}")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "README.md")
SHARED = ("token_embd.weight", "output_norm.weight", "output.weight")  # what a file of the MTP layers alone has beside them


@dataclass(frozen=True)
class Planned:
    """A tensor of the file, the type that it is stored in, and why that one."""

    tensor: GGUFTensor
    kind: GgmlType
    why: str
    needs_imatrix: bool = False

    @property
    def size(self) -> int:
        return data_size(self.kind, self.tensor.ne)

    @property
    def described(self) -> tuple[str, GgmlType, tuple[int, ...]]:
        return self.tensor.name, self.kind, self.tensor.ne


@dataclass(frozen=True)
class GgufPlan(Plan):
    """A plan that can say of each tensor what it becomes."""

    tensors: tuple[Planned, ...] = field(default=(), compare=False)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(planned.size for planned in self.tensors) / sum(math.prod(planned.tensor.ne) for planned in self.tensors)


def plan(opened: Opened, options: LayoutOptions) -> GgufPlan:
    """The files, beside the folder of their own. UnsupportedError for what no encoder makes, UsageError for options that mean nothing."""
    told, mix = options.gguf, mix_named(options.file_type)
    planned = types(opened, told, mix.name)
    refuse_unaided(planned, mix.name, told.importance)
    refuse_zeros(planned, told.importance)
    kv = entries(opened, told) + quantized(mix.name, told.importance.origin(told.importance.name) if told.importance else None)
    kv += originals(opened) if told.embed_source else []
    embedded, left = embedded_source(opened, kv, len(planned)) if told.embed_source else ([], [])
    files = output_files(planned, kv + embedded, opened.tensors, options)
    chosen: dict[str, object] = {"mtp": options.mtp, "name": options.name, **told.document}
    said = (*opened.notes, *notes(opened, planned, told), *left)
    return GgufPlan(f"gguf:{mix.name}", chosen, opened.fingerprint, files, (), said, tuple(planned))


def types(opened: Opened, told: GgufOptions, file_type: str) -> list[Planned]:
    """Every tensor of the target with its type."""
    tensors = gguf_tensors(opened.model, opened.tensors)
    if told.mtp_only:
        tensors = mtp_alone(tensors, opened.model)
    choices = choose(
        file_type,
        [Tensor(tensor.name, tensor.ne, tensor.dtype) for tensor in tensors],
        facts_of(opened.model),
        imatrix=told.importance is not None,
        entries=told.importance.entries if told.importance else (),
        overrides=told.overrides,
        token_embedding_type=told.token_embedding_type,
        output_tensor_type=told.output_tensor_type,
        pure=told.pure,
    )
    return [Planned(tensor, TYPES[choice.type], choice.why, choice.needs_imatrix) for tensor, choice in zip(tensors, choices, strict=True)]


def mtp_alone(tensors: Sequence[GGUFTensor], model: Model) -> list[GGUFTensor]:
    """The MTP layers, and what of the model they are run with. SourceError if there are none."""
    layers = set(model.layers.get("mtp", ()))
    if not layers:
        raise SourceError("has no MTP layer, so --mtp only leaves nothing.", hint="--mtp-from takes it from another checkpoint.")
    return [tensor for tensor in tensors if tensor.name in SHARED or layer_of(tensor.name) in layers]


def name_of(opened: Opened) -> str:
    """What the model's own name is guessed from: its folder's, or the release's where the folder is one of the Hub's cache, named after a commit."""
    preset = preset_of(opened.config)
    return preset.hub.rpartition("/")[2] if preset and COMMIT.fullmatch(opened.path.name) else opened.path.name


def entries(opened: Opened, told: GgufOptions) -> list[Entry]:
    """The keys before those that a quantizer appends: of a GGUF source its own, but for the architecture's if MTP layers were dropped or added."""
    again = (*APPENDED, *((IMATRIX,) if told.importance else ()), *((SOURCE,) if told.embed_source else ()))
    kept = [entry for entry in opened.entries if not entry.key.startswith(again)]
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


def refuse_unaided(planned: Sequence[Planned], file_type: str, importance: Importance | None) -> None:
    """UnsupportedError for a tensor of a type that is not made without importance data, and of which there are none."""
    for each in planned:
        name = each.tensor.name
        if each.needs_imatrix and importance is None:
            raise UnsupportedError(
                f"{name} would be {each.kind}, which needs an importance matrix; gguf:{file_type} is not written without one.",
                hint="Pass --imatrix FILE, or take Q2_K, a larger k-quant or IQ4_XS.",
            )
        if each.needs_imatrix and importance is not None and name not in importance.entries:
            raise UnsupportedError(
                f"{name} would be {each.kind}, which needs importance data, and {importance.name} has none for it.",
                hint=f"Give it another type: --tensor-type '{re.escape(name)}=q4_k'.",
            )


def side_bytes(opened: Opened, names: Sequence[str] = TOKENIZER) -> dict[str, bytes]:
    """The files beside the weights that metadata are made of."""
    return {name: content_of(opened.side_files[name]) for name in names if name in opened.side_files}


def refuse_zeros(planned: Sequence[Planned], importance: Importance | None) -> None:
    """SourceError for a matrix whose importance is 0 throughout: it would be quantized to zeros, and llama.cpp would not say so."""
    for each in planned:
        if importance is None or each.kind.name not in WEIGHTED:
            continue
        slices = math.prod(each.tensor.ne[2:])
        found = importance.of(each.tensor.name, slices, each.tensor.ne[0])
        lost = [] if found is None else [number for number, values in enumerate(found.read()) if not values.any()]
        if lost:
            which = f"matrix {lost[0]} of {slices}" if slices > 1 else "it"
            raise SourceError(
                f"has nothing but zeros in {importance.name} for {which}, which would be quantized to zeros.", tensor=each.tensor.name,
                hint="Make the file again with a llama-imatrix that marks experts without data, or leave --imatrix out.",
            )  # fmt: skip


def output_files(planned: Sequence[Planned], kv: Sequence[Entry], readers: Mapping[str, RowReader], options: LayoutOptions) -> tuple[OutputFile, ...]:
    """One file with all, or as many as the options ask for: the first has all keys, and each says which it is."""
    told = options.gguf
    split = told.split_max_size is not None or told.split_max_tensors is not None
    parts = groups([each.size for each in planned], told) if split else [range(len(planned))]
    files = []
    for number, part in enumerate(parts):
        keys = [*(kv if number == 0 else ()), *(split_entries(number, len(parts), len(planned)) if split else ())]
        inside = [planned[at] for at in part]
        name = split_name(options.name, number, len(parts)) if split else options.name
        header = write_header(keys, [each.described for each in inside])
        pieces = [piece for each in inside for piece in stored(each.tensor, each.kind, readers, told)]
        files.append(in_sections(BESIDE + name, header, pieces, SECTION, last=split and number == 0))
    return tuple(files)


def notes(opened: Opened, planned: Sequence[Planned], told: GgufOptions) -> Iterator[str]:
    """Bits per weight and types; what fell back; what has no importance; what the file leaves out."""
    counts = Counter(each.kind.name for each in planned)
    bits = 8 * sum(each.size for each in planned) / sum(math.prod(each.tensor.ne) for each in planned)
    yield f"{bits:.2f} bits per weight: " + ", ".join(f"{count:,} {name}" for name, count in counts.most_common())
    fallen = Counter(each.why for each in planned if each.why.startswith(("fallback", "no importance")))
    for why, count in fallen.items():
        yield f"{count:,} of the tensors: {why}"
    if told.importance:
        yield from importance_notes(planned, told.importance, opened.model.layers.get("mtp", ()))
    if told.split_max_size is not None and (large := [each.tensor.name for each in planned if padded(each.size) > told.split_max_size]):
        yield f"{len(large):,} tensors are larger than --split-max-size and lie in a file of their own: {listed(large)}"
    if told.mtp_only:
        yield "the file holds the MTP layers alone; it drafts for a file of the whole model"
    tower = sum("visual." in name for name in opened.tensors)
    if tower:
        yield f"the {tower:,} tensors of the vision tower are not part of a language model's GGUF; --to gguf:mmproj writes them"


def importance_notes(planned: Sequence[Planned], importance: Importance, mtp: Collection[int]) -> Iterator[str]:
    """What of the tensors that an importance matrix would change has no data there, and what it has data of that is not here."""
    names = {each.tensor.name for each in planned}
    heeding = [each.tensor.name for each in planned if each.kind.name in WEIGHTED]
    without = [name for name in heeding if name not in importance.entries]
    usual = [name for name in without if layer_of(name) < 0 or layer_of(name) in mtp]  # nobody measures the inputs of these
    if odd := [name for name in without if name not in usual]:
        yield f"{importance.name} has no entry for {len(odd):,} of the {len(heeding):,} tensors that it could change: {listed(odd)}"
    if usual:
        yield f"{importance.name} has no entry for {len(usual):,} tensors of MTP layers, embedding and head, as usual: {listed(usual)}"
    idle = {name: count for name, count in importance.unused.items() if name in names}
    if idle:
        yield f"{sum(idle.values()):,} experts of {len(idle):,} tensors have no data in {importance.name}; all their columns count alike"
    foreign = [name for name in importance.entries if name not in names]
    if foreign:
        yield f"{len(foreign):,} of the {len(importance.entries):,} entries of {importance.name} belong to no tensor here: {listed(foreign)}"


def listed(names: Sequence[str]) -> str:
    """The first few."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
