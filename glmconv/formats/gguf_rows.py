"""Rows of canonical tensors that a GGUF file stores otherwise: a matrix transposed, a decay as llama.cpp computes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from glmconv.dtypes import BY_NAME, DType
from glmconv.formats.format import RowReader, row_size

TURNED = "turned:"  # turned:FIRST:ROWS:NAME is a matrix, ROWS rows of a canonical tensor from FIRST on, transposed
DECAY = "decay:"  # -exp(x) of a canonical tensor, in float32


def turned(name: str, first: int, rows: int) -> str:
    return f"{TURNED}{first}:{rows}:{name}"


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
        rows = len(out) // row_size(self.shape, self.dtype)
        stored = np.empty(rows * row_size(self.shape, self.stored.dtype), np.uint8)
        self.stored.read_into(start, stored.data)
        if self.stored.dtype.name == "bfloat16":
            values = (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = stored.view({"float16": "<f2", "float32": "<f4"}[self.stored.dtype.name]).astype(np.float32)
        np.frombuffer(out, np.float32)[:] = -np.exp(values.astype(np.float64))


def gguf_derived(tensors: Mapping[str, RowReader], name: str) -> RowReader | None:
    """The reader that a name with one of the two prefixes stands for; None if it has none."""
    if name.startswith(TURNED):
        first, rows, name = name.removeprefix(TURNED).split(":", 2)
        return Turned(tensors[name], int(first), int(rows))
    if name.startswith(DECAY):
        return Decay(tensors[name.removeprefix(DECAY)])
    return None
