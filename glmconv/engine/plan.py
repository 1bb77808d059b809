"""The plan: every output file, byte by byte, before one weight is read. Knows files and bytes, no format and no model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import ClassVar, Protocol

from glmconv.encoding import Encoder

PLAN_VERSION = 1


def canonical_json(value: object) -> bytes:
    """`value` as JSON with one spelling only: sorted keys, no blanks, ASCII."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Frame(Protocol):
    """The bytes that a container puts around one tensor's payload; their sizes are known when planned, their content may need its CRC-32."""

    @property
    def size_before(self) -> int: ...
    @property
    def size_after(self) -> int: ...
    def before(self) -> bytes: ...
    def after(self, crc32: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Run:
    """`rows` consecutive rows of the canonical tensor `tensor`, from row `start`. A one-dimensional tensor's rows are its elements."""

    tensor: str
    start: int
    rows: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One stored tensor, DCP chunk or object of an output file: `payload` bytes read from the source's `runs`, in this order.

    A piece without runs is `literal`: its bytes are known now. With an `encoder` the rows of its one run are encoded, and the pieces behind
    it with the same encoder and a `part` above 0 are the other parts that came of it. `equals` names canonical tensors that must repeat the
    runs' bits (aliases that the output does not store): they are read beside them and compared, because dropping an unequal one would lose data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    payload: int
    runs: tuple[Run, ...] = ()
    literal: bytes = b""
    frame: Frame | None = None
    equals: tuple[str, ...] = ()
    digested: bool = True  # listed among the manifest's tensors
    encoder: Encoder | None = None
    part: int = 0

    @property
    def columns(self) -> int:
        """Of the canonical tensor that an encoder takes."""
        return self.encoder.shape[-1] if self.encoder else self.shape[-1]

    @property
    def size(self) -> int:
        framed = self.frame.size_before + self.frame.size_after if self.frame else 0
        return self.payload + framed


class Stretch(Protocol):
    """Bytes that one job writes, one after another: a file, or a section of one."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int:
        """Its first byte's offset in the file."""

    @property
    def header(self) -> bytes: ...
    @property
    def pieces(self) -> tuple[Piece, ...]: ...
    @property
    def size(self) -> int: ...


def placed(part: Stretch) -> Iterator[tuple[int, Piece]]:
    """Each piece with the offset of its first byte in the file (its frame's, if it has one)."""
    at = part.start + len(part.header)
    for piece in part.pieces:
        yield at, piece
        at += piece.size


@dataclass(frozen=True)
class Section:
    """Consecutive pieces of a file that is too large for one job. The first section begins with the file's header. `name` is no file's."""

    name: str
    start: int
    header: bytes
    pieces: tuple[Piece, ...]

    @cached_property
    def size(self) -> int:
        return len(self.header) + sum(piece.size for piece in self.pieces)


@dataclass(frozen=True)
class OutputFile:
    """One file of the output: header, then the pieces one after another. `name` is relative, `/` separates one folder.

    One job writes it, or one each of its sections: `cuts` are the numbers of the pieces with which a section begins, the first left out.
    `last`: loaders look for this file first, so that it gets its name when all others have theirs.
    """

    name: str
    header: bytes
    pieces: tuple[Piece, ...]
    cuts: tuple[int, ...] = ()
    last: bool = False
    start: ClassVar[int] = 0

    @cached_property
    def size(self) -> int:
        return len(self.header) + sum(piece.size for piece in self.pieces)

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """None if the file is written and named at once."""
        if not self.cuts and not self.last:
            return ()
        found: list[Section] = []
        at = 0
        for number, (first, end) in enumerate(pairwise((0, *self.cuts, len(self.pieces)))):
            found.append(Section(f"{self.name}//{number}", at, b"" if number else self.header, self.pieces[first:end]))
            at += found[-1].size
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """Of the header and of what goes where; equal digests mean equal bytes from equal sources."""
        state = hashlib.sha256(self.header)
        for at, p in placed(self):
            runs = [[r.tensor, r.start, r.rows] for r in p.runs]
            made = [p.encoder.id, p.encoder.strict, p.part] if p.encoder else []
            frame = type(p.frame).__name__
            state.update(canonical_json([at, p.name, p.dtype, list(p.shape), p.payload, runs, sha256(p.literal), list(p.equals), frame, *made]))
        return state.hexdigest()


def in_sections(name: str, header: bytes, pieces: Sequence[Piece], size: int, *, last: bool = False) -> OutputFile:
    """A file in sections of about `size` bytes, as far as its pieces allow; whole if it is no larger. Pieces of one encoder stay together."""
    cuts: list[int] = []
    filled, begun = len(header), 0
    for number, piece in enumerate(pieces):
        if filled and filled + piece.size > size and piece.runs and number > begun:
            cuts.append(number)
            filled, begun = 0, number
        filled += piece.size
    return OutputFile(name, header, tuple(pieces), tuple(cuts), last)


@dataclass(frozen=True)
class SmallFile:
    """A file whose content is known when planned: an index, a config, a marker. Written after all output files, in the plan's order."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Plan:
    """All that decides an output's bytes. `options` holds every option that changes them; no path, host, time or worker count is in it."""

    to: str
    options: Mapping[str, object]
    source: Mapping[str, object]  # fingerprint: {"format", "files": {name: [size, header sha256]}, "commit"}
    files: tuple[OutputFile, ...]
    marks: tuple[SmallFile, ...] = ()  # small files in the order in which they become durable; loaders take the last ones for "done"
    notes: tuple[str, ...] = field(default=(), compare=False)

    @cached_property
    def document(self) -> dict[str, object]:
        return {
            "version": PLAN_VERSION,
            "to": self.to,
            "options": dict(self.options),
            "source": dict(self.source),
            "files": {f.name: [f.size, f.digest] for f in self.files},
            "marks": [[m.name, len(m.content), sha256(m.content)] for m in self.marks],
        }

    @cached_property
    def id(self) -> str:
        """sha256 of the plan's canonical JSON; names the claim, the journal and the manifest."""
        return sha256(canonical_json(self.document))

    @cached_property
    def size(self) -> int:
        return sum(f.size for f in self.files) + sum(len(m.content) for m in self.marks)


class RowSource(Protocol):
    """What the engine needs of a source: bytes of rows, and whether its files are still what they were."""

    def row_size(self, tensor: str) -> int:
        """Bytes of one row of the canonical tensor."""

    def read_into(self, tensor: str, start: int, out: memoryview) -> None:
        """Fill `out` (a whole number of rows) from row `start` on, in canonical dtype, little-endian, C order. Raises SourceError."""

    def place(self, tensor: str) -> tuple[int, int]:
        """Where its bytes begin: (number of the source file, offset). Jobs run in this order."""

    def check_unchanged(self) -> None:
        """Raise SourceError if a source file's size, mtime or inode is not what it was when opened."""


def by_source(parts: Sequence[Stretch], source: RowSource) -> list[int]:
    """The numbers of files or sections, in the order in which their input lies in the source; sections of one file stay in the file's order."""
    places = [place_of(part, source) for part in parts]
    for number in reversed(range(len(parts) - 1)):
        if parts[number + 1].start:  # the next section of the same file: not before this one
            places[number] = min(places[number], places[number + 1])
    return sorted(range(len(parts)), key=lambda number: (places[number], number))


def place_of(part: Stretch, source: RowSource) -> tuple[int, int]:
    """Where the first of its rows lies."""
    first = next((run for piece in part.pieces for run in piece.runs), None)
    return source.place(first.tensor) if first else (-1, 0)


def parts_of(files: Sequence[OutputFile]) -> list[OutputFile | Section]:
    """What each job writes: a file, or a section of one."""
    return [part for file in files for part in (file.sections or (file,))]
