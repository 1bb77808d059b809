"""Are two checkpoints the same weights? Compared bit by bit under canonical names, whatever their formats, streaming."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from glmconv.checkpoint import Checkpoint, LazyTensor
from glmconv.codecs import bound_of
from glmconv.codecs.codec import bfloat16_values
from glmconv.errors import Interrupted
from glmconv.formats.coded import label_of
from glmconv.formats.gguf_stored import GgufRows
from glmconv.formats.gguf_tensors import in_tower

CHUNK = 4 << 20


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same: in words, and how far it is off. `worst` is the largest absolute difference, inf with a one-sided NaN."""

    tensor: str
    what: str
    elements: int = 0
    worst: float = 0.0


@dataclass(frozen=True)
class Loss:
    """How far a quantized tensor is from what it was made of. `rmse` is relative to the root mean square, `worst` the largest absolute error."""

    tensor: str
    codec: str
    rmse: float
    worst: float
    bound: float

    @property
    def sqnr(self) -> float:
        """Signal to quantization noise, in dB."""
        return -20 * math.log10(self.rmse) if self.rmse else math.inf


@dataclass
class Comparison:
    """`same` only if every tensor is in both, with the same shape, dtype and bits; one that `b` holds quantized, only if its loss is in bounds."""

    tensors: int = 0
    elements: int = 0
    bytes: int = 0
    aliases: int = 0  # copies that only one side stores, found equal to what they repeat
    apart: int = 0  # tensors of a vision tower that one side keeps in a file that was not given: not compared
    differences: list[Difference] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not self.differences and self.tensors > 0

    @property
    def worst(self) -> list[Difference]:
        """The differences, the gravest first: what is missing or shaped otherwise, then by distance."""
        return sorted(self.differences, key=lambda d: (d.elements > 0, -d.worst, -d.elements, d.tensor))


def compare(
    a: Checkpoint,
    b: Checkpoint,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    stop: threading.Event | None = None,
    every: int = 1,
    max_rmse: float | None = None,
) -> Comparison:
    """Compare two opened checkpoints, `b` being what was made of `a`.

    `every` > 1 reads only each n-th tensor's bits (names, shapes and dtypes are always compared); `max_rmse` replaces each codec's own bound.
    """
    result = Comparison()
    pairs = list(_pairs(a, b, result))
    local = threading.local()

    def bits(number: int) -> Difference | Loss | None:
        if stop is not None and stop.is_set():
            raise Interrupted(2)
        left, right = pairs[number]
        if not hasattr(local, "buffers"):
            local.buffers = (bytearray(CHUNK), bytearray(CHUNK))
        label, same = label_of(right.reader), label_of(left.reader)
        if same and not label and _repeats(b, left.name, right):
            label, same = same, ""  # a quantized copy against what it repeats, which releases leave unquantized
        if label and label != same:
            found: Difference | Loss | None = _loss(left, right, label, max_rmse or bound_of(label), local.buffers)
        else:
            found = _compare_bits(left, right, local.buffers)
        if progress:
            progress(left.nbytes)
        return found

    with ThreadPoolExecutor(workers) as pool:
        chosen = range(0, len(pairs), every)
        for number, found in zip(chosen, pool.map(bits, chosen), strict=True):
            left = pairs[number][0]
            result.tensors += 1
            result.elements += _elements(left)
            result.bytes += left.nbytes
            if isinstance(found, Loss):
                result.losses.append(found)
                if not found.rmse <= found.bound:
                    what = f"is off by {found.rmse:.4g} of its size as {found.codec} (relative RMSE), {found.bound:g} is allowed"
                    result.differences.append(Difference(found.tensor, what, _elements(left), found.worst))
            elif found:
                result.differences.append(found)
    return result


def _elements(tensor: LazyTensor) -> int:
    return tensor.nbytes // tensor.dtype.itemsize


def _loss(left: LazyTensor, right: LazyTensor, label: str, bound: float, buffers: tuple[bytearray, bytearray]) -> Loss:
    """Error of `right` against `left`, summed in float64 over chunks of rows. NaN on one side only counts as infinite."""
    rows = max(1, CHUNK // left.row_size)
    noise, signal, worst = 0.0, 0.0, 0.0
    for start in range(0, left.shape[0], rows):
        size = min(rows, left.shape[0] - start) * left.row_size
        a, b = (_floats(np.frombuffer(v, f"<u{left.dtype.itemsize}"), left.dtype.name) for v in _read(left, right, start, size, buffers))
        with np.errstate(all="ignore"):
            off = np.where(a == b, np.float32(0), np.abs(a - b))
        off[np.isnan(a) & np.isnan(b)] = 0
        np.nan_to_num(off, copy=False, nan=np.inf, posinf=np.inf)
        worst = max(worst, float(off.max(initial=0.0)))
        noise += float(np.sum(np.square(off, dtype=np.float64)))
        signal += float(np.sum(np.square(a[np.isfinite(a)], dtype=np.float64)))
    return Loss(left.name, label, math.sqrt(noise / signal) if signal else (math.inf if noise else 0.0), worst, bound)


def _floats(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values of little-endian bits, as float32 at least."""
    if dtype == "bfloat16":
        return bfloat16_values(bits)
    values = bits.view(f"<f{bits.dtype.itemsize}")
    return values.astype(np.float32) if dtype == "float16" else values


def _pairs(a: Checkpoint, b: Checkpoint, result: Comparison) -> Iterator[tuple[LazyTensor, LazyTensor]]:
    """The tensors to compare bit by bit; what differs before that goes into `result`."""
    towerless = [side for side in (a, b) if side.opened.apart]
    for name in dict.fromkeys([*a.tensors, *b.tensors]):
        left, right = _of(a, b, name), _of(b, a, name)
        if left and right and isinstance(right.reader, GgufRows):
            right = LazyTensor(name, right.reader.retyped(left.dtype))  # GGUF does not say which dtype its numbers had
        if (left is None or right is None) and any(_is_apart(side, a, b, name) for side in towerless):
            result.apart += 1
        elif left is None or right is None:
            result.differences.append(Difference(name, f"is only in {(a if right is None else b).path}"))
        elif left.shape != right.shape:
            result.differences.append(Difference(name, f"is {list(left.shape)} and {list(right.shape)}"))
        elif left.dtype != right.dtype:
            result.differences.append(Difference(name, f"is {left.dtype} and {right.dtype}"))
        else:
            result.aliases += name not in a.tensors or name not in b.tensors
            yield left, right


def _is_apart(side: Checkpoint, a: Checkpoint, b: Checkpoint, name: str) -> bool:
    """Whether a tensor that `side` lacks is one of those that it keeps in a file that was not given."""
    tensor = next(found for checkpoint in (a, b) if (found := checkpoint.arch.tensors.get(name)))
    return name not in side.tensors and in_tower(tensor)


def _of(side: Checkpoint, other: Checkpoint, name: str) -> LazyTensor | None:
    """The tensor, or the one that it repeats where this side leaves copies out."""
    if name in side.tensors:
        return side.tensors[name]
    alias = other.arch.tensors[name].alias if name in other.arch.tensors else ""
    return side.tensors.get(alias)


def _repeats(side: Checkpoint, name: str, found: LazyTensor) -> bool:
    """Whether what was found for a copy is the very tensor that it repeats, stored once."""
    alias = side.arch.tensors[name].alias if name in side.arch.tensors else ""
    return found.name != name or (alias in side.tensors and side.tensors[alias].reader.place == found.reader.place)


def _compare_bits(left: LazyTensor, right: LazyTensor, buffers: tuple[bytearray, bytearray]) -> Difference | None:
    rows = max(1, CHUNK // left.row_size)
    differing, worst = 0, 0.0
    for start in range(0, left.shape[0], rows):
        size = min(rows, left.shape[0] - start) * left.row_size
        x, y = (np.frombuffer(view, np.uint8) for view in _read(left, right, start, size, buffers))
        if not np.array_equal(x, y):
            count, off = _distance(x, y, left.dtype.name, left.dtype.itemsize)
            differing, worst = differing + count, max(worst, off)
    return Difference(left.name, f"differs in {differing:,} of {_elements(left):,} elements", differing, worst) if differing else None


def _read(left: LazyTensor, right: LazyTensor, start: int, size: int, buffers: tuple[bytearray, bytearray]) -> tuple[memoryview, memoryview]:
    """`size` bytes of both from row `start` on, in the worker's buffers."""
    views = _view(buffers[0], size), _view(buffers[1], size)
    left.read_into(start, views[0])
    right.read_into(start, views[1])
    return views


def _view(buffer: bytearray, size: int) -> memoryview:
    if len(buffer) < size:  # one row larger than a chunk
        buffer.extend(bytes(size - len(buffer)))
    return memoryview(buffer)[:size]


def _distance(x: np.ndarray, y: np.ndarray, dtype: str, itemsize: int) -> tuple[int, float]:
    """Elements whose bits differ, and the largest absolute difference among them."""
    a, b = x.view(f"<u{itemsize}"), y.view(f"<u{itemsize}")
    at = np.nonzero(a != b)[0]
    a, b = a[at], b[at]
    if dtype not in ("bfloat16", "float16", "float32", "float64"):
        return len(at), float(len(at))
    p, q = (_floats(v, dtype) for v in (a, b))
    with np.errstate(all="ignore"):
        off = np.abs(p.astype(np.float64) - q.astype(np.float64))
    return len(at), float(np.nan_to_num(off, nan=np.inf, posinf=np.inf).max())
