"""One job writes one output file: header and pieces stream through one buffer, hashed while they are hot in the cache, written once."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from glmconv.dtypes import BY_NAME
from glmconv.engine.commit import Destination, hash_of, write_all
from glmconv.engine.files import Disk
from glmconv.engine.journal import Record, StoredTensor, load_record
from glmconv.engine.plan import OutputFile, Piece, RowSource
from glmconv.errors import GlmconvError, SourceError
from glmconv.kernels.nonfinite import first_nonfinite

PAGE = 4096


class Buffer:
    """One worker's memory: page-aligned, reused for every job. It grows only for a row that is larger than itself."""

    def __init__(self, size: int) -> None:
        self.view = aligned(size)
        self._second: memoryview | None = None

    def grow(self, size: int) -> None:
        self.view = aligned(size)

    def second(self, size: int) -> memoryview:
        """`size` bytes beside the buffer, for rows that are only compared."""
        if self._second is None or len(self._second) < size:
            self._second = aligned(max(size, len(self.view)))
        return self._second[:size]


def aligned(size: int) -> memoryview:
    """`size` bytes, rounded up to pages, that begin at a page."""
    size = max(PAGE, -(-size // PAGE) * PAGE)
    memory = bytearray(size + PAGE)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    return memoryview(memory)[skip : skip + size]


class Stream:
    """Bytes on their way into one staged file: gathered in the buffer, so that thousands of small pieces are one write."""

    def __init__(self, disk: Disk, fd: int, buffer: Buffer, wrote: Callable[[int], None]) -> None:
        self._disk, self._fd, self._buffer, self._wrote = disk, fd, buffer, wrote
        self._file = hashlib.sha256()
        self._piece: hashlib._Hash | None = None
        self._crc: int | None = None
        self._filled = self._absorbed = self._offset = 0

    @property
    def size(self) -> int:
        """Bytes so far, the buffered ones included."""
        return self._offset + self._filled

    def begin(self, piece: Piece) -> None:
        """What follows is the piece's payload."""
        self._absorbed = self._filled
        self._piece = hashlib.sha256() if piece.digested else None
        self._crc = 0 if piece.frame else None

    def end(self) -> tuple[str, int]:
        """The payload's sha256 ("" if not asked for) and CRC-32 (0 if not asked for)."""
        self._absorb()
        result = (self._piece.hexdigest() if self._piece else "", self._crc or 0)
        self._piece = self._crc = None
        return result

    def put(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            space = self.space(1)
            count = min(len(space), len(view))
            space[:count] = view[:count]
            self.took(count)
            view = view[count:]

    def space(self, unit: int) -> memoryview:
        """Free room in the buffer, at least `unit` bytes."""
        if len(self._buffer.view) - self._filled < unit:
            self.flush()
            if len(self._buffer.view) < unit:
                self._buffer.grow(unit)
        return self._buffer.view[self._filled :]

    def took(self, count: int) -> None:
        """`count` bytes of the last `space` are filled."""
        self._filled += count

    def flush(self) -> None:
        self._absorb()
        data = self._buffer.view[: self._filled]
        self._file.update(data)
        self._offset = write_all(self._disk, self._fd, data, self._offset)
        self._wrote(self._filled)
        self._filled = self._absorbed = 0

    def finish(self) -> str:
        """Write the rest; the whole file's sha256."""
        self.flush()
        return self._file.hexdigest()

    def _absorb(self) -> None:
        fresh = self._buffer.view[self._absorbed : self._filled]
        if self._piece:
            self._piece.update(fresh)
        if self._crc is not None:
            self._crc = zlib.crc32(fresh, self._crc)
        self._absorbed = self._filled


@dataclass(frozen=True)
class Job:
    """One output file of one destination."""

    number: int
    destination: Destination
    file: OutputFile

    def is_done(self, buffer: Buffer, check: Callable[[], None], *, hashed: bool = True) -> bool:
        """Whether the journal has it and the file still is what the record says, durably: by size, and by sha256 if `hashed`."""
        disk, layout = self.destination.disk, self.destination.layout
        try:
            record = load_record(disk, layout, self.file)
            if record is None:
                return False
            fd = disk.open(layout.final(self.file.name))
        except (SourceError, OSError):  # unreadable is not done: it is written again
            return False
        try:
            if disk.status_of(fd).size != record.size or (hashed and hash_of(disk, fd, buffer.view, check) != record.sha256):
                return False
            disk.sync_folder(layout.final(self.file.name).parent)  # a killed run may have replaced a damaged file and not synced the name
            return True
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                disk.close(fd)

    def write(self, source: RowSource, buffer: Buffer, wrote: Callable[[int], None], check: Callable[[], None], nonfinite: dict[str, int]) -> None:
        """Write, sync, fence, commit, publish. `wrote` is told of bytes as they go out, and of minus as many if they must go out again.

        `nonfinite` gets each canonical tensor in which NaN or Inf went by, with the first row of it.
        """
        to, file = self.destination, self.file
        staged = to.layout.staged(file.name, to.run_id)
        out = 0

        def count(size: int) -> None:
            nonlocal out
            check()
            out += size
            wrote(size)

        def fill(fd: int) -> Record:
            nonlocal out
            if out:
                wrote(-out)
                out = 0
            return write_file(file, to, source, Stream(to.disk, fd, buffer, count), buffer, nonfinite)

        record = to.staged(staged, fill)
        source.check_unchanged()
        check()
        to.commit(staged, file.name, record.sha256, ours=lambda: to.has_record(file.name))
        to.publish(record)
        to.drop(staged)


def write_file(file: OutputFile, to: Destination, source: RowSource, stream: Stream, buffer: Buffer, nonfinite: dict[str, int]) -> Record:
    """Header and pieces of `file` into `stream`; the record of what was written."""
    stream.put(file.header)
    tensors = {}
    for at, piece in file.layout():
        before = piece.frame.before() if piece.frame else b""
        stream.put(before)
        stream.begin(piece)
        stream.put(piece.literal)
        copy_rows(piece, source, stream, buffer, nonfinite)
        digest, crc = stream.end()
        if piece.frame:
            stream.put(piece.frame.after(crc))
        if stream.size != at + piece.size:
            raise GlmconvError(f"came to {stream.size - at:,} bytes, the plan says {piece.size:,}.", file=file.name, tensor=piece.name)
        if piece.digested:
            tensors[piece.name] = StoredTensor(piece.dtype, piece.shape, digest, at + len(before))
    return Record(to.plan.id, file.name, stream.size, stream.finish(), tensors)


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
