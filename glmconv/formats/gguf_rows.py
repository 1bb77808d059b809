"""Rows of canonical tensors that a GGUF file stores otherwise: a matrix transposed, a decay as llama.cpp computes, a frame of a convolution,
a quantized weight before it is rounded to bf16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from glmconv.dtypes import BY_NAME, DType
from glmconv.formats.coded import CodedRows
from glmconv.formats.format import RowReader, row_size
from glmconv.formats.gguf_stored import GgufRows, StoredBlocks, stored_as
from glmconv.formats.widen import Widened, floats

TURNED = "turned:"  # turned:FIRST:ROWS:NAME is a matrix, ROWS rows of a canonical tensor from FIRST on, transposed
FLOAT32 = "float32:"  # of a quantized tensor what its codes say, before that is rounded; any other one widened
DECAY = "decay:"  # -exp(x) of a canonical tensor, in float32
AS_STORED = "stored:"  # stored:GGUF:NAME is the tensor of that name in the GGUF file that the canonical tensor is read from, byte by byte
FRAME = "frame:"  # frame:NUMBER:NAME is [out, in, height, width] of a canonical [out, in, frames, height, width]
STRIP = 1 << 20  # bytes of a convolution's rows that are held at a time, or one row


def turned(name: str, first: int, rows: int) -> str:
    return f"{TURNED}{first}:{rows}:{name}"


def frame_of(name: str, number: int) -> str:
    return f"{FRAME}{number}:{name}"


@dataclass(frozen=True)
class Turned:
    """`rows` rows of a matrix from `first` on, transposed: [columns, rows]. What is asked for is cut out of all of them."""

    stored: RowReader
    first: int
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape[1], self.rows

    @property
    def dtype(self) -> DType:
        return self.stored.dtype

    @property
    def place(self) -> tuple[int, int]:
        return self.stored.place

    def read_into(self, start: int, out: memoryview) -> None:
        size = self.dtype.itemsize
        matrix = np.empty((self.rows, self.stored.shape[1]), f"u{size}")
        self.stored.read_into(self.first, matrix.reshape(-1).view(np.uint8).data)
        wanted = np.frombuffer(out, f"u{size}").reshape(-1, self.rows)
        wanted[...] = matrix[:, start : start + len(wanted)].T


@dataclass(frozen=True)
class Decay:
    """-exp(x), rounded once to float32, so that every machine gives the same.

    llama.cpp's converter asks torch, which is one unit in the last place off for one value in a hundred, and not the same on each processor.
    """

    stored: RowReader
    dtype: DType = BY_NAME["float32"]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def place(self) -> tuple[int, int]:
        return self.stored.place

    def read_into(self, start: int, out: memoryview) -> None:
        values = floats(self.stored, start, len(out) // row_size(self.shape, self.dtype))
        np.frombuffer(out, np.float32)[:] = -np.exp(values.reshape(-1).astype(np.float64))


@dataclass(frozen=True)
class Frame:
    """One frame of a convolution [out, in, frames, height, width]: [out, in, height, width]."""

    stored: RowReader
    number: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.stored.shape[:2], *self.stored.shape[3:])

    @property
    def dtype(self) -> DType:
        return self.stored.dtype

    @property
    def place(self) -> tuple[int, int]:
        return self.stored.place

    def read_into(self, start: int, out: memoryview) -> None:
        wanted = _by_channel(out, self)
        rows = max(1, STRIP // row_size(self.stored.shape, self.dtype))
        for at in range(0, len(wanted), rows):
            part = wanted[at : at + rows]
            whole = np.empty((len(part), self.shape[1], self.stored.shape[2], part.shape[2]), np.uint8)
            self.stored.read_into(start + at, whole.reshape(-1).data)
            part[...] = whole[:, :, self.number]


@dataclass(frozen=True)
class Framed:
    """A convolution [out, in, frames, height, width] put together from one [out, in, height, width] for each frame: `Frame` read backwards."""

    frames: tuple[RowReader, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        one = self.frames[0].shape
        return (*one[:2], len(self.frames), *one[2:])

    @property
    def dtype(self) -> DType:
        return self.frames[0].dtype

    @property
    def place(self) -> tuple[int, int]:
        return self.frames[0].place

    def read_into(self, start: int, out: memoryview) -> None:
        one = self.frames[0]
        whole = np.frombuffer(out, np.uint8).reshape(-1, one.shape[1], len(self.frames), row_size(one.shape[1:], self.dtype))
        rows = max(1, STRIP // row_size(one.shape, self.dtype))
        for at in range(0, len(whole), rows):
            part = whole[at : at + rows]
            for number, frame in enumerate(self.frames):
                stored = np.empty((len(part), *whole.shape[1:2], whole.shape[3]), np.uint8)
                frame.read_into(start + at, stored.reshape(-1).data)
                part[:, :, number] = stored


def _by_channel(out: memoryview, reader: RowReader) -> np.ndarray:
    """Bytes of rows [out, in, height, width] as [out, in, bytes of one image]."""
    return np.frombuffer(out, np.uint8).reshape(-1, reader.shape[1], row_size(reader.shape[1:], reader.dtype))


def gguf_derived(tensors: Mapping[str, RowReader], name: str) -> RowReader | None:
    """The reader that a name with one of the prefixes stands for; None if it has none."""
    if name.startswith(TURNED):
        first, rows, name = name.removeprefix(TURNED).split(":", 2)
        return Turned(gguf_derived(tensors, name) or tensors[name], int(first), int(rows))
    if name.startswith(FLOAT32):
        reader, wide = tensors[name.removeprefix(FLOAT32)], BY_NAME["float32"]
        if isinstance(reader, CodedRows | GgufRows):
            return reader.widened()
        return reader if reader.dtype == wide else Widened(reader, wide)
    if name.startswith(DECAY):
        return Decay(tensors[name.removeprefix(DECAY)])
    if name.startswith(AS_STORED):
        stored, _, name = name.removeprefix(AS_STORED).partition(":")
        found = stored_as([tensors[name]], stored)
        return StoredBlocks(found) if found else None
    if name.startswith(FRAME):
        number, name = name.removeprefix(FRAME).split(":", 1)
        return Frame(gguf_derived(tensors, name) or tensors[name], int(number))
    return None
