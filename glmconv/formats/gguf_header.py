"""The header of a GGUF file, read strictly and written as llama.cpp writes it: keys with values, then the tensors' names, shapes and places.

Source: ggml's docs/gguf.md and gguf.cpp. As in llama.cpp's reader the tensors lie one behind the other in the order of the header, each padded
to the alignment. Nothing is allocated for what a header claims: it is read a window at a time, and what it becomes in memory is counted.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from glmconv.codecs.ggml import GgmlType, row_size
from glmconv.engine.inputs import InputFile
from glmconv.errors import SourceError, UnsupportedError, printable
from glmconv.formats.gguf_types import BY_NUMBER, ESCAPED, FORMATS, SIZES, Array, Entry, Kind, Value, packed

MAGIC = b"GGUF"
VERSION = 3
READABLE = (2, 3)  # laid out alike; 3 may be big-endian too
ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
ALIGNMENTS = [8 << n for n in range(14)]  # the format wants a multiple of 8, llama.cpp a power of two
HEADER_LARGEST = 64 << 20
ENTRIES = 4096
TENSORS = 65_536
ELEMENTS = 700_000  # of all arrays: GLM-5's tokens, their types and merges are 632,000
ARRAY_COSTS = 64  # as many elements
HELD_LARGEST = 112 << 20  # what strings and arrays become in memory
STRING_LARGEST = 24 << 20  # a whole tokenizer.json may ride along
DEPTH = 4
RANK = 4
KEY_LONGEST = 256
NAME_LONGEST = 63  # bytes: ggml's limit
TENSOR_LARGEST = 1 << 60
WINDOW = 1 << 20
BELOW_FOUR = bytes(range(0xF0))  # bytes that begin no character of four
AGAIN = "Is it cut off? Download it again."
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor: `ne` are its axes, the fastest first; `offset` counts from the file's begin."""

    type: GgmlType
    ne: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return data_size(self.type, self.ne)


@dataclass(frozen=True)
class GgufHeader:
    """A checked header. `tensors` are in the order of their data, which begin at `data_start` and end with the file."""

    kv: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]
    alignment: int
    data_start: int


def data_size(type_: GgmlType, ne: Sequence[int]) -> int:
    """A tensor's bytes without padding."""
    return row_size(type_, ne[0]) * math.prod(ne[1:])


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    return -(-size // alignment) * alignment


def read_header(file: InputFile) -> GgufHeader:
    """The header of a GGUF file. SourceError says what is wrong with which key or tensor; UnsupportedError names what glmconv does not know."""
    cursor = _Cursor(file)
    count_tensors, count_entries = _preamble(cursor)
    kv: dict[str, Value] = {}
    for _ in range(count_entries):
        begin = cursor.offset
        key = cursor.string(KEY_LONGEST, "a key")
        if not _plain(key, KEY_LONGEST):
            raise SourceError(f"has a key that is not 1 to {KEY_LONGEST} printable ASCII characters.", file=file.path, offset=begin)
        if key in kv:
            raise SourceError(f"has the key {printable(key)} twice.", file=file.path, offset=begin)
        kind = cursor.kind(key)
        kv[key] = Value(kind, _value(cursor, key, kind))
    alignment = _alignment(kv, file)
    tensors = dict(_tensors(cursor, count_tensors, alignment))
    start = padded(cursor.offset, alignment)
    _check_data(tensors, cursor, start, alignment)
    placed = {name: GgufTensor(t.type, t.ne, start + t.offset) for name, t in tensors.items()}
    return GgufHeader(kv, placed, alignment, start)


class _Cursor:
    """Reads a file forwards, a window at a time, and counts what becomes of it."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.elements = 0
        self.held = 0
        self._window = b""
        self._at = 0
        self._begin = 0  # of the window in the file

    @property
    def offset(self) -> int:
        return self._begin + self._at

    @property
    def left(self) -> int:
        return self.file.size - self.offset

    def take(self, size: int, what: str) -> bytes:
        """The next bytes; `what` they are, for the message when the file ends."""
        if self._at + size > len(self._window):
            self._move(size, what)
        self._at += size
        return self._window[self._at - size : self._at]

    def _move(self, size: int, what: str) -> None:
        if size > self.left:
            raise SourceError(
                f"ends in {what}: {size:,} bytes are needed, {self.left:,} are left.", file=self.file.path, offset=self.offset, hint=AGAIN
            )
        if self.offset + size > HEADER_LARGEST:
            raise SourceError(f"has a header of more than {HEADER_LARGEST:,} bytes.", file=self.file.path)
        self._begin, self._at, self._window = self.offset, 0, b""
        self._window = self.file.read(self._begin, min(max(size, WINDOW), self.left))

    def number(self, code: str, what: str) -> int:
        value: int = struct.unpack("<" + code, self.take(struct.calcsize("<" + code), what))[0]
        return value

    def kind(self, key: str) -> Kind:
        number = self.number("I", f"the type of {key}")
        if number not in Kind._value2member_map_:
            raise UnsupportedError(f"{printable(key)} has the value type {number}, which is not known.", file=self.file.path, offset=self.offset - 4)
        return Kind(number)

    def hold(self, size: int, what: str) -> None:
        self.held += size
        if self.held > HELD_LARGEST:
            raise SourceError(f"is more than {HELD_LARGEST:,} bytes in memory, {printable(what)} included.", file=self.file.path)

    def string(self, longest: int, what: str) -> str:
        size = self.number("Q", what)
        if size > longest:
            raise SourceError(f"has {printable(what)} of {size:,} bytes; at most {longest:,} are read.", file=self.file.path, offset=self.offset - 8)
        data = self.take(size, what)
        widest = 1 if data.isascii() else 4 if data.translate(None, BELOW_FOUR) else 2  # bytes that Python holds for each of the text's characters
        self.hold(widest * size, what)
        return data.decode("utf-8", ESCAPED)

    def strings(self, count: int, what: str) -> list[str]:
        """Many strings, at little cost for each."""
        found: list[str] = []
        while len(found) < count:
            window, at, begin = self._window, self._at, len(found)
            for _ in range(begin, count):
                end = at + 8 + int.from_bytes(window[at : at + 8], "little")
                if at + 8 > len(window) or end > len(window):
                    break
                found.append(window[at + 8 : end].decode("utf-8", ESCAPED))
                at = end
            self._at = at
            self.hold(sum(map(sys.getsizeof, found[begin:])), what)
            if len(found) < count:
                found.append(self.string(STRING_LARGEST, what))
                self.hold(64, what)
        return found


def _preamble(cursor: _Cursor) -> tuple[int, int]:
    """(tensors, keys) that the file claims to have, held against what fits into it."""
    path = cursor.file.path
    if cursor.file.size < 24:
        raise SourceError(f"is {cursor.file.size} bytes long, too short for a GGUF file.", file=path, hint=AGAIN)
    if cursor.take(4, "its magic") != MAGIC:
        raise SourceError("does not begin with GGUF.", file=path, offset=0, hint="Is it a GGUF file?")
    version = cursor.number("I", "its version")
    if version not in READABLE:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = f"is big-endian GGUF, version {swapped}" if version > 0xFFFF else f"is GGUF version {version}"
        raise UnsupportedError(f"{what}; versions 2 and 3, little-endian, are read.", file=path, offset=4)
    tensors, entries = cursor.number("Q", "its counts"), cursor.number("Q", "its counts")
    for count, most, least, what in ((tensors, TENSORS, 33, "tensors"), (entries, ENTRIES, 14, "keys")):
        if count > most:
            raise SourceError(f"says it has {count:,} {what}; at most {most:,} are read.", file=path)
        if count * least > cursor.left:
            raise SourceError(f"says it has {count:,} {what}, more than fit into its {cursor.file.size:,} bytes.", file=path, hint=AGAIN)
    return tensors, entries


def _plain(text: str, longest: int) -> bool:
    return 1 <= len(text) <= longest and text.isascii() and text.isprintable()


def _value(cursor: _Cursor, key: str, kind: Kind) -> object:
    if kind is Kind.STRING:
        return cursor.string(STRING_LARGEST, key)
    if kind is Kind.ARRAY:
        return _array(cursor, key, DEPTH)
    data = cursor.take(SIZES[kind], key)
    if kind is Kind.BOOL and data > b"\1":
        raise SourceError(f"{printable(key)} is {data[0]}, which is neither true nor false.", file=cursor.file.path, offset=cursor.offset - 1)
    value: object = struct.unpack("<" + FORMATS[kind], data)[0]
    return value


def _array(cursor: _Cursor, key: str, depth: int) -> Array:
    path = cursor.file.path
    kind, count = cursor.kind(key), cursor.number("Q", key)
    least = SIZES.get(kind, 12 if kind is Kind.ARRAY else 8)
    if count * least > cursor.left:
        raise SourceError(
            f"{printable(key)} says it has {count:,} elements, more than fit into the file.", file=path, offset=cursor.offset, hint=AGAIN
        )
    cursor.elements += count + ARRAY_COSTS
    if cursor.elements > ELEMENTS:
        raise SourceError(f"has arrays of more than {ELEMENTS:,} elements, {printable(key)} included.", file=path, offset=cursor.offset)
    cursor.hold(256 + 40 * count, key)
    if kind is Kind.STRING:
        return Array(kind, cursor.strings(count, key))
    if kind is Kind.ARRAY:
        if depth == 1:
            raise SourceError(f"{printable(key)} has arrays more than {DEPTH} deep.", file=path, offset=cursor.offset)
        return Array(kind, [_array(cursor, key, depth - 1) for _ in range(count)])
    data = cursor.take(count * SIZES[kind], key)
    if kind is Kind.BOOL and data.translate(None, b"\0\1"):
        raise SourceError(f"{printable(key)} has elements that are neither true nor false.", file=path, offset=cursor.offset)
    return Array(kind, list(struct.unpack(f"<{count}{FORMATS[kind]}", data)))


def _alignment(kv: Mapping[str, Value], file: InputFile) -> int:
    found = kv.get(ALIGNMENT_KEY, Value(Kind.U32, ALIGNMENT))
    if found.kind is not Kind.U32 or found.value not in ALIGNMENTS:
        what = f"{ALIGNMENT_KEY} is {found.value!r} ({found.kind.name}), not a power of two from {ALIGNMENTS[0]} to {ALIGNMENTS[-1]:,} (U32)."
        raise SourceError(what, file=file.path)
    return ALIGNMENTS[ALIGNMENTS.index(found.value)]


def _tensors(cursor: _Cursor, count: int, alignment: int) -> Iterable[tuple[str, GgufTensor]]:
    """The tensors' descriptions, offsets from the data's begin on. Each begins where the one before it ends."""
    path = cursor.file.path
    seen: set[str] = set()
    at = 0
    for _ in range(count):
        name = cursor.string(NAME_LONGEST, "a tensor's name")
        if not _plain(name, NAME_LONGEST):
            raise SourceError(f"is no tensor's name: that is 1 to {NAME_LONGEST} printable ASCII characters.", file=path, tensor=name)
        if name in seen:
            raise SourceError("is there twice.", file=path, tensor=name)
        seen.add(name)
        rank = cursor.number("I", "a tensor's description")
        if not 1 <= rank <= RANK:
            raise SourceError(f"has {rank:,} axes; a tensor has 1 to {RANK}.", file=path, tensor=name)
        *ne, number, offset = struct.unpack(f"<{rank}QIQ", cursor.take(8 * rank + 12, "a tensor's description"))
        if number not in BY_NUMBER:
            raise UnsupportedError(f"has the type {number}, which glmconv does not know.", file=path, tensor=name)
        tensor = GgufTensor(BY_NUMBER[number], tuple(ne), offset)
        if 0 in ne or math.prod(ne) > TENSOR_LARGEST // 8:
            raise SourceError(f"is {ne}, which is {'empty' if 0 in ne else 'too large'}.", file=path, tensor=name)
        if ne[0] % tensor.type.block:
            raise SourceError(f"has rows of {ne[0]:,}, which are no whole blocks of {tensor.type.block} {tensor.type.name}.", file=path, tensor=name)
        if offset != at:
            kind = "overlaps what lies before it" if offset < at else "leaves a gap before it"
            raise SourceError(f"{kind}: it begins at {offset:,} of the data, not at {at:,}.", file=path, tensor=name)
        at += padded(tensor.size, alignment)
        yield name, tensor


def _check_data(tensors: Mapping[str, GgufTensor], cursor: _Cursor, start: int, alignment: int) -> None:
    """The padding is zeros; the file ends with its last tensor, or behind its padding."""
    file, header_end = cursor.file, cursor.offset
    if not tensors and file.size == header_end:  # a vocabulary, or the first of several files
        return
    if cursor.take(start - header_end, "the padding behind its header").strip(b"\0"):
        raise SourceError("has something other than zeros between its header and its data.", file=file.path, offset=header_end)
    end = last = start
    if tensors:
        tensor = list(tensors.values())[-1]
        end = start + tensor.offset + tensor.size
        last = start + tensor.offset + padded(tensor.size, alignment)
    if file.size < end:
        raise SourceError(f"ends early: {end - file.size:,} bytes of {end:,} are missing.", file=file.path, hint=AGAIN)
    if file.size > last:
        raise SourceError(f"has {file.size - last:,} bytes behind its last tensor.", file=file.path, offset=last, hint="Download it again.")


def write_header(kv: Iterable[Entry], tensors: Iterable[tuple[str, GgmlType, Sequence[int]]], alignment: int = ALIGNMENT) -> bytes:
    """A header of these keys and of tensors (name, type, ne) in the order of their data, zeros up to where that begins.

    The tensors' bytes follow, each padded to the alignment. ValueError for what cannot be written, or what `read_header` would not read.
    """
    entries = _unique(kv, lambda entry: entry.key)
    stated = next((entry.value for entry in entries if entry.key == ALIGNMENT_KEY), ALIGNMENT)
    if stated != alignment or alignment not in ALIGNMENTS:
        raise ValueError(f"{ALIGNMENT_KEY} says {stated}, the tensors are aligned to {alignment}")
    parts = []
    for entry in entries:
        if not _plain(entry.key, KEY_LONGEST):
            raise ValueError(f"{entry.key!r} is no key")
        parts += [packed(Kind.STRING, entry.key), struct.pack("<I", entry.kind), packed(entry.kind, entry.value)]
    described = _unique(tensors, lambda tensor: tensor[0])
    at = 0
    for name, type_, ne in described:
        if not _plain(name, NAME_LONGEST) or not 1 <= len(ne) <= RANK or min(ne) < 1 or ne[0] % type_.block:
            raise ValueError(f"{name!r} of {type_.name} {list(ne)} is no tensor")
        parts += [packed(Kind.STRING, name), struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, type_.id, at)]
        at += padded(data_size(type_, ne), alignment)
    head = MAGIC + struct.pack("<IQQ", VERSION, len(described), len(entries)) + b"".join(parts)
    return head + bytes(-len(head) % alignment)


def _unique(items: Iterable[Made], named: Callable[[Made], str]) -> list[Made]:
    found = list(items)
    names = [named(item) for item in found]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} is there twice")
    return found
