"""The tensors of a model's GGUF file, in the order of a quantized one, and the canonical rows that each is made of.

Source: what llama.cpp makes of six models' shapes (tests/vectors/mixes) and of two small models (tests/vectors/gguf_header).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum

from glmconv.archs import Model, TensorSpec
from glmconv.archs.spec import Frames, Place, Sizes, Split, moves
from glmconv.errors import SourceError

VISION = ("v.", "mm.")  # the vision tower lies in a file of its own (mmproj)
DECAY = "ssm_a"
# Matrices that the float file stores in float32 all the same; llama-quantize may still make something else of `indexer.proj`
FLOAT32 = re.compile(
    r"(_norm|ffn_gate_inp|indexer\.proj|\.hc_\w+|indexer_compressor_\w+|ssm_conv1d_\w|position_embd|patch_embd|patch_merger)\.weight$"
)
BLOCK = re.compile(r"blk\.(\d+)\.")


class Transform(Enum):
    """What becomes of the rows on their way into the file."""

    NONE = "none"
    WIDENED = "widened"  # to float32; nothing to do where a row is loose and the source float32
    TRANSPOSED = "transposed"  # each run, a matrix, for itself
    NEGATIVE_EXPONENTIAL = "negative exponential"  # -exp(x) in float32
    FRAME = "frame"  # of a convolution over images and time what it does with one frame


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` rows from row `first` of a canonical tensor."""

    tensor: str
    first: int
    rows: int


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """`ne` is the shape with the columns first, `dtype` "F32" or "BF16", as in a bf16 file. Its data is the transformed runs, one after another.

    `frame`: which one, where the transform is FRAME.
    """

    name: str
    ne: tuple[int, ...]
    dtype: str
    runs: tuple[Run, ...]
    transform: Transform
    frame: int = 0


@dataclass
class _Growing:
    """A tensor while its runs are collected: `depth` is 0, or the rows of each of the matrices that are stacked in it."""

    tail: tuple[int, ...]
    depth: int
    transposed: bool
    float32: bool  # the canonical tensors are float32 already
    frame: int | None = None
    runs: dict[int, Run] = field(default_factory=dict)  # by the row of this tensor where they begin

    def shape(self, name: str) -> tuple[int, ...]:
        """As Hugging Face would write it. The spec's places are checked: its runs cover each row once."""
        end = 0
        for target, run in sorted(self.runs.items()):
            if target != end:
                raise AssertionError(f"{name}: row {end} has no place in the table, or two")
            end += run.rows
        if not self.depth:
            return (end, *self.tail)
        return (end // self.depth, *self.tail, self.depth) if self.transposed else (end // self.depth, self.depth, *self.tail)


def gguf_tensors(model: Model, names: Collection[str] | None = None) -> list[GGUFTensor]:
    """Every tensor of the language model's file: globals, then layer by layer, by name.

    `names` are the canonical tensors that are there (None: all of the model's); a tensor of which none is there is left out, such as the copies in
    an MTP layer. SourceError if some of a tensor's parts are there and others not.
    """
    return sorted(placed(model, names, tower=False), key=lambda tensor: (layer_of(tensor.name), tensor.name))


def placed(model: Model, names: Collection[str] | None, *, tower: bool) -> list[GGUFTensor]:
    """Every tensor that the table has a place for, the vision tower's or all others, in no order that a file has."""
    growing: dict[str, _Growing] = {}
    for tensor in model.tensors.values():
        if tensor.row.gguf is not None and in_tower(tensor) is tower:
            _grow(growing, tensor, tensor.row.gguf, model.sizes)
    found = (_finished(name, grown) for name, grown in growing.items())
    return [tensor for tensor in found if names is None or _there(tensor, names)]


def in_tower(tensor: TensorSpec) -> bool:
    """Whether a canonical tensor lies in the vision tower's file."""
    place = tensor.row.gguf
    names = place.into if isinstance(place, Frames) else [place] if isinstance(place, str) else []
    return any((tensor.scope.gguf + name).startswith(VISION) for name in names)


def layer_of(name: str) -> int:
    """The number of a tensor's layer; -1 for globals."""
    found = BLOCK.match(name)
    return int(found[1]) if found else -1


def _grow(growing: dict[str, _Growing], tensor: TensorSpec, place: Place, s: Sizes) -> None:
    """Add the runs of one canonical tensor to the GGUF tensors that it goes to."""
    stacks = _stacks(place, s)
    frames = place.into if isinstance(place, Frames) else ()
    tail = (*tensor.shape[1:2], *tensor.shape[3:]) if frames else tensor.shape[1:]
    prefix = tensor.scope.gguf
    for move in moves(place, tensor.rows, tensor.index, s):
        depth, transposed = stacks.get(move.name, (move.stride, False))
        name = (prefix + move.name).format(**tensor.index)
        frame = frames.index(move.name) if frames else None
        grown = growing.setdefault(name, _Growing(tail, depth, transposed, tensor.dtype == "float32" and not tensor.row.loose, frame))
        if move.target in grown.runs or grown.tail != tail:
            raise AssertionError(f"{name}: {tensor.name} does not fit into it")
        grown.runs[move.target] = Run(tensor.name, move.source, move.rows)


def _stacks(place: Place, s: Sizes) -> Mapping[str, tuple[int, bool]]:
    """The tensors that a split makes, each a stack of one matrix for each record: the matrix's rows, and whether it is transposed."""
    if not isinstance(place, Split):
        return {}
    return {str(inner): (place.record.span(name, s)[1], name in place.transposed) for name, inner in place.into.items()}


def _finished(name: str, grown: _Growing) -> GGUFTensor:
    shape = grown.shape(name)
    float32 = len(shape) < 2 or not name.endswith(".weight") or FLOAT32.search(name) is not None
    transform = Transform.WIDENED if float32 and not grown.float32 else Transform.NONE
    if grown.transposed:
        transform = Transform.TRANSPOSED
    elif grown.frame is not None:
        transform = Transform.FRAME
    elif name.endswith(f".{DECAY}"):
        transform = Transform.NEGATIVE_EXPONENTIAL
    runs = tuple(run for _, run in sorted(grown.runs.items()))
    return GGUFTensor(name, shape[::-1], "F32" if float32 else "BF16", runs, transform, grown.frame or 0)


def _there(tensor: GGUFTensor, names: Collection[str]) -> bool:
    parts = dict.fromkeys(run.tensor for run in tensor.runs)
    missing = [part for part in parts if part not in names]
    if missing and len(missing) < len(parts):
        raise SourceError(f"is missing, a part of {tensor.name}; {len(parts) - len(missing)} of its {len(parts)} parts are there.", tensor=missing[0])
    return not missing
