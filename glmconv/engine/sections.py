"""A file that is too large for one job, or is to be named last: its sections are written in place into one staged file, by whoever is at work.

    staging/A.gguf.shared.part             all of it, its bytes reserved; sections are written and made durable one by one
    journal/A.gguf%2F%2F7.json             the record of a section

A section's bytes are a function of the plan, so that two runs which write the same one do not disturb each other. The file gets its name when all
sections have a record, and after every byte of it was read back and held against them.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from glmconv.engine.commit import Destination, hash_of
from glmconv.engine.files import Disk
from glmconv.engine.jobs import Job, Told, fill_part
from glmconv.engine.journal import Record, StoredTensor, load_record
from glmconv.engine.plan import OutputFile, RowSource, Section
from glmconv.engine.stream import Buffer, Stream
from glmconv.errors import OutputError, SourceError

Check = Callable[[], None]


@dataclass
class SharedFile:
    """A file in sections, as one process sees it. Its digest is computed behind the workers, as far as sections are done one after the other."""

    destination: Destination
    file: OutputFile
    done: set[int] = field(default_factory=set)  # sections that are known to be
    records: list[Record] = field(default_factory=list)  # of the sections that the digest has
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)
    following: threading.Lock = field(default_factory=threading.Lock)
    whole: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_named(self) -> bool:
        """Whether it was finished once and is there. Its bytes are another question."""
        to, final = self.destination, self.destination.layout.final(self.file.name)
        return to.has_record(self.file.name) and to.exists(final) and to.disk.status(final).size == self.file.size

    def follow(self, buffer: Buffer, check: Check) -> None:
        """Take what is done into the digest, unless another worker is at it."""
        if self.following.acquire(blocking=False):
            try:
                while len(self.records) in self.done:
                    self._take(buffer, check)
            finally:
                self.following.release()

    def finish(self, buffer: Buffer, check: Check) -> None:
        """Give the file its name, if it has not got it, durably. OutputError if a section is not what its record says."""
        to, name = self.destination, self.file.name
        staged = to.layout.shared(name)
        with self.following:
            if not self.is_named:
                try:
                    while len(self.records) < len(self.file.sections):
                        self._take(buffer, check)
                    self._commit()
                except (OutputError, FileNotFoundError):
                    if not self.is_named:  # else an equal run has finished, and taken the staged file away
                        raise
        to.drop(staged)

    def _commit(self) -> None:
        to, name = self.destination, self.file.name
        tensors: dict[str, StoredTensor] = {}
        for record in self.records:
            tensors.update(record.tensors)
        digest = self.digest.hexdigest()
        to.commit(to.layout.shared(name), name, digest, ours=lambda: to.has_record(name))
        to.publish(Record(to.plan.id, name, self.file.size, digest, tensors))

    def _take(self, buffer: Buffer, check: Check) -> None:
        """The next section into the digest, read back. OutputError if it differs from its record, or has none."""
        to, section = self.destination, self.file.sections[len(self.records)]
        again = "Run the same command again."
        record = load_record(to.disk, to.layout, section)
        if record is None:
            raise OutputError("has a section without a record.", file=to.layout.final(self.file.name), hint=again)
        so_far = self.digest.copy()
        if digest_of(to.disk, to.layout.shared(self.file.name), section, buffer, check, so_far) != record.sha256:
            raise OutputError(f"has changed since it was written, behind byte {section.start:,}.", file=to.layout.shared(self.file.name), hint=again)
        self.digest = so_far
        self.records.append(record)


def digest_of(disk: Disk, path: Path, section: Section, buffer: Buffer, check: Check, more: hashlib._Hash | None = None) -> str:
    """sha256 of a section as it lies in a file; `more` takes the bytes too. OSError as the disk says."""
    fd = disk.open(path)
    try:
        return hash_of(disk, fd, buffer.view, check, start=section.start, size=section.size, more=more)
    finally:
        with contextlib.suppress(OSError):
            disk.close(fd)


@dataclass(frozen=True)
class SectionJob:
    """One section of a file."""

    shared: SharedFile
    part: Section
    number: int

    @property
    def destination(self) -> Destination:
        return self.shared.destination

    @property
    def file(self) -> OutputFile:
        return self.shared.file

    def is_done(self, buffer: Buffer, check: Check, *, hashed: bool = True) -> bool:
        """Whether the journal has it and its bytes still are what the record says: in the final file if there is one, else in the staged one."""
        to = self.destination
        named = self.shared.is_named
        path = to.layout.final(self.file.name) if named else to.layout.shared(self.file.name)
        try:
            record = load_record(to.disk, to.layout, self.part)
            if record is None or (hashed and digest_of(to.disk, path, self.part, buffer, check) != record.sha256):
                return False
            if not hashed and not named and to.disk.status(path).size != self.file.size:
                return False
            to.disk.sync_folder(path.parent)
        except (SourceError, OSError):  # unreadable is not done: it is written again
            return False
        if not named:
            self._follow(buffer, check)
        return True

    def write(self, source: RowSource, buffer: Buffer, wrote: Callable[[int], None], check: Check, nonfinite: dict[str, int]) -> None:
        """Retract, write, sync, fence, publish. A file that was finished once and is damaged since is written whole: it keeps its name until then."""
        to, file = self.destination, self.file
        if self.shared.is_named:
            with self.shared.whole:
                job = Job(to, file)
                if not job.is_done(buffer, check):
                    job.write(source, buffer, lambda count: check(), check, nonfinite)
            wrote(self.part.size)
            return
        told = Told(wrote, check)

        def fill(fd: int) -> Record:
            told.take_back()
            stream = Stream(to.disk, fd, buffer, told, self.part.start)
            tensors = fill_part(self.part, source, stream, buffer, nonfinite)
            return Record(to.plan.id, self.part.name, stream.at - self.part.start, stream.finish(), tensors)

        if to.has_record(self.part.name):  # an equal run was faster, or what it wrote is damaged since
            if self.is_done(buffer, check):
                wrote(self.part.size)
                return
            to.retract(self.part.name)
        record = to.in_place(file.name, file.size, fill)
        source.check_unchanged()
        check()
        to.fence()
        to.publish(record)
        self._follow(buffer, check)

    def _follow(self, buffer: Buffer, check: Check) -> None:
        self.shared.done.add(self.number)
        with contextlib.suppress(OutputError, FileNotFoundError):  # `finish` looks again, and says what is wrong
            self.shared.follow(buffer, check)
