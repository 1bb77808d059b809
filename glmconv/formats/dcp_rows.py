"""Rows of a canonical tensor out of DCP chunks: any tiling of any Megatron run, read by byte ranges."""

from __future__ import annotations

import bisect
import itertools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from glmconv.dtypes import DType
from glmconv.engine.inputs import InputFile
from glmconv.errors import SourceError
from glmconv.formats.dcp import Chunk, StoredTensor
from glmconv.formats.torch_zip import read_tensor_blob

SCRATCH = 4 << 20


@dataclass
class Blob:
    """One stored chunk: where its elements begin is found in its own zip when it is first read."""

    chunk: Chunk
    dtype: DType
    file: InputFile
    number: int
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    begin: int = -1

    def payload(self) -> int:
        """Offset of the chunk's first element in its file. SourceError if the blob is no such tensor."""
        with self.lock:
            if self.begin < 0:
                name = self.chunk.relative_path
                blob = read_tensor_blob(lambda at, size: self.file.read(self.chunk.offset + at, size), self.chunk.length, file=name)
                if blob.dtype != self.dtype or tuple(blob.shape) != tuple(self.chunk.sizes):
                    raise SourceError(
                        f"holds a {blob.dtype} {list(blob.shape)} where .metadata says {self.dtype} {list(self.chunk.sizes)}.",
                        file=name, offset=self.chunk.offset,
                    )  # fmt: skip
                self.begin = self.chunk.offset + blob.payload_offset
            return self.begin


class PlainBlob(Blob):
    """A chunk whose elements lie in its file as they are, without a container."""

    def payload(self) -> int:
        return self.chunk.offset


@dataclass(frozen=True, slots=True)
class Box:
    """A contiguous run of a blob as a rectangle of the tensor: `rows` x `columns` elements from (row, column), `at` elements into the blob."""

    row: int
    rows: int
    column: int
    columns: int
    blob: Blob
    at: int


class Boxes:
    """A stored tensor as a matrix [rows, columns], whatever its rank: the first axes (layers, experts) are counted through.

    `tail` is the shape of what a row holds: nothing, the columns, or a convolution's kernel, which no trainer cuts. `kind` is how chunks are stored.
    """

    def __init__(self, stored: StoredTensor, tail: Sequence[int], files: dict[str, tuple[InputFile, int]], kind: type[Blob] = Blob) -> None:
        self.columns = math.prod(tail)
        self.itemsize = stored.dtype.itemsize
        boxes = []
        for chunk in stored.chunks:
            file, number = files[chunk.relative_path]
            shape, offsets, sizes = (list(axes) for axes in (stored.shape, chunk.offsets, chunk.sizes))
            if (inner := len(tail) - 1) > 0:
                if sizes[-inner:] != shape[-inner:]:
                    raise SourceError(f"has a chunk {sizes} of {shape}, cut across a kernel.", file=chunk.relative_path)
                kernel = math.prod(shape[-inner:])
                shape, offsets, sizes = ([*axes[: -inner - 1], axes[-inner - 1] * kernel] for axes in (shape, offsets, sizes))
            boxes += list(_boxes(shape, self.columns, offsets, sizes, kind(chunk, stored.dtype, file, number)))
        self.boxes = sorted(boxes, key=lambda box: (box.row, box.column))
        self.tallest = max((box.rows for box in self.boxes), default=0)
        self.rows = [box.row for box in self.boxes]

    def covering(self, start: int, stop: int) -> list[Box]:
        """The boxes that touch rows start..stop."""
        first = bisect.bisect_right(self.rows, start - self.tallest)
        last = bisect.bisect_left(self.rows, stop)
        return [box for box in self.boxes[first:last] if box.row + box.rows > start]

    def read_into(self, start: int, out: memoryview) -> None:
        """Rows from `start` on, as many as `out` holds."""
        width = self.columns * self.itemsize
        stop = start + len(out) // width
        for box in self.covering(start, stop):
            low, high = max(start, box.row), min(stop, box.row + box.rows)
            begin = box.blob.payload() + (box.at + (low - box.row) * box.columns) * self.itemsize
            if box.columns == self.columns:
                box.blob.file.read_into(begin, out[(low - start) * width : (high - start) * width])
            else:
                self._scatter(box, begin, low - start, high - start, out)

    def _scatter(self, box: Box, begin: int, low: int, high: int, out: memoryview) -> None:
        """Columns of a tensor that was cut between ranks: a block of the box's rows is read whole, then laid between the others' columns."""
        part, width = box.columns * self.itemsize, self.columns * self.itemsize
        target = np.frombuffer(out, np.uint8).reshape(-1, width)[:, box.column * self.itemsize :][:, :part]
        step = max(1, SCRATCH // part)
        scratch = np.empty(min(step, high - low) * part, np.uint8)
        for row in range(low, high, step):
            count = min(step, high - row)
            block = scratch[: count * part]
            box.blob.file.read_into(begin + (row - low) * part, block.data)
            target[row : row + count] = block.reshape(count, part)


def _boxes(full: list[int], columns: int, offsets: list[int], sizes: list[int], blob: Blob) -> list[Box]:
    """The chunk's rectangles. `columns` is 1 (the last axis is rows) or the size of the last axis."""
    if columns == 1 and (not full or full[-1] != 1):
        offsets, sizes, full = [*offsets, 0], [*sizes, 1], [*full, 1]
    *outer, row_axis, column_axis = range(len(full)) if len(full) > 1 else (None, 0)
    if row_axis is None:
        return [Box(0, 1, offsets[0], sizes[0], blob, 0)]
    made = []
    for n, index in enumerate(itertools.product(*(range(offsets[a], offsets[a] + sizes[a]) for a in outer))):
        row = 0
        for axis, i in zip(outer, index, strict=True):
            row = row * full[axis] + i
        made.append(
            Box(row * full[row_axis] + offsets[row_axis], sizes[row_axis], offsets[column_axis], sizes[column_axis], blob,
                n * sizes[row_axis] * sizes[column_axis])
        )  # fmt: skip
    return made


@dataclass(frozen=True)
class Stretch:
    """`rows` canonical rows from row `source` lie from row `target` of `boxes`."""

    source: int
    target: int
    rows: int
    boxes: Boxes


@dataclass(frozen=True)
class ChunkedRows:
    """A canonical tensor read out of one or more Megatron tensors. `stretches` are sorted by source and cover every row once."""

    shape: tuple[int, ...]
    dtype: DType
    stretches: tuple[Stretch, ...]

    @property
    def place(self) -> tuple[int, int]:
        first = self.stretches[0]
        box = next(iter(first.boxes.covering(first.target, first.target + 1)))
        return box.blob.number, box.blob.chunk.offset

    def read_into(self, start: int, out: memoryview) -> None:
        width = self.stretches[0].boxes.columns * self.dtype.itemsize
        stop = start + len(out) // width
        first = bisect.bisect_right(self.stretches, start, key=lambda s: s.source) - 1
        for stretch in self.stretches[first:]:
            if stretch.source >= stop:
                break
            low, high = max(start, stretch.source), min(stop, stretch.source + stretch.rows)
            stretch.boxes.read_into(stretch.target + low - stretch.source, out[(low - start) * width : (high - start) * width])
