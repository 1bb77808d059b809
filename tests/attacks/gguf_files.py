"""Hostile GGUF files by name, each with its benign twin, and an endless supply of broken ones from a seed. No binaries are kept."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from glmconv.errors import GlmconvError, SourceError, UnsupportedError

Make = Callable[[], bytes]
U8, U32, F32, BOOL, STRING, ARRAY = 0, 4, 6, 7, 8, 9


@dataclass(frozen=True)
class Attack:
    """`hostile` makes a file that must be refused with `error`; `twin` one that differs in the attack alone and must be read."""

    name: str
    hostile: Make
    twin: Make
    error: type[GlmconvError] = SourceError


def string(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if length is None else length) + text


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(kind: int, count: int, elements: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + elements


def tensor(name: bytes, ne: tuple[int, ...] = (4, 2), kind: int = 0, offset: int = 0, rank: int | None = None) -> bytes:
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne) if rank is None else rank, *ne, kind, offset)


ARCHITECTURE = entry(b"general.architecture", STRING, string(b"glm4"))


def packed(
    entries: tuple[bytes, ...] = (ARCHITECTURE,), tensors: tuple[bytes, ...] = (tensor(b"a"),), data: int = 32, *, magic: bytes = b"GGUF",
    version: int = 3, keys: int | None = None, count: int | None = None, fill: bytes = b"\0", alignment: int = 32,
) -> bytes:  # fmt: skip
    """A file of these keys, tensors and bytes of data; `keys` and `count` are what it claims."""
    counts = struct.pack("<IQQ", version, len(tensors) if count is None else count, len(entries) if keys is None else keys)
    head = magic + counts + b"".join(entries) + b"".join(tensors)
    return head + fill * (-len(head) % alignment) + bytes(data)


GOOD = packed(tensors=(tensor(b"a"), tensor(b"b", (32,), 8, 32)), data=96)


def of(*entries: bytes, **more: object) -> Make:
    return lambda: packed(entries, **more)


def having(*tensors: bytes, data: int = 32) -> Make:
    return lambda: packed(tensors=tensors, data=data)


def good() -> bytes:
    return GOOD


def nested(depth: int) -> bytes:
    return entry(b"k", ARRAY, b"".join(array(ARRAY, 1) for _ in range(depth - 1)) + array(U8, 1, b"\1"))


def aligned(value: bytes, kind: int = U32) -> bytes:
    return entry(b"general.alignment", kind, value)


def number(value: int) -> bytes:
    return struct.pack("<I", value)


ONE = of(entry(b"k", U32, number(1)))
STRINGS = of(entry(b"k", ARRAY, array(STRING, 2, string(b"x") * 2)))

ATTACKS = (
    # the file and its counts
    Attack("an empty file", bytes, good),
    Attack("a file cut off in its counts", lambda: GOOD[:23], good),
    Attack("another magic", lambda: packed(magic=b"GGML"), packed),
    Attack("a file of zeros", lambda: bytes(4096), packed),
    Attack("a pickle", lambda: b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R." + bytes(64), packed),
    Attack("version 1", lambda: packed(version=1), packed, UnsupportedError),
    Attack("version 0", lambda: packed(version=0), lambda: packed(version=2), UnsupportedError),
    Attack("version 4", lambda: packed(version=4), packed, UnsupportedError),
    Attack("a big-endian file", lambda: packed(version=3 << 24), packed, UnsupportedError),
    Attack("2^64 - 1 tensors", lambda: packed(count=2**64 - 1), packed),
    Attack("2^64 - 1 keys", lambda: packed(keys=2**64 - 1), packed),
    Attack("more tensors than fit", lambda: packed(count=1000), packed),
    Attack("more keys than fit", lambda: packed(keys=1000), packed),
    Attack("a key more than there is", lambda: packed(keys=2), packed),
    Attack("a tensor more than there is", lambda: packed(count=2), packed),
    Attack("a tensor fewer than there is", lambda: packed(tensors=(tensor(b"a"), tensor(b"b", offset=32)), data=64, count=1), packed),
    Attack("70,000 tensors", lambda: packed(tensors=tuple(tensor(b"%d" % n, offset=32 * n) for n in range(70_000)), data=32 * 70_000), packed),
    Attack("5,000 keys", of(*(entry(b"%d" % n, U8, b"\0") for n in range(5_000))), of(*(entry(b"%d" % n, U8, b"\0") for n in range(4_000)))),
    # keys and values
    Attack("a key twice", of(entry(b"k", U8, b"\1"), entry(b"k", U8, b"\2")), of(entry(b"k", U8, b"\1"), entry(b"l", U8, b"\2"))),
    Attack("a key without characters", of(entry(b"", U8, b"\1")), of(entry(b"k", U8, b"\1"))),
    Attack("a key of 257 characters", of(entry(b"k" * 257, U8, b"\1")), of(entry(b"k" * 256, U8, b"\1"))),
    Attack("a key of 2^64 - 1 characters", of(string(b"k", 2**64 - 1) + b"\0" * 8), ONE),
    Attack("a control character in a key", of(entry(b"k\x1b[2J", U8, b"\1")), ONE),
    Attack("a key beyond ASCII", of(entry("\u202ek".encode(), U8, b"\1")), ONE),
    Attack("a key that is no UTF-8", of(entry(b"k\xff", U8, b"\1")), ONE),
    Attack("a value type that nobody knows", of(entry(b"k", 13, b"\1" * 8)), ONE, UnsupportedError),
    Attack("a value type of 2^32 - 1", of(entry(b"k", 2**32 - 1, b"\1" * 8)), ONE, UnsupportedError),
    Attack("a bool of 2", of(entry(b"k", BOOL, b"\2")), of(entry(b"k", BOOL, b"\1"))),
    Attack("a bool of 2 in an array", of(entry(b"k", ARRAY, array(BOOL, 2, b"\1\2"))), of(entry(b"k", ARRAY, array(BOOL, 2, b"\1\0")))),
    Attack("a string longer than the file", of(entry(b"k", STRING, string(b"x", 1 << 20))), of(entry(b"k", STRING, string(b"x")))),
    Attack("a string of 2^63 bytes", of(entry(b"k", STRING, string(b"x", 2**63))), of(entry(b"k", STRING, string(b"x")))),
    Attack("a string of 2^64 - 8 bytes", of(entry(b"k", STRING, string(b"x", 2**64 - 8))), of(entry(b"k", STRING, string(b"x")))),
    Attack("a string of 30 MB", of(entry(b"k", STRING, string(bytes(30 << 20)))), of(entry(b"k", STRING, string(bytes(10 << 20))))),
    Attack("a string of 20 MB and another", of(*(entry(key, STRING, string("\U0001f600".encode() * (5 << 20))) for key in (b"k", b"l"))),
           of(*(entry(key, STRING, string("\U0001f600".encode())) for key in (b"k", b"l")))),
    Attack("a header of more than 64 MiB", of(*(entry(b"%d" % n, STRING, string(bytes(20 << 20))) for n in range(4))),
           of(*(entry(b"%d" % n, STRING, string(bytes(20 << 20))) for n in range(3)))),
    # arrays
    Attack("an array of a type that nobody knows", of(entry(b"k", ARRAY, array(99, 1, b"\1"))), STRINGS, UnsupportedError),
    Attack("an array of 2^64 - 1 numbers", of(entry(b"k", ARRAY, array(U32, 2**64 - 1, bytes(64)))), STRINGS),
    Attack("an array of 2^62 numbers, whose bytes wrap to 0", of(entry(b"k", ARRAY, array(U32, 2**62))), STRINGS),
    Attack("an array of 2^61 strings", of(entry(b"k", ARRAY, array(STRING, 2**61))), STRINGS),
    Attack("an array five strings short", of(entry(b"k", ARRAY, array(STRING, 7, string(b"x") * 2)), data=0, tensors=()), STRINGS),
    Attack("a string of 2^64 - 1 bytes in an array", of(entry(b"k", ARRAY, array(STRING, 2, string(b"x") + string(b"y", 2**64 - 1)))), STRINGS),
    Attack("a million numbers", of(entry(b"k", ARRAY, array(U8, 1_000_000, bytes(1_000_000)))),
           of(entry(b"k", ARRAY, array(U8, 600_000, bytes(600_000))))),
    Attack("a million strings", of(entry(b"k", ARRAY, array(STRING, 1_000_000, bytes(8_000_000)))),
           of(entry(b"k", ARRAY, array(STRING, 600_000, bytes(4_800_000))))),
    Attack("600,000 wide strings", of(entry(b"k", ARRAY, array(STRING, 600_000, string("\U0001f600".encode() * 22) * 600_000))),
           of(entry(b"k", ARRAY, array(STRING, 60_000, string("\U0001f600".encode() * 22) * 60_000)))),
    Attack("arrays five deep", of(nested(5)), of(nested(4))),
    Attack("arrays 100,000 deep", of(nested(100_000)), of(nested(3))),
    Attack("100,000 arrays", of(entry(b"k", ARRAY, array(ARRAY, 100_000, array(U8, 0) * 100_000))),
           of(entry(b"k", ARRAY, array(ARRAY, 5_000, array(U8, 0) * 5_000)))),
    Attack("300,000 strings in each of four arrays", of(*(entry(b"%d" % n, ARRAY, array(STRING, 300_000, bytes(2_400_000))) for n in range(4))),
           of(*(entry(b"%d" % n, ARRAY, array(STRING, 300_000, bytes(2_400_000))) for n in range(2)))),
    # the alignment
    Attack("an alignment of 0", of(aligned(number(0))), of(aligned(number(32)))),
    Attack("an alignment of 48", of(aligned(number(48))), of(aligned(number(32)))),
    Attack("an alignment of 4", of(aligned(number(4))), of(aligned(number(8)), alignment=8)),
    Attack("an alignment of 2^31", of(aligned(number(2**31))), of(aligned(number(64)), alignment=64, data=64)),
    Attack("an alignment that is a string", of(aligned(string(b"32"), STRING)), of(aligned(number(32)))),
    Attack("an alignment that is an array", of(aligned(array(U32, 1, number(32)), ARRAY)), of(aligned(number(32)))),
    Attack("an alignment that is true", of(aligned(b"\1", BOOL)), of(aligned(number(32)))),
    Attack("an alignment that is a float", of(aligned(struct.pack("<f", 32.0), F32)), of(aligned(number(32)))),
    Attack("padding that is not zeros", lambda: packed(fill=b"x"), packed),
    # tensors
    Attack("a tensor twice", having(tensor(b"a"), tensor(b"a", offset=32), data=64), having(tensor(b"a"), tensor(b"b", offset=32), data=64)),
    Attack("a tensor without a name", having(tensor(b"")), packed),
    Attack("a name of 64 characters", having(tensor(b"n" * 64)), having(tensor(b"n" * 63))),
    Attack("a name of 2^64 - 1 characters", having(string(b"n", 2**64 - 1) + bytes(64)), packed),
    Attack("a control character in a name", having(tensor(b"a\x1b[2J")), packed),
    Attack("a NUL in a name", having(tensor(b"a\0b")), packed),
    Attack("a name beyond ASCII", having(tensor("\u202ea".encode())), packed),
    Attack("a tensor without axes", having(tensor(b"a", ())), having(tensor(b"a", (1,)))),
    Attack("a tensor of five axes", having(tensor(b"a", (4, 2, 1, 1, 1))), having(tensor(b"a", (4, 2, 1, 1)))),
    Attack("a tensor of 2^32 - 1 axes", having(tensor(b"a", rank=2**32 - 1)), packed),
    Attack("an axis of 0", having(tensor(b"a", (4, 0)), data=0), packed),
    Attack("an axis of 2^64 - 1", having(tensor(b"a", (2**64 - 1,))), packed),
    Attack("axes whose product wraps to 8", having(tensor(b"a", (8, 2**61 + 1, 2**3))), packed),
    Attack("a type that nobody knows", having(tensor(b"a", kind=99)), packed, UnsupportedError),
    Attack("a type that is no longer", having(tensor(b"a", (32,), 4)), packed, UnsupportedError),
    Attack("rows that are no whole blocks", having(tensor(b"a", (33,), 8), data=64), having(tensor(b"a", (32,), 8), data=64)),
    Attack("an offset of 2^64 - 32", having(tensor(b"a", offset=2**64 - 32)), packed),
    Attack("an offset beyond the file", having(tensor(b"a", offset=4096)), packed),
    Attack("an offset that is not aligned", having(tensor(b"a"), tensor(b"b", offset=40), data=96),
           having(tensor(b"a"), tensor(b"b", offset=32), data=64)),
    Attack("two tensors in one place", having(tensor(b"a"), tensor(b"b")), having(tensor(b"a"), tensor(b"b", offset=32), data=64)),
    Attack("a gap between tensors", having(tensor(b"a"), tensor(b"b", offset=64), data=96), having(tensor(b"a"), tensor(b"b", offset=32), data=64)),
    Attack("a gap before the first tensor", having(tensor(b"a", offset=32), data=64), packed),
    Attack("data cut off by one byte", having(tensor(b"a"), data=31), having(tensor(b"a"), data=32)),
    Attack("no data at all", having(tensor(b"a"), data=0), packed),
    Attack("one byte behind the data", having(tensor(b"a"), data=33), packed),
    Attack("a last tensor padded too far", having(tensor(b"a", (2,)), data=64), having(tensor(b"a", (2,)), data=8)),
    Attack("a tensor of 2^59 bytes", having(tensor(b"a", (2**57,))), packed),
    Attack("bytes behind a header without tensors", lambda: packed(tensors=(), data=32), lambda: packed(tensors=(), data=0)),
)  # fmt: skip


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Good files with bytes changed, cut out, repeated or cut off."""
    source = random.Random(seed)
    entries = (ARCHITECTURE, entry(b"general.alignment", U32, number(32)), entry(b"k", ARRAY, array(STRING, 2, string(b"xy") + string(b""))),
               entry(b"l", ARRAY, array(BOOL, 3, b"\1\0\1")), entry(b"m", F32, struct.pack("<f", 1.5)))  # fmt: skip
    for _ in range(count):
        chosen = tuple(source.sample(entries, source.randint(0, len(entries))))
        content = bytearray(packed(chosen, (tensor(b"a"), tensor(b"b", (32, 3), 8, 32)), 160))
        for _ in range(source.randint(0, 3)):
            at = source.randrange(len(content))
            match source.randrange(5):
                case 0:
                    content[at] = source.randrange(256)
                case 1:
                    content[at] ^= 1 << source.randrange(8)
                case 2:
                    content[at : at + 8] = struct.pack("<Q", source.choice((0, 1, 2, 32, 2**31, 2**63, 2**64 - 1)))
                case 3:
                    del content[at : at + source.randint(1, 9)]
                case 4:
                    content[at:at] = content[at : at + source.randint(1, 9)]
        yield bytes(content)
