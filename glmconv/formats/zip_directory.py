"""The directory of a stored zip, strictly: every record where both its headers say, none overlapping, nothing compressed or encrypted.

Read with few reads: a blob's first and last bytes are fetched once, and hold all but the elements of an ordinary tensor's blob.
Source: APPNOTE.TXT for zip.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from glmconv.errors import SourceError

ReadAt = Callable[[int, int], bytes]
ENTRIES = 4096
FOLDER = 0x10  # of the attributes; torch's reader (miniz) reads nothing from such a record and returns what the memory held
TAIL = 98  # end record (22), zip64 locator (20) and zip64 end record (56); torch writes no comment
DIRECTORY_LARGEST = 1 << 20
WINDOW = 2048  # a tensor's blob has about 700 bytes before its elements and 1,000 behind them


@dataclass(frozen=True, slots=True)
class Entry:
    """One record: its content begins at `offset` and is `size` bytes long."""

    name: str
    offset: int
    size: int
    crc32: int
    flags: int = 0


class Reader:
    """A blob of `size` bytes, whose two ends are read once."""

    def __init__(self, read_at: ReadAt, size: int, file: object) -> None:
        self.read_at, self.size, self.file = read_at, size, file
        self.head = self._exactly(0, min(size, WINDOW))
        self.tail_at = max(0, size - WINDOW)
        self.tail = self._exactly(self.tail_at, size - self.tail_at)

    def fail(self, what: str) -> NoReturn:
        raise SourceError(f"is no file that torch.save wrote: {what}.", file=self.file)

    def _exactly(self, at: int, size: int) -> bytes:
        data = self.read_at(at, size)
        if len(data) != size:
            self.fail("it ends early")
        return data

    def read(self, at: int, size: int) -> bytes:
        if at < 0 or size < 0 or at + size > self.size:
            self.fail("a record lies outside")
        if at + size <= len(self.head):
            return self.head[at : at + size]
        if at >= self.tail_at:
            return self.tail[at - self.tail_at : at - self.tail_at + size]
        return self._exactly(at, size)


@dataclass(frozen=True)
class Archive:
    """The records of a zip, by name; all names begin with `prefix` and a slash."""

    entries: dict[str, Entry]
    prefix: str
    reader: Reader

    def read(self, entry: Entry, limit: int) -> bytes:
        """A record's content. SourceError if it is longer than `limit`."""
        if entry.size > limit:
            self.reader.fail(f"{entry.name} is {entry.size:,} bytes long; at most {limit:,} are read")
        return self.reader.read(entry.offset, entry.size)


def read_archive(read_at: ReadAt, size: int, file: object) -> Archive:
    """The zip in a blob of `size` bytes, positions relative to the blob. SourceError for any zip that torch.save would not write."""
    if size < 22:
        raise SourceError(f"is no file that torch.save wrote: {size} bytes are too short for a zip.", file=file)
    reader = Reader(read_at, size, file)
    count, start, length = _end(reader)
    central = reader.read(start, length)
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        entry, at = _entry(central, at, reader)
        if entry.name in entries:
            reader.fail("a record is there twice")
        entries[entry.name] = entry
    if at != length:
        reader.fail("its directory is longer than its records")
    prefixes = {name.partition("/")[0] for name in entries}
    pickles = [name for name in entries if name.endswith("/data.pkl")]
    if len(prefixes) != 1 or not all("/" in name for name in entries):
        reader.fail("its records have not one prefix")
    prefix = prefixes.pop()
    if pickles != [f"{prefix}/data.pkl"]:
        reader.fail("it has not one data.pkl")
    return Archive(_placed(reader, entries, start), prefix, reader)


def _end(reader: Reader) -> tuple[int, int, int]:
    """(number of records, offset of the directory, its length) from the end record and its zip64 twin, which must agree."""
    tail = reader.read(max(0, reader.size - TAIL), min(reader.size, TAIL))
    if tail[-22:-18] != b"PK\x05\x06":
        reader.fail("no zip directory is at its end")
    disk, first, here, count, length, start, comment = struct.unpack("<4H2IH", tail[-18:])
    end = reader.size - 22
    if len(tail) == TAIL and tail[56:60] == b"PK\x06\x07":
        end = reader.size - TAIL
        locator = struct.unpack("<IQI", tail[60:76])
        signature, rest, _, _, disk64, first64, here64, count64, length64, start64 = struct.unpack("<4sQ2H2I4Q", tail[:56])
        if signature != b"PK\x06\x06" or rest != 44 or disk64 or first64 or here64 != count64 or locator != (0, end, 1):
            reader.fail("its zip64 directory is broken")
        if (here, length, start) != (min(count64, 0xFFFF), min(length64, 0xFFFFFFFF), min(start64, 0xFFFFFFFF)):
            reader.fail("its two directories disagree")
        here, length, start = count64, length64, start64
        count = count64 if count == min(count64, 0xFFFF) else -1
    if disk or first or comment or here != count:
        reader.fail("it has several parts or a comment")
    if not 1 <= count <= ENTRIES or length > DIRECTORY_LARGEST or start + length != end:
        reader.fail("its directory does not lie where it says")
    return count, start, length


def _entry(central: bytes, at: int, reader: Reader) -> tuple[Entry, int]:
    """The directory's record at `at`, its offset that of its local header, and where the next one begins."""
    if at + 46 > len(central) or central[at : at + 4] != b"PK\x01\x02":
        reader.fail("its directory is broken")
    flags, method, _, _, crc32, packed, size, name_length, extra_length, comment, disk = struct.unpack("<4H3I4H", central[at + 8 : at + 36])
    attributes, offset = struct.unpack("<2I", central[at + 38 : at + 46])
    end = at + 46 + name_length + extra_length
    if method or flags & ~0x0808 or comment or disk or end > len(central) or not 1 <= name_length <= 512:
        reader.fail("a record is compressed, encrypted or broken")
    if attributes & FOLDER:
        reader.fail("a record is a folder")
    wide = [size, packed, offset]
    missing = wide.count(0xFFFFFFFF)
    extra = central[end - extra_length : end]
    if missing:
        if len(extra) != 4 + 8 * missing or extra[:4] != struct.pack("<2H", 1, 8 * missing):
            reader.fail("a record's zip64 sizes are missing")
        values = iter(struct.unpack(f"<{missing}Q", extra[4:]))
        size, packed, offset = (next(values) if value == 0xFFFFFFFF else value for value in wide)
    if size != packed:
        reader.fail("a stored record has two sizes")
    raw = central[at + 46 : at + 46 + name_length]
    if not all(32 < c < 127 for c in raw):
        reader.fail("a record's name is not plain")
    name = raw.decode("ascii")
    if "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        reader.fail("a record's name leaves the archive")
    return Entry(name, offset, size, crc32, flags), end


def _placed(reader: Reader, entries: dict[str, Entry], start: int) -> dict[str, Entry]:
    """The entries with their contents' offsets: behind their local headers, in order, none overlapping, all before the directory."""
    placed: dict[str, Entry] = {}
    wanted = sorted(entries.values(), key=lambda entry: entry.offset)
    low = 0
    for n, entry in enumerate(wanted):
        limit = wanted[n + 1].offset if n + 1 < len(wanted) else start
        if entry.offset < low or entry.offset + 30 + len(entry.name) > limit:
            reader.fail("records overlap")
        begin = _content(reader, entry)
        low = begin + entry.size
        if low > limit:
            reader.fail("records overlap")
        placed[entry.name] = Entry(entry.name, begin, entry.size, entry.crc32, entry.flags)
    return placed


def _content(reader: Reader, entry: Entry) -> int:
    """Where an entry's content begins. Its local header must say what the directory says, or leave it to the data descriptor."""
    head = reader.read(entry.offset, 30 + len(entry.name))
    fields: tuple[int, ...] = struct.unpack("<4H3I2H", head[6:30])
    flags, method, _, _, crc32, packed, size, name_length, extra_length = fields
    if head[:4] != b"PK\x03\x04" or method or flags != entry.flags or name_length != len(entry.name) or head[30:] != entry.name.encode("ascii"):
        reader.fail("a record's two headers disagree")
    stated = (entry.crc32, min(entry.size, 0xFFFFFFFF), min(entry.size, 0xFFFFFFFF))
    if (crc32, packed, size) != stated and not (flags & 8 and (crc32, packed, size) in ((0, 0, 0), (0, 0xFFFFFFFF, 0xFFFFFFFF))):
        reader.fail("a record's two headers disagree")
    return entry.offset + 30 + name_length + extra_length
