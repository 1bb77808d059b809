"""A tensor of a GGUF file as the engine's pieces: the canonical rows that it is made of, how they are encoded, and the padding behind it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from glmconv.codecs.ggml import GgmlEncoder, GgmlType, row_size
from glmconv.dtypes import BY_NAME, DType
from glmconv.engine.plan import Piece, Run
from glmconv.formats.coded import CodedRows
from glmconv.formats.format import RowReader
from glmconv.formats.gguf_header import padded
from glmconv.formats.gguf_options import GgufOptions
from glmconv.formats.gguf_rows import AS_STORED, DECAY, FLOAT32, frame_of, turned
from glmconv.formats.gguf_stored import GgufRows, stored_as
from glmconv.formats.gguf_tensors import GGUFTensor, Transform

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SECTION = 64 << 20  # bytes: what one worker writes at a time, and what a stopped run does again


def stored(tensor: GGUFTensor, kind: GgmlType, readers: Mapping[str, RowReader], told: GgufOptions) -> Iterator[Piece]:
    """The tensor's pieces, one but for tensors above `SECTION` bytes, and its padding. What a GGUF source stores in this type passes as it is."""
    columns, rows = tensor.ne[0], math.prod(tensor.ne[1:])
    own = [readers[run.tensor] for run in tensor.runs]
    wide = any(isinstance(reader, GgufRows) or (told.quantize_from == "float32" and isinstance(reader, CodedRows)) for reader in own)
    float32 = wide or tensor.transform is Transform.NEGATIVE_EXPONENTIAL
    source: DType | None = BY_NAME["float32"] if float32 else own[0].dtype
    runs = [engine_run(tensor, run.tensor, run.first, run.rows, readers, FLOAT32 if wide else "") for run in tensor.runs]
    if len(tensor.ne) == 1:
        columns, rows = 1, tensor.ne[0]
    elif len(tensor.ne) == 4:  # a convolution, never in blocks: a canonical row is all that makes one output
        columns, rows = math.prod(tensor.ne[:3]), tensor.ne[3]
    dtype = FLOATS.get(kind.name, "uint8")
    already = stored_as(own, tensor.name)
    if already and already.tensor.type == kind:  # as llama-quantize does
        runs, source = [Run(f"{AS_STORED}{tensor.name}:{tensor.runs[0].tensor}", 0, rows)], None
    importance = told.importance.of(tensor.name, math.prod(tensor.ne[2:]), columns) if told.importance and kind.name not in FLOATS else None
    size = row_size(kind, columns)
    for first, count in cut(rows, tensor.ne[1] if len(tensor.ne) == 3 else 1, size):
        whole = count == rows
        same = source is None or dtype == source.name
        encoder = None if source is None or same else GgmlEncoder(kind, (rows, columns), source, importance, kind.name not in FLOATS, first)
        name = tensor.name if whole else f"{tensor.name}[{first}:{first + count}]"
        shape = tensor.ne[::-1] if whole and kind.name in FLOATS else (count, columns if kind.name in FLOATS else size)
        yield Piece(name, dtype, shape, count * size, tuple(between(runs, first, count)), encoder=encoder)
    if gap := padded(rows * size) - rows * size:
        yield Piece(f"padding of {tensor.name}", "uint8", (gap,), gap, literal=bytes(gap), digested=False)


def engine_run(tensor: GGUFTensor, name: str, first: int, rows: int, readers: Mapping[str, RowReader], prefix: str) -> Run:
    """Rows as the engine asks for them: of a matrix that is transposed its columns."""
    if tensor.transform is Transform.TRANSPOSED:
        return Run(turned(prefix + name, first, rows), 0, readers[name].shape[1])
    if tensor.transform is Transform.FRAME:
        return Run(frame_of(prefix + name, tensor.frame), first, rows)
    return Run((DECAY if tensor.transform is Transform.NEGATIVE_EXPONENTIAL else prefix) + name, first, rows)


def cut(rows: int, unit: int, size: int) -> Iterator[tuple[int, int]]:
    """(first row, rows) of each part of a tensor with rows of `size` bytes: at most `SECTION` bytes, if possible, and whole matrices of a stack."""
    most = max(unit, SECTION // size // unit * unit)
    for first in range(0, rows, most):
        yield first, min(most, rows - first)


def between(runs: Sequence[Run], first: int, rows: int) -> Iterator[Run]:
    """The parts of `runs`, one behind the other, that are `rows` rows from row `first` on."""
    at = 0
    for run in runs:
        begin, end = max(first, at), min(first + rows, at + run.rows)
        if begin < end:
            yield Run(run.tensor, run.start + begin - at, end - begin)
        at += run.rows
