"""Half-precision tensors read as float32, where the table asks for it: every bfloat16 and float16 value is a float32 value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glmconv.codecs.codec import bfloat16_values
from glmconv.dtypes import DType
from glmconv.formats.format import RowReader, row_size


@dataclass(frozen=True)
class Widened:
    """A stored bfloat16 or float16 tensor as its canonical float32."""

    stored: RowReader
    dtype: DType

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stored.shape

    @property
    def place(self) -> tuple[int, int]:
        return self.stored.place

    def read_into(self, start: int, out: memoryview) -> None:
        rows = len(out) // row_size(self.shape, self.dtype)
        narrow = np.empty(rows * row_size(self.shape, self.stored.dtype), np.uint8)
        self.stored.read_into(start, narrow.data)
        wide = np.frombuffer(out, np.uint32)
        if self.stored.dtype.name == "bfloat16":
            np.left_shift(narrow.view("<u2"), 16, out=wide, dtype=np.uint32)
        else:
            wide[:] = narrow.view("<f2").astype("<f4").view(np.uint32)


def floats(reader: RowReader, start: int, rows: int) -> NDArray[np.float32]:
    """Rows of a bfloat16, float16 or float32 tensor as float32 [rows, columns]."""
    raw = np.empty(rows * row_size(reader.shape, reader.dtype), np.uint8)
    reader.read_into(start, raw.data)
    if reader.dtype.name == "bfloat16":
        wide: NDArray[np.float32] = bfloat16_values(raw.view("<u2"))
    else:
        wide = raw.view("<f2" if reader.dtype.name == "float16" else "<f4").astype(np.float32)
    return wide.reshape(rows, -1)
