"""Rows of the source into a stream: as they are, or encoded on the way."""

from __future__ import annotations

from glmconv.dtypes import BY_NAME
from glmconv.encoding import Encoding
from glmconv.engine.plan import Piece, RowSource, Run
from glmconv.engine.stream import Buffer, Stream
from glmconv.errors import SourceError
from glmconv.kernels.nonfinite import first_nonfinite


def copy_rows(piece: Piece, source: RowSource, stream: Stream, buffer: Buffer, nonfinite: dict[str, int]) -> None:
    """The piece's runs, as many whole rows at a time as the buffer has room for. Runs that are small share one fill of it."""
    for run in piece.runs:
        row = source.row_size(run.tensor)
        done = 0 if row else run.rows
        while done < run.rows:
            space = stream.space(row)
            rows = min(len(space) // row, run.rows - done)
            part = space[: rows * row]
            read(source, run.tensor, run.start + done, part)
            if (found := first_nonfinite(part, piece.dtype)) is not None:
                nonfinite.setdefault(run.tensor, run.start + done + found * BY_NAME[piece.dtype].itemsize // row)
            for alias in piece.equals:
                compare(source, alias, run.tensor, run.start + done, part, buffer)
            stream.took(len(part))
            done += rows


def encode_rows(piece: Piece, source: RowSource, stream: Stream, buffer: Buffer, nonfinite: dict[str, int]) -> Encoding:
    """The rows of the piece's runs through its encoder: part 0 into the stream if it goes out as it is made. SourceError names NaN and Inf.

    All runs have rows of one size, and of several each is a multiple of the encoder's unit.
    """
    encoder = piece.encoder
    assert encoder is not None
    row, out_row = source.row_size(piece.runs[0].tensor), encoder.row_bytes
    batch = max(1, len(buffer.view) // max(row, out_row) // encoder.unit) * encoder.unit
    buffer.call_in()
    encoding = encoder.begin(buffer.lend)

    def judge(at: int, run: Run, start: int) -> None:
        if at >= 0:
            line, column = divmod(at, piece.columns)
            if encoder.strict:
                raise SourceError(
                    f"is NaN or Inf in row {run.start + start + line:,}, column {column:,}; it cannot be quantized.", tensor=run.tensor,
                    hint="Mend the checkpoint, or pass --nonfinite keep.",
                )  # fmt: skip
            nonfinite.setdefault(run.tensor, run.start + start + line)

    for look in (True, False) if encoder.looks else (False,):
        done = 0
        for run in piece.runs:
            for start in range(0, run.rows, batch):
                rows = min(batch, run.rows - start)
                values = buffer.second(rows * row)
                read(source, run.tensor, run.start + start, values)
                if look:
                    judge(encoding.look(values), run, start)
                    continue
                out = stream.space(rows * out_row)[: rows * out_row] if out_row else memoryview(b"")
                judge(encoding.encode(done + start, values, out), run, start)
                stream.took(len(out))
            done += run.rows
    return encoding


def read(source: RowSource, tensor: str, start: int, out: memoryview) -> None:
    try:
        source.read_into(tensor, start, out)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}.", tensor=tensor) from error


def compare(source: RowSource, alias: str, tensor: str, start: int, rows: memoryview, buffer: Buffer) -> None:
    """SourceError if the alias differs from `tensor` in these rows: the output stores only one of them."""
    if source.row_size(alias) != source.row_size(tensor):
        raise SourceError(f"must repeat {tensor}, but its rows have another size.", tensor=alias)
    other = buffer.second(len(rows))
    read(source, alias, start, other)
    import numpy

    if not numpy.array_equal(numpy.frombuffer(rows, numpy.uint8), numpy.frombuffer(other, numpy.uint8)):
        raise SourceError(f"must repeat {tensor}, but differs from it near row {start}.", tensor=alias, hint="The output would lose one of them.")
