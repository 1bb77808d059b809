"""The directory of a stored zip, strictly: every record where both its headers say, none overlapping, nothing compressed or encrypted."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from glmconv.errors import SourceError

ReadAt = Callable[[int, int], bytes]
ENTRIES = 4096
TAIL = 98  # end record (22), zip64 locator (20) and zip64 end record (56): torch writes no comment
DIRECTORY_LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """One record: its content begins at `offset` and is `size` bytes long."""

    name: str
    offset: int
    size: int
    crc32: int


def read_directory(read_at: ReadAt, size: int, file: object) -> tuple[dict[str, Entry], str]:
    """(entries by name, the one prefix of their names) of a blob of `size` bytes. SourceError for any zip that torch.save would not write."""

    def fail(what: str) -> SourceError:
        return SourceError(f"is no file that torch.save wrote: {what}.", file=file)

    if size < 22:
        raise fail(f"{size} bytes are too short for a zip")
    tail = read_at(size - min(size, TAIL), min(size, TAIL))
    if tail[-22:-18] != b"PK\x05\x06":
        raise fail("no zip directory is at its end")
    disk, first, here, count, length, start, comment = struct.unpack("<4H2IH", tail[-18:])
    end = size - 22
    if len(tail) == TAIL and tail[56:60] == b"PK\x06\x07" and tail[:4] == b"PK\x06\x06":
        count64, length64, start64 = struct.unpack("<3Q", tail[32:56])
        end = size - TAIL
        count = count64 if count == 0xFFFF else count
        length = length64 if length == 0xFFFFFFFF else length
        start = start64 if start == 0xFFFFFFFF else start
        if (count, length, start) != (count64, length64, start64):
            raise fail("its two directories disagree")
    if disk or first or comment or here not in (count, 0xFFFF):
        raise fail("it has several parts or a comment")
    if count > ENTRIES or length > DIRECTORY_LARGEST or start + length != end:
        raise fail("its directory does not lie where it says")
    central = read_at(start, length)
    entries: dict[str, Entry] = {}
    at = 0
    for _ in range(count):
        entry, at = _entry(central, at, fail)
        if entry.name in entries:
            raise fail("a record is there twice")
        entries[entry.name] = entry
    if at != length:
        raise fail("its directory is longer than its records")
    return _checked(read_at, entries, start, fail)


def _entry(central: bytes, at: int, fail: Callable[[str], SourceError]) -> tuple[Entry, int]:
    if at + 46 > len(central) or central[at : at + 4] != b"PK\x01\x02":
        raise fail("its directory is broken")
    flags, method, _, _, crc32, packed, size, name_length, extra_length, comment = struct.unpack("<4H3I3H", central[at + 8 : at + 34])
    offset = struct.unpack("<I", central[at + 42 : at + 46])[0]
    end = at + 46 + name_length + extra_length
    if method or flags & 1 or comment or end > len(central) or not 1 <= name_length <= 512:
        raise fail("a record is compressed, encrypted or broken")
    extra = central[end - extra_length : end]
    wide = [size, packed, offset]
    if 0xFFFFFFFF in wide:
        if extra[:2] != b"\x01\x00" or len(extra) < 4 + 8 * wide.count(0xFFFFFFFF):
            raise fail("a record's zip64 sizes are missing")
        values = iter(struct.unpack(f"<{wide.count(0xFFFFFFFF)}Q", extra[4 : 4 + 8 * wide.count(0xFFFFFFFF)]))
        size, packed, offset = (next(values) if value == 0xFFFFFFFF else value for value in wide)
    if size != packed:
        raise fail("a stored record has two sizes")
    raw = central[at + 46 : at + 46 + name_length]
    if not raw.isascii() or any(c < 32 for c in raw):
        raise fail("a record's name is not plain")
    name = raw.decode("ascii")
    if ".." in name.split("/") or name.startswith("/") or "\\" in name:
        raise fail("a record's name leaves the archive")
    return Entry(name, offset, size, crc32), end


def _checked(read_at: ReadAt, entries: dict[str, Entry], start: int, fail: Callable[[str], SourceError]) -> tuple[dict[str, Entry], str]:
    """Contents placed behind their local headers, in order, without overlap; the one prefix."""
    prefixes = {name.partition("/")[0] for name in entries}
    if len(prefixes) != 1:
        raise fail("its records have more than one prefix")
    prefix = prefixes.pop()
    if f"{prefix}/data.pkl" not in entries:
        raise fail("it has no data.pkl")
    placed: dict[str, Entry] = {}
    low = 0
    wanted = sorted(entries.values(), key=lambda entry: entry.offset)
    for n, entry in enumerate(wanted):
        limit = wanted[n + 1].offset if n + 1 < len(wanted) else start
        if entry.offset < low or entry.offset + 30 > limit:
            raise fail("records overlap")
        needed = entry.name.endswith(("/data.pkl", "/byteorder")) or "/data/" in entry.name
        head = read_at(entry.offset, 30) if needed else b""
        begin = entry.offset + 30 + len(entry.name)
        if needed:
            flags, method = struct.unpack("<2H", head[6:10])
            name_length, extra_length = struct.unpack("<2H", head[26:30])
            if head[:4] != b"PK\x03\x04" or method or flags & 1 or name_length != len(entry.name):
                raise fail("a record's two headers disagree")
            begin += extra_length
            if read_at(entry.offset + 30, name_length) != entry.name.encode():
                raise fail("a record's two headers disagree")
        if begin + entry.size > limit:
            raise fail("records overlap")
        low = begin + entry.size
        placed[entry.name] = Entry(entry.name, begin, entry.size, entry.crc32)
    return placed, prefix
