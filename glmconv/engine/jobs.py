"""One job writes one output file, or a section of one: its pieces stream through one buffer, hashed while they are hot in the cache, written once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from glmconv.encoding import Encoding
from glmconv.engine.commit import Destination, hash_of
from glmconv.engine.journal import Record, StoredTensor, load_record
from glmconv.engine.plan import OutputFile, RowSource, Stretch, placed
from glmconv.engine.rows import copy_rows, encode_rows
from glmconv.engine.stream import Buffer, Stream
from glmconv.errors import GlmconvError, SourceError


class Work(Protocol):
    """What a worker takes from the queue."""

    @property
    def destination(self) -> Destination: ...
    @property
    def part(self) -> Stretch: ...
    @property
    def file(self) -> OutputFile: ...
    def is_done(self, buffer: Buffer, check: Callable[[], None], *, hashed: bool = True) -> bool: ...
    def write(
        self, source: RowSource, buffer: Buffer, wrote: Callable[[int], None], check: Callable[[], None], nonfinite: dict[str, int]
    ) -> None: ...


@dataclass
class Told:
    """How many bytes a run was told that they went out. They are taken back if they must go out again."""

    wrote: Callable[[int], None]
    check: Callable[[], None]
    out: int = 0

    def __call__(self, size: int) -> None:
        self.check()
        self.out += size
        self.wrote(size)

    def take_back(self) -> None:
        if self.out:
            self.wrote(-self.out)
            self.out = 0


@dataclass(frozen=True)
class Job:
    """One output file of one destination."""

    destination: Destination
    file: OutputFile

    @property
    def part(self) -> Stretch:
        return self.file

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
        told = Told(wrote, check)

        def fill(fd: int) -> Record:
            told.take_back()
            stream = Stream(to.disk, fd, buffer, told)
            tensors = fill_part(file, source, stream, buffer, nonfinite)
            return Record(to.plan.id, file.name, stream.at, stream.finish(), tensors)

        record = to.staged(staged, fill)
        source.check_unchanged()
        check()
        to.commit(staged, file.name, record.sha256, ours=lambda: to.has_record(file.name))
        to.publish(record)
        to.drop(staged)


def fill_part(part: Stretch, source: RowSource, stream: Stream, buffer: Buffer, nonfinite: dict[str, int]) -> dict[str, StoredTensor]:
    """Header and pieces of a file, or of a section of one, into `stream`; what is known of its tensors then."""
    stream.put(part.header)
    tensors = {}
    encoding: Encoding | None = None
    for at, piece in placed(part):
        before = piece.frame.before() if piece.frame else b""
        stream.put(before)
        stream.begin(piece)
        stream.put(piece.literal)
        if piece.encoder is None:
            copy_rows(piece, source, stream, buffer, nonfinite)
        else:
            if piece.part == 0:
                encoding = encode_rows(piece, source, stream, buffer, nonfinite)
            if encoding is not None and (piece.part or not piece.encoder.row_bytes):
                stream.put(encoding.part(piece.part))
        digest, crc = stream.end()
        if piece.frame:
            stream.put(piece.frame.after(crc))
        if stream.at != at + piece.size:
            raise GlmconvError(f"came to {stream.at - at:,} bytes, the plan says {piece.size:,}.", file=part.name, tensor=piece.name)
        if piece.digested:
            tensors[piece.name] = StoredTensor(piece.dtype, piece.shape, digest, at + len(before))
    return tensors
