"""Tiny plans and a source in memory: the engine's tests need bytes and layouts, no model."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from glmconv.engine.plan import OutputFile, Piece, Plan, Run, SmallFile
from glmconv.errors import SourceError

ROW = 48  # bytes of one row of every made tensor
CHUNK = 4096  # the engine moves pages; a file of some 6 kB takes two or three writes
TENSORS = ("a", "b", "c", "d", "e")


@dataclass(frozen=True)
class Framed:
    """A local header with a length and a CRC-32 behind the payload, as a zip has them."""

    payload: int

    @property
    def size_before(self) -> int:
        return 8

    @property
    def size_after(self) -> int:
        return 4

    def before(self) -> bytes:
        return self.payload.to_bytes(8, "little")

    def after(self, crc32: int) -> bytes:
        return crc32.to_bytes(4, "little")


@dataclass(frozen=True)
class Halves:
    """An encoder: the first half of each row goes out as it comes, the second is held back, inverted. `unit` rows at a time."""

    rows: int
    id: str = "halves"
    unit: int = 5
    looks: bool = True
    strict: bool = True
    row_bytes: int = ROW // 2

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows, ROW

    def begin(self, lend: Callable[[int], memoryview]) -> HalvesEncoding:
        return HalvesEncoding(lend(self.rows * ROW // 2))


@dataclass
class HalvesEncoding:
    held: memoryview
    seen: int = 0

    def look(self, rows: memoryview) -> int:
        self.seen += len(rows)
        return -1

    def encode(self, start: int, rows: memoryview, out: memoryview) -> int:
        half = ROW // 2
        for n in range(len(rows) // ROW):
            row = bytes(rows[n * ROW : (n + 1) * ROW])
            out[n * half : (n + 1) * half] = row[:half]
            self.held[(start + n) * half : (start + n + 1) * half] = inverted(row[half:])
        return -1

    def part(self, number: int) -> memoryview:
        return self.held


def inverted(data: bytes) -> bytes:
    return bytes(byte ^ 0xFF for byte in data)


def halves(name: str, *runs: Run) -> tuple[Piece, Piece]:
    """The two pieces that a tensor of rows becomes."""
    rows = sum(run.rows for run in runs)
    encoder, size = Halves(rows), rows * ROW // 2
    return Piece(f"{name}.0", "uint8", (size,), size, runs, encoder=encoder), Piece(f"{name}.1", "uint8", (size,), size, encoder=encoder, part=1)


class MadeSource:
    """Tensors of random bytes in one made file. `flaw` makes every read fail; `changed` makes the source say that it was changed."""

    def __init__(self, seed: int = 0, rows: int = 64, names: tuple[str, ...] = TENSORS) -> None:
        rng = random.Random(seed)
        self.tensors: dict[str, bytes] = {name: rng.randbytes(rows * ROW) for name in names}
        self.tensors["tied"] = self.tensors[names[0]]
        self.flaw = ""
        self.changed = False

    def row_size(self, tensor: str) -> int:
        return ROW

    def read_into(self, tensor: str, start: int, out: memoryview) -> None:
        if self.flaw == tensor:
            raise SourceError("cannot be read.", file="made", tensor=tensor)
        out[:] = self.tensors[tensor][start * ROW : start * ROW + len(out)]

    def place(self, tensor: str) -> tuple[int, int]:
        return 0, list(self.tensors).index(tensor)

    def check_unchanged(self) -> None:
        if self.changed:
            raise SourceError("was changed while it was read.", file="made")


def piece(name: str, *runs: Run, framed: bool = False, equals: tuple[str, ...] = ()) -> Piece:
    payload = sum(run.rows for run in runs) * ROW
    return Piece(name, "uint8", (payload,), payload, runs, frame=Framed(payload) if framed else None, equals=equals)


def made_plan(label: str = "made", rows: int = 64, files: int = 3) -> Plan:
    """Up to four files (one of them in a folder, one of literals only) and three marks, some 15 kB; `label` changes its id and its bytes."""
    half = rows // 2
    upper, lower = Run("b", half, rows - half), Run("b", 0, half)
    notes = Piece("note", "uint8", (5,), 5, literal=b"notes")
    words = Piece("words", "uint8", (len(label),), len(label), literal=label.encode())
    everything = (
        OutputFile("shard-00001", f"header of {label}".encode(), (piece("a", Run("a", 0, rows), equals=("tied",)), piece("b.upper", upper))),
        OutputFile("shard-00002", b"", (piece("c", Run("c", 0, half), lower, framed=True), notes)),
        OutputFile("folder/part", b"h" * 700, (piece("d", Run("d", 0, rows)), *halves("e", Run("e", 1, half // 5 * 5), Run("d", 0, half)))),
        OutputFile("words", b"", (words,)),
    )
    chosen = everything[:files]
    marks = (SmallFile("index.json", b'{"index":1}'), SmallFile("config.json", b'{"of":"' + label.encode() + b'"}'), SmallFile("latest", b"release"))
    source = {"format": "made", "files": {"made": [rows * ROW * len(TENSORS), "0" * 64]}, "commit": None}
    return Plan("made", {"label": label}, source, chosen, marks)


def file_plan(label: str = "made", rows: int = 64) -> Plan:
    """Two files that lie beside their folder, as an output does that is split in two, and no marks."""
    made = made_plan(label, rows, files=3)
    files = tuple(OutputFile(f"../made-{number}.gguf", file.header, file.pieces) for number, file in enumerate(made.files[1:]))
    return Plan(made.to, made.options, made.source, files)


def sectioned_plan(label: str = "made", rows: int = 64) -> Plan:
    """Three files beside their folder: one written in five sections, one whole, and one that is named last."""
    made = made_plan(label, rows, files=3)
    first, second, third = made.files
    words = Piece("words", "uint8", (len(label),), len(label), literal=label.encode())
    large = OutputFile("../made-0.gguf", first.header * 30, (words, *first.pieces, *second.pieces, *third.pieces[1:]), cuts=(1, 2, 3, 5))
    mark = OutputFile("../made-1.gguf", b"read me first", (Piece("mark", "uint8", (4,), 4, literal=b"mark"),), last=True)
    return Plan(made.to, made.options, made.source, (mark, large, OutputFile("../made-2.gguf", b"", third.pieces[:1])))


def expected_file(file: OutputFile, source: MadeSource) -> bytes:
    """A file's bytes, put together without the engine."""
    content = bytearray(file.header)
    for p in file.pieces:
        runs = p.runs or (file.pieces[file.pieces.index(p) - 1].runs if p.encoder else ())
        payload = p.literal or b"".join(source.tensors[r.tensor][r.start * ROW : (r.start + r.rows) * ROW] for r in runs)
        if p.encoder:
            rows = [payload[at : at + ROW] for at in range(0, len(payload), ROW)]
            payload = b"".join(inverted(row[ROW // 2 :]) if p.part else row[: ROW // 2] for row in rows)
        content += p.frame.before() + payload + p.frame.after(zlib.crc32(payload)) if p.frame else payload
    return bytes(content)


def expected(plan: Plan, source: MadeSource) -> Mapping[str, bytes]:
    """Every file and mark of a finished output, without its manifest."""
    return {f.name: expected_file(f, source) for f in plan.files} | {mark.name: mark.content for mark in plan.marks}
