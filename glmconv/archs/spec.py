"""The vocabulary in which an architecture is written: sizes, records, places, rows, scopes. Imports no tensor library.

A tensor is a sequence of *records* with named fields; a tensor's *place* in another format is a field of a record there; a place is a list
of *moves* (source row, target row, count), and a move read backwards is its own inverse. Concatenating, interleaving by KV group, stacking
experts and splitting heads are places, not operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

Sizes = Mapping[str, int]
Fields = Callable[[str], object]  # a config field by its dotted path; None if it is not there
Layers = Callable[[Sizes, Fields], Sequence[int]]  # which layers; ValueError for a config's list that makes no sense
Index = Mapping[str, int]  # which layer, expert and MTP layer a tensor belongs to


@dataclass(frozen=True)
class Size:
    """A whole number that a config decides, such as `heads*head_dim`; `text` is how it prints."""

    text: str
    of: Callable[[Sizes], int]

    def __add__(self, other: Size) -> Size:
        return Size(f"{self.text} + {other.text}", lambda s: self.of(s) + other.of(s))

    def __sub__(self, other: Size) -> Size:
        return Size(f"{self.text} - {other._factor}", lambda s: self.of(s) - other.of(s))

    def __mul__(self, other: Size) -> Size:
        return Size(f"{self._factor}*{other._factor}", lambda s: self.of(s) * other.of(s))

    def __floordiv__(self, other: Size) -> Size:
        return Size(f"{self._factor}/{other._factor}", lambda s: self.of(s) // other.of(s))

    def __rmul__(self, times: int) -> Size:
        return Size(f"{times}*{self._factor}", lambda s: times * self.of(s))

    @property
    def _factor(self) -> str:
        return f"({self.text})" if " " in self.text else self.text


def _named(name: str) -> Size:
    return Size(name, lambda s: s[name])


def sizes(names: str) -> list[Size]:
    return [_named(name) for name in names.split()]


def number(value: int) -> Size:
    """A size that no config decides."""
    return Size(str(value), lambda s: value)


class Role(Enum):
    """What a tensor is for; decides which encodings may touch it."""

    LINEAR = "linear"
    EXPERT = "expert"
    EMBEDDING = "embedding"
    HEAD = "head"
    ROUTER = "router"
    NORM = "norm"
    BIAS = "bias"
    PLAIN = "plain"  # a linear module that no release quantizes: small gates, linear attention
    VISION = "vision"  # a linear module of the vision tower; stays as it is
    PARAMETER = "parameter"  # a bare parameter or a convolution


@dataclass(frozen=True)
class Record:
    """A tensor whose rows are records of named fields, one record after another.

    `linear_fc1` is one record (gate, up), `linear_qkv` one record (q, k, v) per KV group, the stacked experts one record per expert.
    """

    name: str
    fields: Mapping[str, Size]
    per: str = ""  # "expert": record e belongs to expert e, and the stored tensor has an axis of experts; "": rows are dealt out in turn

    def __getattr__(self, name: str) -> Part:
        if not name.startswith("_") and name in self.fields:
            return Part(self, name)
        raise AttributeError(name)

    def span(self, name: str, s: Sizes) -> tuple[int, int, int]:
        """Rows before the field, rows of the field, rows of the whole record."""
        widths = [size.of(s) for size in self.fields.values()]
        at = list(self.fields).index(name)
        return sum(widths[:at]), widths[at], sum(widths)


def record(name: str, per: str = "", **fields: Size) -> Record:
    return Record(name, fields, per)


@dataclass(frozen=True)
class Part:
    """A place: one field of a record in a larger tensor."""

    record: Record
    field: str


@dataclass(frozen=True)
class Split:
    """A place: the tensor's own rows are records, and each field goes somewhere by itself."""

    record: Record
    into: Mapping[str, str | Part]
    transposed: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Frames:
    """A place: a convolution over images and time, [out, in, frames, height, width], is one over images, [out, in, height, width], for each frame."""

    into: tuple[str, ...]


Place = str | Part | Split | Frames


@dataclass(frozen=True, slots=True)
class Move:
    """`rows` rows, from row `source` of a canonical tensor to row `target` of the tensor `name`. Read backwards it is the inverse.

    `stride` is 0, or the rows of one record of a stacked tensor, whose stored shape is then [records, stride, ...]; rows count through.
    """

    name: str
    source: int
    target: int
    rows: int
    stride: int = 0


def moves(place: Place, rows: int, index: Index, s: Sizes) -> Iterator[Move]:
    """Where the `rows` rows of a canonical tensor lie in another format, run by run."""
    if isinstance(place, str):
        yield Move(place, 0, 0, rows)
    elif isinstance(place, Part):
        before, width, stride = place.record.span(place.field, s)
        per = place.record.per
        first = index[per] if per else 0
        for n in range(rows // width):
            yield Move(place.record.name, n * width, (first + n) * stride + before, width, stride if per else 0)
    elif isinstance(place, Frames):
        for name in place.into:
            yield Move(name, 0, 0, rows)
    else:
        for name, inner in place.into.items():
            before, width, stride = place.record.span(name, s)
            for move in moves(inner, rows // stride * width, index, s):
                for at in range(0, move.rows, width):
                    source = (move.source + at) // width * stride + before
                    yield Move(move.name, source, move.target + at, width, move.stride)


def always(s: Sizes) -> bool:
    return True


@dataclass(frozen=True)
class Row:
    """One family of tensors: its canonical (Hugging Face) name, shape and role, and its place in every other format.

    `megatron` may be a mapping by dialect; None there and in `gguf`: not stored in that format.
    `dtype` is empty for the model's own. A row that is `loose` may also be of the model's dtype, and stays as the source has it.
    `alias` is the canonical tensor that this one repeats; releases may leave it out.
    `parallel` is how tensor parallelism splits a linear weight: its rows ("column"), its rows of KV heads, which are repeated where there are fewer
    than ranks ("kv"), its columns ("row"), or not at all ("none"). `fused` is the module that serving engines make of it and its partners, which
    must have one form; `stacked` is how many of the fused parts lie in this one weight already, one below the other. `asked` are other paths by
    which engines ask whether this module is quantized.
    """

    name: str
    shape: tuple[Size, ...]
    role: Role
    megatron: Place | Mapping[str, Place] | None = None
    gguf: Place | None = None
    when: Callable[[Sizes], bool] = always
    dtype: str = ""
    loose: bool = False
    alias: str = ""
    parallel: str = "column"
    fused: str = ""
    stacked: int = 1
    asked: tuple[str, ...] = ()

    def megatron_place(self, dialect: str) -> Place | None:
        return self.megatron[dialect] if isinstance(self.megatron, Mapping) else self.megatron


@dataclass(frozen=True)
class Scope:
    """Rows that share a prefix in each format, once (`layers` empty) or in every layer of the spec's set of this name.

    `{layer}` in a prefix is the layer's number, `{block}` that of a vision block, `{mtp}` counts MTP layers from 0.
    """

    rows: tuple[Row, ...]
    name: str = ""
    megatron: str = ""
    gguf: str = ""
    layers: str = ""
    title: str = ""
    mtp: bool = False


@dataclass(frozen=True)
class Rule:
    """Something that must hold between a config's sizes, in the words of config.json."""

    text: str
    holds: Callable[[Sizes], bool]


@dataclass(frozen=True)
class Preset:
    """A released model: its name here, its Hub id, its published config.json, and how its files are laid out.

    `called` is its name in the trainers' documents and scripts, where that is another.
    """

    name: str
    hub: str
    config: Mapping[str, object]
    aliases: bool = False  # the release carries the copies of embedding and head in its MTP layer
    mtp_file: str = ""  # the MTP layer lies in a file of its own
    tensors: int = 0  # published count, aliases included
    mtp_tensors: int = 0
    called: str = ""


ONE_LAYOUT = dict.fromkeys(("slime", "miles", "mcore", "bridge"), "te")


@dataclass(frozen=True)
class ArchSpec:
    """One architecture as a table. `config` binds each size to a config.json field, by its dotted path.

    "field=default" where it may be absent: a number, or a quotient of two sizes before it ("hidden//heads"); "a|b" where it has two names.
    `layers` are the sets of layers that scopes name; those in `optional` may be absent from a checkpoint as a whole. `text` is the field that holds
    the language model's own config.
    `dialects`: the name that a user gives a project's Megatron naming -> its key in the rows' cells, the first being what "auto" writes; those left
    out do not have this architecture, for the reason in `undialected`. `megatron_args`: what the arguments of a Megatron run say beside the sizes;
    `megatron_flags`: what slime's command line for it has beyond any model's; `bridge_provider`: the class by which Megatron-Bridge builds it.
    `stacked`: Megatron keeps all layers of the decoder in one tensor, with a first axis of layers. `asked`: prefix of canonical names -> the prefix
    under which engines ask for the same module.
    """

    model_type: str
    title: str
    config: Mapping[str, str]
    scopes: tuple[Scope, ...]
    layers: Mapping[str, Layers] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    derived: Mapping[str, Size] = field(default_factory=dict)
    rules: tuple[Rule, ...] = ()
    presets: tuple[Preset, ...] = ()
    text: str = ""
    mtp_field: str = "num_nextn_predict_layers"
    dialects: Mapping[str, str] = field(default_factory=lambda: ONE_LAYOUT)
    undialected: str = ""
    megatron_args: Mapping[str, object] = field(default_factory=dict)
    megatron_flags: tuple[str, ...] = ()
    bridge_provider: str = ""
    stacked: bool = False
    asked: Mapping[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # special rules, for docs/models.md
