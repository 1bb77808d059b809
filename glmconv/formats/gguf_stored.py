"""Canonical rows out of a GGUF file: found in its tensors by the moves that put them there, decoded in float32, rounded once to their dtype.

`Transform` says what the rows went through; here it is undone. A transpose is its own inverse, on a matrix at a time; widening needs nothing but
the rounding; of -exp(x) a number is found that gives the stored one again.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glmconv.codecs.codec import bfloat16_values, values
from glmconv.codecs.ggml import NATIVE, SCALES, decode, row_size
from glmconv.dtypes import BY_NAME, DType
from glmconv.errors import SourceError
from glmconv.formats.format import row_size as canonical_row
from glmconv.formats.gguf_files import StoredTensor
from glmconv.formats.gguf_tensors import Transform

Floats = NDArray[np.float32]
FLOAT32 = BY_NAME["float32"]
STRIP = 1 << 18  # values decoded at a time: a megabyte as float32
UNITS = (1, -1, 2, -2, 3, -3, 4, -4)  # steps around a logarithm
STEP = np.float32(2**-25)  # changes the exponential by half a unit in its last place, or less
HOLDS = {"float32": ("F32",), "bfloat16": ("F32", "BF16"), "float16": ("F32", "F16")}  # the types that keep each value of a dtype
DAMAGED = "Is the file damaged?"


@dataclass(frozen=True)
class Stretch:
    """Rows of a canonical tensor, from `first` on, in a stored one, from its row `at` on. Transposed they are a matrix of as many columns."""

    first: int
    rows: int
    stored: StoredTensor
    at: int
    transform: Transform = Transform.NONE


@dataclass(frozen=True)
class GgufRows:
    """A canonical tensor of a GGUF source. `stretches` cover its rows in their order."""

    name: str
    shape: tuple[int, ...]
    dtype: DType
    stretches: tuple[Stretch, ...]

    @property
    def file(self) -> Path:
        return self.stretches[0].stored.file.path

    @property
    def place(self) -> tuple[int, int]:
        return self.stretches[0].stored.place

    @property
    def types(self) -> tuple[str, ...]:
        """ggml's types that it is stored in: one, but for the halves of a `kv_b_proj`."""
        return tuple(sorted({stretch.stored.tensor.type.name for stretch in self.stretches}))

    @property
    def label(self) -> str:
        """The type that does not hold each value of the dtype; empty where all do."""
        return "+".join(name for name in self.types if name not in HOLDS[self.dtype.name])

    def widened(self) -> GgufRows:
        return self.retyped(FLOAT32)

    def retyped(self, dtype: DType) -> GgufRows:
        """The same numbers, rounded to another dtype."""
        return replace(self, dtype=dtype)

    @cached_property
    def _firsts(self) -> list[int]:
        return [stretch.first for stretch in self.stretches]

    @property
    def columns(self) -> int:
        """Values of one canonical row."""
        return canonical_row(self.shape, self.dtype) // self.dtype.itemsize

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out` with rows from `start` on. SourceError for scales that mean nothing, naming the tensor in the file."""
        rows = values(out, self.dtype, self.columns)
        done = 0
        while done < len(rows):
            stretch = self.stretches[bisect.bisect_right(self._firsts, start + done) - 1]
            skip = start + done - stretch.first
            count = min(len(rows) - done, stretch.rows - skip)
            self._read(stretch, skip, out[done * rows.itemsize * self.columns :], rows[done : done + count])
            done += count

    def _read(self, stretch: Stretch, skip: int, out: memoryview, rows: NDArray[np.generic]) -> None:
        stored = stretch.stored
        if stretch.transform is Transform.TRANSPOSED:
            matrix = decoded(stored, stretch.at, self.columns, stretch.rows)
            narrow(np.ascontiguousarray(matrix[:, skip : skip + len(rows)].T), rows)
        elif NATIVE.get(stored.tensor.type.name) == self.dtype.name and stretch.transform is not Transform.NEGATIVE_EXPONENTIAL:
            size = rows.itemsize * self.columns
            stored.file.read_into(stored.tensor.offset + (stretch.at + skip) * size, out[: len(rows) * size])
        else:
            each = max(1, STRIP // self.columns)
            for at in range(0, len(rows), each):
                found = decoded(stored, stretch.at + skip + at, min(each, len(rows) - at), self.columns)
                narrow(logarithms(found) if stretch.transform is Transform.NEGATIVE_EXPONENTIAL else found, rows[at : at + each])


def decoded(stored: StoredTensor, start: int, rows: int, columns: int) -> Floats:
    """Rows of `columns` values, whatever the stored ones are cut into, as float32 [rows, columns]. SourceError if a quantized one is not finite."""
    kind = stored.tensor.type
    size = row_size(kind, columns)
    data = stored.file.read(stored.tensor.offset + start * size, rows * size)
    found = decode(kind, data, columns)
    if kind.name not in NATIVE and not np.isfinite(found).all():
        row = int(np.isfinite(found).all(axis=1).argmin())
        raise SourceError(
            f"has a scale of {kind.name} that is NaN or infinite in row {start + row:,}.", file=stored.file.path, tensor=stored.name, hint=DAMAGED
        )
    return found


def logarithms(decays: Floats) -> Floats:
    """What -exp(x) made the decays of, in float32: of the numbers that give them exactly a bfloat16 one if there is one, else the nearest."""
    with np.errstate(all="ignore"):
        near: Floats = np.log(-decays.astype(np.float64)).astype(np.float32)
        found: Floats = near.copy()
        open_ = np.ones(found.shape, bool)
        for made in bfloat16_values(bfloat16_bits(near)), *_neighbours(near):
            fits = open_ & ((-np.exp(made.astype(np.float64))).astype(np.float32) == decays)
            found[fits] = made[fits]
            open_ &= ~fits
    return found


def _neighbours(near: Floats) -> Iterator[Floats]:
    yield near
    for units in UNITS:
        yield (near.view(np.int32) + np.int32(units)).view(np.float32)
        yield near + np.float32(units) * STEP


def narrow(wide: Floats, out: NDArray[np.generic]) -> None:
    """float32 into `out` (bfloat16 as bits in uint16), to the nearest, ties to even."""
    if out.dtype == np.uint16:
        out[...] = bfloat16_bits(wide)
    else:
        with np.errstate(over="ignore"):
            out[...] = wide


def bfloat16_bits(wide: Floats) -> NDArray[np.uint16]:
    """Rounded to nearest, ties to even; NaN stays NaN."""
    bits = wide.view(np.uint32)
    rounded: NDArray[np.uint16] = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    nan = np.isnan(wide)
    if nan.any():
        rounded[nan] = (bits[nan] >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return rounded


@dataclass(frozen=True)
class StoredBlocks:
    """A stored tensor as its bytes, row by row (of one axis value by value, of four by the last), for a target that stores the same.

    Scales that mean nothing are errors all the same.
    """

    stored: StoredTensor
    dtype: DType = BY_NAME["uint8"]

    @property
    def shape(self) -> tuple[int, ...]:
        tensor = self.stored.tensor
        ne = trimmed(tensor.ne)
        size = row_size(tensor.type, ne[0] if 1 < len(ne) < 4 else math.prod(ne[:3]) if len(ne) > 1 else 1)
        return tensor.size // size, size

    @property
    def place(self) -> tuple[int, int]:
        return self.stored.place

    def read_into(self, start: int, out: memoryview) -> None:
        kind, size = self.stored.tensor.type, self.shape[1]
        self.stored.file.read_into(self.stored.tensor.offset + start * size, out)
        blocks = np.frombuffer(out, np.uint8).reshape(-1, kind.size)
        for at in SCALES.get(kind.name, ()) if kind.block > 1 else ():
            wrong = (blocks[:, at + 1] & 0x7C) == 0x7C
            if wrong.any():
                row = start + int(wrong.argmax()) * kind.size // size
                what = f"has a scale of {kind.name} that is NaN or infinite in row {row:,}."
                raise SourceError(what, file=self.stored.file.path, tensor=self.stored.name, hint=DAMAGED)


def trimmed(ne: Sequence[int]) -> tuple[int, ...]:
    """Without axes of 1 at the end, which files may have or not."""
    rank = max((n for n, size in enumerate(ne, 1) if size > 1), default=1)
    return tuple(ne[:rank])


def stored_as(readers: Sequence[object], name: str) -> StoredTensor | None:
    """The stored tensor `name` that all these readers read from, if there is one."""
    found = {id(stretch.stored): stretch.stored for reader in readers if isinstance(reader, GgufRows) for stretch in reader.stretches}
    named = [stored for stored in found.values() if stored.name == name]
    whole = len(named) == 1 and all(isinstance(r, GgufRows) and any(s.stored is named[0] for s in r.stretches) for r in readers)
    return named[0] if whole else None
