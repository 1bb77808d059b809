"""ggml's block types, as GGUF files hold them: a row is whole blocks one after the other, each with its own scales; rows are independent.

|         | values | bytes | of it                                              |
|---|---|---|---|
| Q8_0    | 32  | 34  | float16 scale, int8 codes                                    |
| Q4_0    | 32  | 18  | float16 scale, 4-bit codes about 0 (Q5_0: 5 bits)            |
| Q4_1    | 32  | 20  | float16 scale and minimum, 4-bit codes (Q5_1: 5 bits)        |
| Q4_K    | 256 | 144 | two float16, 8 six-bit scales and minima, 4-bit codes (Q2_K, Q5_K alike) |
| Q6_K    | 256 | 210 | float16, 16 int8 scales, 6-bit codes about 0 (Q3_K alike)    |
| IQ4_XS  | 256 | 136 | float16, 8 six-bit scales, 4-bit codes of uneven values (IQ4_NL: of 32 values) |
| IQ3_S   | 256 | 110 | float16, 8 four-bit scales, 64 points of a codebook of 512, signs (IQ3_XXS: of 256; IQ2_*: of eight values each) |
| IQ1_S   | 256 | 50  | float16, 8 three-bit scales, 32 points of a codebook of 2048 (IQ1_M: 16 scales) |
| MXFP4   | 32  | 17  | power of two, codes of e2m1 (NVFP4: 64, four scales of e4m3)  |
| Q2_0    | 64  | 18  | float16 scale, codes of -1 to 2 (Q1_0: 128 signs)            |

Bytes are llama.cpp's own (libggml 0.25.3), with an importance matrix and without: tests/vectors/ggml. The searches are in kernels/ggml_search.py,
those of codebooks in kernels/ggml_iq_search.py and ggml_iq1.py.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from glmconv.codecs.codec import Array, raw, values
from glmconv.dtypes import DType
from glmconv.errors import SourceError, UnsupportedError

STRIP = 1 << 17  # values that are encoded or decoded at a time: as float32 they stay in a second-level cache


@dataclass(frozen=True)
class GgmlType:
    """`block` values are stored in `size` bytes. `id` is the number in a GGUF tensor info."""

    name: str
    id: int
    block: int
    size: int

    def __str__(self) -> str:
        return self.name


TYPES: Mapping[str, GgmlType] = {
    name: GgmlType(name, number, block, size)
    for name, number, block, size in (
        ("F32", 0, 1, 4), ("F16", 1, 1, 2), ("Q4_0", 2, 32, 18), ("Q4_1", 3, 32, 20), ("Q5_0", 6, 32, 22), ("Q5_1", 7, 32, 24), ("Q8_0", 8, 32, 34),
        ("Q2_K", 10, 256, 84), ("Q3_K", 11, 256, 110), ("Q4_K", 12, 256, 144), ("Q5_K", 13, 256, 176), ("Q6_K", 14, 256, 210),
        ("IQ2_XXS", 16, 256, 66), ("IQ2_XS", 17, 256, 74), ("IQ3_XXS", 18, 256, 98), ("IQ1_S", 19, 256, 50), ("IQ4_NL", 20, 32, 18),
        ("IQ3_S", 21, 256, 110), ("IQ2_S", 22, 256, 82), ("IQ4_XS", 23, 256, 136), ("IQ1_M", 29, 256, 56), ("BF16", 30, 1, 2),
        ("TQ1_0", 34, 256, 54), ("TQ2_0", 35, 256, 66), ("MXFP4", 39, 32, 17), ("NVFP4", 40, 64, 36), ("Q1_0", 41, 128, 18), ("Q2_0", 42, 64, 18),
    )
}  # fmt: skip
BY_ID: Mapping[int, GgmlType] = {kind.id: kind for kind in TYPES.values()}
# where the float16 scales lie in a block, of the types that have some
SCALES: Mapping[str, tuple[int, ...]] = {
    "F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2),
    "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,), "TQ1_0": (52,), "TQ2_0": (64,), "Q1_0": (0,), "Q2_0": (0,),
    "IQ1_S": (0,), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
}  # fmt: skip
NATIVE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODEBOOKS = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S")
# what an importance matrix changes, and what ggml does not make without one
WEIGHTED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", *CODEBOOKS)
IMPORTANCE_NEEDED = ("IQ1_S", "IQ2_XXS", "IQ2_XS")


def ggml_type(name: str) -> GgmlType:
    """The type of this name, in upper or lower case."""
    kind = TYPES.get(name.upper())
    if kind is None:
        raise UnsupportedError(f"{name} is no type of ggml that is known.", hint=f"Known are {', '.join(TYPES)}.")
    return kind


def row_size(kind: GgmlType, columns: int) -> int:
    """Bytes of a row. ValueError if blocks do not fill it."""
    if columns % kind.block:
        raise ValueError(f"{columns:,} columns are no multiple of {kind.name}'s {kind.block}")
    return columns // kind.block * kind.size


class StoredImportance(Protocol):
    """An importance that is read when a tensor is begun: of all a model's tensors together it is a gigabyte."""

    @property
    def id(self) -> str:
        """What decides its values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(slices, columns)"""

    def read(self) -> NDArray[np.float32]:
        """[slices, columns], finite. SourceError if that is not what is stored."""


@dataclass(frozen=True, eq=False)
class GgmlEncoder:
    """Rows of `dtype` to blocks of `kind`, which go out as they are made.

    importance: float32 [columns], or [slices, columns] for as many equal slices of the rows (a stack's experts), finite; None for none
    first:      the row of the weight with which the rows given begin, where it is stored in several pieces; `shape` is the whole weight's
    """

    kind: GgmlType
    shape: tuple[int, int]
    dtype: DType
    importance: Array | StoredImportance | None = field(default=None, repr=False)
    strict: bool = True
    first: int = 0
    unit: int = 1
    looks: bool = False

    def __post_init__(self) -> None:
        rows, columns = self.shape
        row_size(self.kind, columns)
        if self.importance is not None:
            given = self.importance.shape
            slices = given[0] if len(given) == 2 else 1
            if given not in ((columns,), (slices, columns)) or not slices or rows % slices:
                raise SourceError(f"has an importance of {list(given)} for a weight of {list(self.shape)}.")
            if isinstance(self.importance, np.ndarray):
                self._check(self.importance)
        elif self.kind.name in IMPORTANCE_NEEDED:
            raise UnsupportedError(f"{self.kind.name} needs an importance matrix.", hint="Give one, or choose a type without: IQ2_S, IQ1_M, Q2_K.")

    def _check(self, importance: Array) -> None:
        if not np.isfinite(importance).all():
            raise SourceError("has an importance that is NaN or infinite.", hint="Is the importance matrix damaged?")
        if self.kind.name in CODEBOOKS and (importance < 0).any():
            raise SourceError(f"has an importance below 0, which {self.kind.name} cannot heed.", hint="Is the importance matrix damaged?")

    @property
    def heeds(self) -> bool:
        """Whether there is an importance, and it changes what is made."""
        return self.importance is not None and self.kind.name in WEIGHTED

    def weights(self) -> NDArray[np.float32]:
        """The importance, [slices, columns]; [0, 0] if there is none that the type heeds."""
        if self.importance is None or not self.heeds:
            return np.empty((0, 0), np.float32)
        found = self.importance if isinstance(self.importance, np.ndarray) else self.importance.read()
        return np.ascontiguousarray(found, np.float32).reshape(-1, self.shape[1])

    @property
    def row_bytes(self) -> int:
        return row_size(self.kind, self.shape[1])

    @cached_property
    def id(self) -> str:
        made = f"ggml {self.kind.name} of {self.dtype}"
        if self.importance is None or not self.heeds:
            return made
        made += f" from row {self.first}" if self.first else ""
        if not isinstance(self.importance, np.ndarray):
            return f"{made} with importance {self.importance.id}"
        weights = self.weights()
        slices = f" for each of {len(weights)} slices" if len(weights) > 1 else ""
        return f"{made} with importance {hashlib.sha256(raw(weights)).hexdigest()}{slices}"

    @property
    def held(self) -> int:
        """Bytes that encoding holds beside the engine's buffers."""
        return 4 * (max(STRIP, self.shape[1]) + (math.prod(self.importance.shape) if self.importance is not None and self.heeds else 0))

    def begin(self, lend: Callable[[int], memoryview]) -> GgmlEncoding:
        return GgmlEncoding(self, np.frombuffer(lend(max(STRIP, self.shape[1]) * 4), np.float32), self.weights())


@dataclass
class GgmlEncoding:
    """At work: `wide` holds a strip of rows as float32, `weights` the importance as `GgmlEncoder.weights` gives it."""

    encoder: GgmlEncoder
    wide: NDArray[np.float32]
    weights: NDArray[np.float32]

    def look(self, rows: memoryview) -> int:
        return -1

    def part(self, number: int) -> memoryview:
        raise ValueError("ggml's blocks have no held parts")

    def encode(self, start: int, rows: memoryview, out: memoryview) -> int:
        from glmconv.kernels.ggml import encode
        from glmconv.kernels.nonfinite import first_nonfinite

        kind = self.encoder.kind
        start += self.encoder.first
        weight = values(rows, self.encoder.dtype, self.encoder.shape[1])
        blocks = np.frombuffer(out, np.uint8).reshape(len(weight), -1)
        bad = first_nonfinite(rows, self.encoder.dtype.name)
        for strip, importance in self._strips(start, len(weight)):
            if NATIVE.get(kind.name) == self.encoder.dtype.name:
                blocks[strip] = weight[strip].view(np.uint8)
            else:
                encode(kind.name, self._widened(weight[strip]), importance, blocks[strip])
            if bad is None:
                _check(kind, blocks[strip], start + strip.start)
        return -1 if bad is None else bad

    def _strips(self, start: int, count: int) -> Iterator[tuple[slice, NDArray[np.float32] | None]]:
        """Slices of the rows given, each with its importance."""
        rows, columns = self.encoder.shape
        weights = self.weights
        tall = rows // len(weights) if weights.size else rows
        at = 0
        while at < count:
            number = (start + at) // max(tall, 1)
            end = min(count, (number + 1) * tall - start, at + max(1, STRIP // max(columns, 1)))
            yield slice(at, end), weights[number] if weights.size else None
            at = end

    def _widened(self, rows: Array) -> NDArray[np.float32]:
        if rows.dtype == np.float32:
            return rows
        wide = self.wide[: rows.size].reshape(rows.shape)
        if self.encoder.dtype.name == "bfloat16":
            np.left_shift(rows, 16, out=wide.view(np.uint32), dtype=np.uint32)
        else:
            np.copyto(wide, rows)
        return wide


def _check(kind: GgmlType, rows: Array, start: int) -> None:
    """SourceError if a scale is beyond float16 (NaN where a codebook's search broke down): llama-quantize refuses such a tensor too."""
    blocks = rows.reshape(-1, kind.size)
    upper = [blocks[:, at + 1] for at in SCALES.get(kind.name, ())]
    if kind.name == "IQ1_M":  # four bits of the scale each are the highest of the last four pairs of bytes
        upper = [blocks[:, 55] & 0xF0 | blocks[:, 53] >> 4]
    for byte in upper:
        wrong = (byte & 0x7C) == 0x7C
        if wrong.any():
            _refuse(kind, rows, start, int(wrong.argmax()))
    if kind.name == "BF16":
        wrong = (rows.view("<u2").reshape(-1) & 0x7F80) == 0x7F80
        if wrong.any():
            _refuse(kind, rows, start, int(wrong.argmax()))


def _refuse(kind: GgmlType, rows: Array, start: int, block: int) -> None:
    each = rows.shape[1] // kind.size
    what = "a value" if kind.block == 1 else f"values from column {block % each * kind.block:,} on"
    place = f"row {start + block // each:,}" + (f", column {block % each:,}" if kind.block == 1 else "")
    raise SourceError(f"has {what} in {place} that {kind.name} cannot hold: too large.", hint="Choose Q8_0 or BF16 for this tensor.")


def decode(kind: GgmlType, data: memoryview | bytes | bytearray | Array, columns: int) -> NDArray[np.float32]:
    """Whole rows of blocks as float32 [rows, columns]; exact, but for the one product and sum that ggml itself rounds."""
    from glmconv.kernels.ggml_decode import DECODE

    blocks = np.frombuffer(data, np.uint8).reshape(-1, kind.size)
    size = row_size(kind, columns)
    if not size or blocks.size % size:
        raise SourceError(f"has {blocks.size:,} bytes, which is no whole number of rows of {size:,}.", hint="Is the file complete?")
    out = np.empty((len(blocks), kind.block), np.float32)
    step = STRIP // kind.block
    with np.errstate(all="ignore"):  # scales may be Inf or NaN: what they make of their codes is what ggml makes of them
        for at in range(0, len(blocks), step):
            out[at : at + step] = DECODE[kind.name](blocks[at : at + step]).reshape(-1, kind.block)
    return out.reshape(-1, columns)
