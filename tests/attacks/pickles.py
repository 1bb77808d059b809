"""Hostile pickles and zips by name, each with a benign twin, and an endless supply of broken ones from a seed. No binaries are kept."""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True)
class Attack:
    """`hostile` must be refused; `twin` differs in the attack alone and must be read."""

    name: str
    hostile: bytes
    twin: bytes


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def put(slot: int) -> bytes:
    return b"r" + slot.to_bytes(4, "little")


def get(slot: int) -> bytes:
    return b"j" + slot.to_bytes(4, "little")


def p2(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def p4(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def batches(item: bytes, count: int) -> bytes:
    """A list of so many items."""
    return b"]" + (b"(" + item * 1000 + b"e") * (count // 1000)


def doubled(times: int, tuple_of: bytes = b"\x86") -> bytes:
    """A tuple of a tuple twice, and so on: 2 ** times leaves in a few bytes."""
    return b"K\x01)\x86" + put(0) + b"".join(get(n) + tuple_of + put(n + 1) for n in range(times))


def colliding(count: int, stride: int) -> bytes:
    """A dict whose integer keys have one hash."""
    items = b"".join(b"\x8a\x10" + (n * stride).to_bytes(16, "little", signed=True) + b"N" for n in range(1, count + 1))
    return b"}(" + items + b"u"


def kept_apart(count: int) -> bytes:
    """More integer keys than any checkpoint has, in an order that can be made to probe far."""
    return b"}" + b"".join(b"(" + b"".join(b"J" + struct.pack("<i", 1000 * b + n) + b"N" for n in range(1000)) + b"u" for b in range(count // 1000))


CALL = b"cos\nsystem\n" + text("touch CANARY") + b"\x85"
RESOURCES = [
    Attack("a list of ten million nothings", p2(batches(b"N", 10_000_000)), p2(batches(b"N", 100_000))),
    Attack("a million empty lists", p2(batches(b"]", 1_000_000)), p2(batches(b"]", 10_000))),
    Attack("a million empty dicts", p2(batches(b"}", 1_000_000)), p2(batches(b"}", 10_000))),
    Attack("a million records", p2(b"cx\ny\n", put(0), b"\x85", batches(get(0) + b")\x81", 1_000_000), b"\x86"),
           p2(b"cx\ny\n", put(0), b"\x85", batches(get(0) + b")\x81", 10_000), b"\x86")),
    Attack("a million tuples", p2(batches(b"K\x01\x85", 1_000_000)), p2(batches(b"K\x01\x85", 10_000))),
    Attack("ten million values never taken", p2(b"N" * 10_000_000), p2(b"(", b"N" * 100, b"t")),
    Attack("ten million marks", p2(b"(" * 10_000_000), p2(b"(" * 60, b"t" * 60)),
    Attack("ten million notes of one value", p4(b"N", b"\x94" * 10_000_000), p4(b"N", b"\x94" * 1000)),
    Attack("notes in scattered slots", p2(b"N", b"".join(put(n * 97 % 16_000_057) for n in range(1, 900_000))), p2(b"N", put(1), put(5))),
    Attack("wide text", p2(batches(text("\U0001f600" + "a" * 60_000), 1000)), p2(text("\U0001f600" + "a" * 60_000))),
    Attack("one text of two megabytes", p2(text("a" * (2 << 20))), p2(text("a" * (1 << 20)))),
    Attack("text fetched a thousand times from many bytes", p2(b"](", b"".join(text(f"{n:060000d}") for n in range(1500)), b"e"),
           p2(b"](", b"".join(text(f"{n:0600d}") for n in range(900)), b"e")),
    Attack("bytes beyond the budget", p4(batches(b"B" + (100_000).to_bytes(4, "little") + bytes(100_000), 1000)), p4(b"C\x02ab")),
    Attack("billion laughs in tuples", p2(doubled(60)), p2(doubled(3))),
    Attack("billion laughs in lists", p2(b"](NNe", put(0), b"".join(b"](" + get(n) * 1000 + b"e" + put(n + 1) for n in range(20)), b"\x86" * 20),
           p2(b"](NNe", put(0), b"](", get(0), get(0), b"e\x86")),
    Attack("billion laughs in dicts",
           p2(b"}", put(0), b"".join(b"}(" + text("a") + get(n) + text("b") + get(n) + b"u" + put(n + 1) for n in range(40)), b"\x86" * 40),
           p2(b"}", put(0), b"}(", text("a"), get(0), text("b"), get(0), b"u\x86")),
    Attack("billion laughs in records",
           p2(b"cx\ny\n", put(0), b")R", put(1), b"".join(get(0) + get(n) + get(n) + b"\x86R" + put(n + 1) for n in range(1, 40)), b"\x86" * 39),
           p2(b"cx\ny\n", put(0), b")R", put(1), get(0), get(1), get(1), b"\x86R\x86")),
    Attack("a doubled tuple as a key", p2(b"}", doubled(40).replace(b"K\x01)\x86", b"K\x01K\x02\x86", 1), b"Ns"), p2(b"}K\x01K\x02\x86Ns")),
    Attack("a wide tuple as a key", p2(b"}(", b"(" + b"K\x01" * 9 + b"t", b"Nu"), p2(b"}(", b"(" + b"K\x01" * 8 + b"t", b"Nu")),
    Attack("integer keys of one hash", p2(colliding(20_000, 2**61 - 1)), p2(b"}K\x01NsK\x02Ns")),
    Attack("twenty thousand integer keys", p2(kept_apart(20_000)), p2(kept_apart(10_000))),
]  # fmt: skip

CODE = [
    Attack("a call is a call of nothing", p2(b"X\x02\x00\x00\x00os)R"), p2(CALL, b"R")),
    Attack("a call of a record", p2(CALL, b"R", b")R"), p2(CALL, b"R")),
    Attack("a call of a list", p2(b"])R"), p2(CALL, b"R")),
    Attack("inst", p2(b"(", text("touch CANARY"), b"ios\nsystem\n"), p2(CALL, b"R")),
    Attack("obj", p2(b"(cos\nsystem\n", text("touch CANARY"), b"o"), p2(CALL, b"R")),
    Attack("extension of one byte", p2(b"\x82\x01)R"), p2(CALL, b"R")),
    Attack("extension of two bytes", p2(b"\x83\x01\x00)R"), p2(CALL, b"R")),
    Attack("extension of four bytes", p2(b"\x84\x01\x00\x00\x00)R"), p2(CALL, b"R")),
    Attack("a persistent id in text", p2(b"Pstorage\n"), p2(b"(", text("storage"), b"tQ")),
    Attack("a buffer from outside", b"\x80\x05\x97.", b"\x80\x05\x96\x01" + bytes(7) + b"a."),
    Attack("a buffer made read-only", b"\x80\x05N\x98.", b"\x80\x05N."),
    Attack("an integer as text that is evaluated", p2(b"I__import__('os')\n"), p2(b"K\x01")),
    Attack("a string as text that is evaluated", p2(b"S'a'\n"), p2(text("a"))),
    Attack("unicode as text", p2(b"Vabc\n"), p2(text("abc"))),
    Attack("a float as text", p2(b"F1e999999999\n"), p2(b"G" + struct.pack(">d", 1.5))),
    Attack("a long as text of a million digits", p2(b"L" + b"9" * 1_000_000 + b"L\n"), p2(b"\x8a\x08" + b"\x7f" * 8)),
    Attack("a long of four gigabytes", p2(b"\x8b\xff\xff\xff\x7f\x01"), p2(b"\x8a\x01\x05")),
    Attack("a long of 255 bytes", p2(b"\x8a\xff" + b"\x01" * 255), p2(b"\x8a\x10" + b"\x01" * 16)),
    Attack("a name made of numbers", p4(b"K\x01K\x02\x93"), p4(text("os"), text("system"), b"\x93")),
    Attack("a name of a megabyte", p4(text("o" * 1_000_000), text("s"), b"\x93"), p4(text("o" * 1000), text("s"), b"\x93")),
    Attack("a name without end", b"\x80\x02c" + b"a" * 100_000, p2(b"cos\nsystem\n")),
    Attack("an object with keywords", p4(b"cos\nsystem\n)}", text("a"), b"Ns\x92"), p4(b"cos\nsystem\n)}\x92")),
    Attack("a state on a number", p2(b"K\x01}b"), p2(b"cx\ny\n)\x81}b")),
    Attack("a state on a name", p2(b"cos\nsystem\n}b"), p2(b"cx\ny\n)\x81}b")),
    Attack("two states", p2(b"cx\ny\n)\x81}b}b"), p2(b"cx\ny\n)\x81}b")),
    Attack("items into a name", p2(b"cos\nsystem\n", text("a"), b"Ns"), p2(b"cx\ny\n)\x81", text("a"), b"Ns")),
]

SHAPE = [
    Attack("65 tuples in one another", p2(b")" + b"\x85" * 64), p2(b")" + b"\x85" * 63)),
    Attack("65 lists in one another", p2(b"]" * 65 + b"a" * 64), p2(b"]" * 64 + b"a" * 63)),
    Attack("100,000 lists in one another", p2(b"]" * 100_000 + b"a" * 99_999), p2(b"]" * 60 + b"a" * 59)),
    Attack("dicts in one another", p2((b"}" + text("a")) * 65 + b"N" + b"s" * 65), p2((b"}" + text("a")) * 64 + b"N" + b"s" * 64)),
    Attack("records in one another", p2(b"cx\ny\n" * 40 + b")" + b"R\x85" * 40), p2(b"cx\ny\n" * 20 + b")" + b"R\x85" * 20)),
    Attack("states in one another", p2(b"cx\ny\n)\x81" * 70 + b"N" + b"b" * 70), p2(b"cx\ny\n)\x81" * 60 + b"N" + b"b" * 60)),
    Attack("ids in one another", p2(b"N" + b"Q" * 70), p2(b"N" + b"Q" * 60)),
    Attack("a list in itself", p2(b"]", put(0), get(0), b"a"), p2(b"]", put(0), b"Na")),
    Attack("a list in itself by way of a tuple", p2(b"]", put(0), get(0), b"\x85a"), p2(b"]", put(0), b"N\x85a")),
    Attack("a dict in itself", p2(b"}", put(0), text("a"), get(0), b"s"), p2(b"}", put(0), text("a"), b"Ns")),
    Attack("a record in its own state", p2(b"cx\ny\n)\x81", put(0), b"}", text("a"), get(0), b"sb"),
           p2(b"cx\ny\n)\x81", put(0), b"}", text("a"), b"Nsb")),
    Attack("lists filled after they were put away", p2(b"](]", put(0), b"]", put(1), b"e", get(0), get(1), b"a\x86"), p2(b"](]]e")),
    Attack("a finished list filled through the memo", p2(b"](]", put(0), b"e", get(0), b"Na\x86"), p2(b"](]", put(0), b"Nae", get(0), b"\x86")),
    Attack("a key twice", p2(b"}(", text("a"), b"N", text("a"), b"Nu"), p2(b"}(", text("a"), b"N", text("b"), b"Nu")),
    Attack("a slot set twice", p2(b"N", put(0), put(0)), p2(b"N", put(0), put(1))),
    Attack("a slot beyond the limit", p2(b"N", put(2**24 + 1)), p2(b"N", put(2**24))),
    Attack("a slot that is not set", p2(get(7)), p2(b"N", put(7), get(7), b"\x86")),
    Attack("a value copied", p2(b"N2\x86"), p2(b"NN\x86")),
    Attack("a value dropped", p2(b"NN0"), p2(b"N")),
    Attack("values dropped to a mark", p2(b"N(NN1"), p2(b"N")),
    Attack("a value from below the mark", p2(b"K\x01(\x85t"), p2(b"(K\x01\x85t")),
    Attack("two values at the end", p2(b"NN"), p2(b"N")),
    Attack("a mark at the end", p2(b"N("), p2(b"N")),
    Attack("nothing at the end", p2(), p2(b"N")),
    Attack("more behind the end", p2(b"N") + b"N.", p2(b"N")),
    Attack("no end", b"\x80\x02N", p2(b"N")),
    Attack("nothing at all", b"", p2(b"N")),
    Attack("protocol 6", b"\x80\x06N.", b"\x80\x05N."),
    Attack("protocol 0", b"\x80\x00N.", b"\x80\x02N."),
    Attack("a second protocol", b"\x80\x02\x80\x02N.", b"\x80\x02N."),
    Attack("half a pair", p2(b"}(", text("a"), b"u"), p2(b"}(", text("a"), b"Nu")),
    Attack("a list as a key", p2(b"}]Ns"), p2(b"}", text("a"), b"Ns")),
    Attack("a dict as a key", p2(b"}}Ns"), p2(b"}NNs")),
    Attack("an id as a key", p2(b"}NQNs"), p2(b"}K\x01Ns")),
    Attack("text of two gigabytes", p2(b"X\xff\xff\xff\x7fabc"), p2(text("abc"))),
    Attack("text of 2 ** 63 bytes", p4(b"\x8d" + b"\xff" * 7 + b"\x7fabc"), p4(b"\x8d\x03" + bytes(7) + b"abc")),
    Attack("bytes of 2 ** 64", p4(b"\x8e" + b"\xff" * 8 + b"abc"), p4(b"\x8e\x03" + bytes(7) + b"abc")),
    Attack("a frame of 2 ** 64", p4(b"\x95" + b"\xff" * 8 + b"N"), p4(b"\x95\x02" + bytes(7) + b"N")),
    Attack("text that is not UTF-8", p2(b"X\x01\x00\x00\x00\xff"), p2(text("é"))),
    Attack("half a surrogate pair", p2(b"X\x03\x00\x00\x00\xed\xa0\x80"), p2(text("\U0001f600"))),
    Attack("bytes of wide text", p2(b"c_codecs\nencode\n", text("Ā"), text("latin1"), b"\x86R"),
           p2(b"c_codecs\nencode\n", text("ÿ"), text("latin1"), b"\x86R")),
    Attack("cut in the middle of a number", b"\x80\x02J\x01\x02", p2(b"J\x01\x02\x03\x04")),
    Attack("a shape with a slot too many", p2(b"ctorch\nSize\n", put(0), b"\x85", get(0), b"K\x01\x85", put(5), b"\x85", put(5), b"R\x86"),
           p2(b"ctorch\nSize\n", put(0), b"\x85", get(0), b"K\x01\x85", put(5), b"\x85", put(6), b"R\x86")),
]  # fmt: skip

PICKLES = RESOURCES + CODE + SHAPE


@dataclass
class Part:
    """A record of a zip, and what its headers say instead of the truth."""

    name: str
    content: bytes
    central: dict[str, int | str] = field(default_factory=dict)
    local: dict[str, int | str] = field(default_factory=dict)


def zipped(parts: list[Part], end: Mapping[str, int] = MappingProxyType({}), behind: bytes = b"") -> bytes:
    """A stored zip of these records; `end` changes the last record's words, `behind` follows it."""
    out, directory = bytearray(), bytearray()
    for part in parts:
        truth: dict[str, int | str] = {
            "flags": 0, "method": 0, "crc": zlib.crc32(part.content), "packed": len(part.content), "size": len(part.content),
            "name": part.name, "offset": len(out), "comment": 0, "disk": 0, "extra": 0, "attributes": 0,
        }  # fmt: skip
        here, there = {**truth, **part.local}, {**truth, **part.central}
        name = str(here["name"]).encode()
        words = (here["flags"], here["method"], 0, 0, here["crc"], here["packed"], here["size"], len(name), here["extra"])
        out += struct.pack("<4sH4H3I2H", b"PK\x03\x04", 0, *words) + name + part.content
        name = str(there["name"]).encode()
        words = (there["flags"], there["method"], 0, 0, there["crc"], there["packed"], there["size"], len(name), 0, there["comment"], there["disk"])
        directory += struct.pack("<4s2H4H3I5H2I", b"PK\x01\x02", 0, 0, *words, 0, there["attributes"], there["offset"]) + name
    last = {"disk": 0, "first": 0, "here": len(parts), "count": len(parts), "length": len(directory), "start": len(out), "comment": 0, **end}
    return bytes(out + directory) + struct.pack("<4s4H2IH", b"PK\x05\x06", *last.values()) + behind


def tensor_pickle(storage: str = "FloatStorage", count: int = 4, begin: int = 0, shape: bytes = b"K\x04\x85", strides: bytes = b"K\x01\x85",
                  rebuild: str = "_rebuild_tensor_v2", key: str = "0", more: bytes = b"") -> bytes:  # fmt: skip
    """data.pkl of one tensor of four floats, or of what it is changed to."""
    stored = b"(" + text("storage") + f"ctorch\n{storage}\n".encode() + text(key) + text("cpu") + b"J" + struct.pack("<i", count) + b"tQ"
    args = b"(" + stored + b"J" + struct.pack("<i", begin) + shape + strides + b"\x89ccollections\nOrderedDict\n)R" + more + b"t"
    return p2(f"ctorch._utils\n{rebuild}\n".encode(), args, b"R")


def parts(**changes: bytes) -> list[Part]:
    content = {"data.pkl": tensor_pickle(), "byteorder": b"little", "data/0": bytes(16), "version": b"3\n", **changes}
    return [Part(f"archive/{name}", data) for name, data in content.items()]


def changed(record: str, where: str, **words: int | str) -> bytes:
    """The good blob, one record of which says something else in its `central` or `local` header, or in both."""
    found = parts()
    for part in found:
        if part.name.endswith(record):
            part.central = dict(words) if where != "local" else {}
            part.local = dict(words) if where != "central" else {}
    return zipped(found)


def pickled(**changes: object) -> bytes:
    return zipped(parts(**{"data.pkl": tensor_pickle(**changes)}))  # type: ignore[arg-type]


GOOD = zipped(parts())
MANY = [Part(f"archive/data/{n}", b"") for n in range(1, 4093)]
ZIPS = [
    Attack("compressed", changed("data/0", "both", method=8), GOOD),
    Attack("compressed as the directory says", changed("data/0", "central", method=8), GOOD),
    Attack("encrypted", changed("data.pkl", "both", flags=1), GOOD),
    Attack("the local header is encrypted", changed("data.pkl", "local", flags=1), GOOD),
    Attack("two sizes", changed("data/0", "both", packed=8), GOOD),
    Attack("the local header has another size", changed("data/0", "local", size=8, packed=8), GOOD),
    Attack("the local header has another CRC", changed("data/0", "local", crc=1), GOOD),
    Attack("the local header has another name", changed("data/0", "local", name="archive/data/1"), GOOD),
    Attack("the local header's extra field covers its content", changed("data/0", "local", extra=8), GOOD),
    Attack("the pickle has another CRC", changed("data.pkl", "both", crc=7), changed("data.pkl", "both", crc=0)),
    Attack("a size of 4 GiB without zip64", changed("data/0", "both", size=0xFFFFFFFF, packed=0xFFFFFFFF), GOOD),
    Attack("a size behind the end", changed("data/0", "both", size=1 << 30, packed=1 << 30), GOOD),
    Attack("a size into the next record", changed("data/0", "both", size=20, packed=20), GOOD),
    Attack("an offset behind the end", changed("data/0", "central", offset=1 << 30), GOOD),
    Attack("an offset of another record", changed("data/0", "central", offset=0), GOOD),
    Attack("a record on another disk", changed("data/0", "central", disk=1), GOOD),
    Attack("a record that is a folder", changed("data/0", "central", attributes=0x10), changed("data/0", "central", attributes=0x20)),
    Attack("a record with a comment", changed("version", "central", comment=5), GOOD),
    Attack("a record twice", zipped([*parts(), Part("archive/data/0", bytes(16))]), GOOD),
    Attack("two pickles", zipped([*parts(), Part("archive/data/data.pkl", b"")]), GOOD),
    Attack("no pickle", zipped(parts()[1:]), GOOD),
    Attack("two prefixes", zipped([*parts(), Part("other/x", b"")]), zipped([*parts(), Part("archive/x", b"")])),
    Attack("no prefix", zipped([*parts(), Part("x", b"")]), GOOD),
    Attack("a name that leaves", zipped([*parts(), Part("archive/../x", b"")]), GOOD),
    Attack("an absolute name", zipped([*parts(), Part("/archive/x", b"")]), GOOD),
    Attack("a name with a backslash", zipped([*parts(), Part("archive/..\\x", b"")]), GOOD),
    Attack("a name with a NUL", zipped([*parts(), Part("archive/x\0", b"")]), GOOD),
    Attack("a name of a thousand letters", zipped([*parts(), Part("archive/" + "x" * 1000, b"")]),
           zipped([*parts(), Part("archive/" + "x" * 400, b"")])),
    Attack("4,097 records", zipped(parts() + MANY + [Part("archive/x", b"")]), zipped(parts() + MANY)),
    Attack("fewer records than there are", zipped(parts(), {"count": 3, "here": 3}), GOOD),
    Attack("more records than there are", zipped(parts(), {"count": 5, "here": 5}), GOOD),
    Attack("records on another disk", zipped(parts(), {"here": 2}), GOOD),
    Attack("a directory before its start", zipped(parts(), {"start": 1}), GOOD),
    Attack("a directory of 4 GiB", zipped(parts(), {"length": 0xFFFFFFFE}), GOOD),
    Attack("a comment behind the end", zipped(parts(), {"comment": 4}, behind=b"PK\x05\x06"), GOOD),
    Attack("bytes behind the end", zipped(parts(), behind=b"x"), GOOD),
    Attack("no zip at all", bytes(100), GOOD),
    Attack("an end alone", b"PK\x05\x06" + bytes(18), GOOD),
    Attack("nothing", b"", GOOD),
    Attack("big-endian", zipped(parts(byteorder=b"big")), zipped([part for part in parts() if "byteorder" not in part.name])),
    Attack("a byte order of a megabyte", zipped(parts(byteorder=b"little" * 200_000)), GOOD),
    Attack("a pickle of a megabyte for one tensor", zipped(parts(**{"data.pkl": tensor_pickle() + bytes(1 << 20)})), GOOD),
    Attack("a storage that is not there", pickled(key="1"), GOOD),
    Attack("a storage outside", pickled(key="../version"), GOOD),
    Attack("a storage of another size", pickled(count=5), GOOD),
    Attack("a storage of a negative size", pickled(count=-4), GOOD),
    Attack("a storage of another type", pickled(storage="DoubleStorage"), GOOD),
    Attack("a storage of no known type", pickled(storage="ComplexFloatStorage"), GOOD),
    Attack("a tensor before its storage", pickled(begin=-1), pickled(begin=1, shape=b"K\x03\x85")),
    Attack("a tensor behind its storage", pickled(begin=1), pickled(begin=1, shape=b"K\x03\x85")),
    Attack("a shape beyond the storage", pickled(shape=b"K\x05\x85"), GOOD),
    Attack("a shape of 2 ** 60", pickled(shape=b"\x8a\x08" + (2**60).to_bytes(8, "little") + b"\x85"), GOOD),
    Attack("a negative shape", pickled(shape=b"J\xff\xff\xff\xff\x85"), GOOD),
    Attack("a shape of truth values", pickled(shape=b"\x88\x85"), pickled(shape=b"K\x01\x85")),
    Attack("a shape of nine axes", pickled(shape=b"(" + b"K\x01" * 9 + b"t", strides=b"(" + b"K\x01" * 9 + b"t"),
           pickled(shape=b"(" + b"K\x01" * 8 + b"t", strides=b"(" + b"K\x01" * 8 + b"t")),
    Attack("a shape that is a list", pickled(shape=b"]K\x04a"), GOOD),
    Attack("strides that jump", pickled(shape=b"K\x02\x85", strides=b"K\x02\x85"), pickled(shape=b"K\x01\x85", strides=b"K\x02\x85")),
    Attack("a transposed tensor", pickled(shape=b"K\x02K\x02\x86", strides=b"K\x01K\x02\x86"),
           pickled(shape=b"K\x02K\x02\x86", strides=b"K\x02K\x01\x86")),
    Attack("an expanded tensor", pickled(strides=b"K\x00\x85"), GOOD),
    Attack("strides of another rank", pickled(strides=b"K\x01K\x01\x86"), GOOD),
    Attack("a conjugated tensor", pickled(more=b"}" + text("conj") + b"\x88s"), pickled(more=b"N")),
    Attack("a tensor that something else rebuilds", pickled(rebuild="_rebuild_sparse_tensor"), GOOD),
    Attack("a pickle that calls", zipped(parts(**{"data.pkl": p2(CALL, b"R")})), GOOD),
    Attack("a list instead of a tensor", zipped(parts(**{"data.pkl": p2(b"]")})), GOOD),
]  # fmt: skip


def broken(good: list[bytes], seed: int) -> Iterator[bytes]:
    """Endless damaged versions: bytes changed, taken out, doubled, swapped between files; numbers set to what is wont to overflow."""
    rng = random.Random(seed)
    numbers = [value.to_bytes(width, "little") for width in (1, 2, 4, 8) for value in (0, 1, 127, 128, 2 ** (8 * width) - 1, 2 ** (8 * width - 1))]
    opcodes = b"().0125BCGIJKLMNQRSTUVX\\]abcdeghijlopqrstu}\x80\x81\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x90\x91\x92\x93\x94\x95\x96\x97"

    def change(data: bytearray, other: bytes) -> None:
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randrange(1, 24))
        kind: Callable[[], object] = rng.choice(
            [
                lambda: data.__setitem__(slice(at, at + 1), bytes([rng.randrange(256)])),
                lambda: data.__setitem__(slice(at, at + 1), bytes([rng.choice(opcodes)])),
                lambda: data.__setitem__(slice(at, at), bytes([rng.choice(opcodes)])),
                lambda: data.__delitem__(slice(at, end)),
                lambda: data.__setitem__(slice(at, at), data[at:end] * rng.choice((1, 1, 2, 50))),
                lambda: data.__setitem__(slice(at, end), other[rng.randrange(len(other)) :][: rng.randrange(40)]),
                lambda: data.__setitem__(slice(at, end), rng.choice(numbers)),
            ]
        )
        kind()

    while True:
        data = bytearray(rng.choice(good))
        for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
            change(data, rng.choice(good))
        yield bytes(data)
