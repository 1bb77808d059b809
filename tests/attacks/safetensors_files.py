"""Hostile safetensors folders by name, each with its benign twin, and an endless supply of broken headers from a seed. No binaries are kept."""

from __future__ import annotations

import json
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glmconv.errors import GlmconvError, SourceError, UnsupportedError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
Make = Callable[[Path], None]


@dataclass(frozen=True)
class Attack:
    """`hostile` makes a folder that must be refused with `error`; `twin` one that differs in the attack alone and must be read."""

    name: str
    hostile: Make
    twin: Make
    error: type[GlmconvError] = SourceError


def entry(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def packed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of this header and data; `length` is what it claims of its header."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


def spelled(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


GOOD = {"a": entry(), "b": entry("BF16", [4], [24, 32])}
DATA = bytes(range(32))


def weights(content: bytes, name: str = WEIGHTS) -> Make:
    return lambda folder: (folder / name).write_bytes(content) and None


def headed(header: bytes, data: bytes = DATA) -> Make:
    return weights(packed(header, data))


def of(document: object, data: bytes = DATA) -> Make:
    return headed(spelled(document), data)


def one(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24), data: bytes = bytes(24)) -> Make:
    return of({"a": entry(dtype, shape, offsets)}, data)


def text(header: str, data: bytes = bytes(24)) -> Make:
    return headed(header.encode("utf-8", "surrogatepass"), data)


def large(header: Callable[[], bytes], name: str = WEIGHTS) -> Make:
    """Made when it is needed: tens of megabytes."""
    return lambda folder: (headed(header()) if name == WEIGHTS else sharded(header()))(folder)


A = '"dtype":"F32","shape":[2,3],"data_offsets":[0,24]'
GOOD_FILE = of(GOOD)
GOOD_ONE = text(f'{{"a":{{{A}}}}}')


def sparse(header_length: int, header: bytes) -> Make:
    """A file that is as large as its claim, without the blocks."""

    def make(folder: Path) -> None:
        with (folder / WEIGHTS).open("wb") as file:
            file.write(header_length.to_bytes(8, "little") + header)
            file.truncate(8 + header_length)

    return make


def sharded(index: bytes | None = None, names: tuple[str, ...] = SHARDS, **extra: object) -> Make:
    """Two shards, one tensor each, and an index: a good one, or the bytes given."""

    def make(folder: Path) -> None:
        for tensor, name in zip("ab", names, strict=False):
            (folder / name).write_bytes(packed(spelled({tensor: entry()}), bytes(24)))
        good = {"metadata": {"total_size": 48}, "weight_map": dict(zip("ab", SHARDS, strict=True)), **extra}
        (folder / INDEX).write_bytes(spelled(good) if index is None else index)

    return make


def mapped(shard: object) -> Make:
    return sharded(weight_map={"a": SHARDS[0], "b": shard})


def replaced(make_other: Callable[[Path], object], name: str = SHARDS[1]) -> Make:
    """Something else where a shard should be."""

    def make(folder: Path) -> None:
        sharded()(folder)
        (folder / name).unlink()
        make_other(folder / name)

    return make


def beside(*names: str) -> Make:
    """More good files, of other tensors."""

    def make(folder: Path) -> None:
        GOOD_ONE(folder)
        for n, name in enumerate(names):
            (folder / name).write_bytes(packed(spelled({f"z{n}": entry()}), bytes(24)))

    return make


def bound_socket(path: Path) -> None:
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # a socket's path has 107 bytes at most
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def outside(folder: Path) -> Path:
    """A well-formed file beside the folder, which nobody was asked to read."""
    secret = folder.parent / f"{folder.name}-secret.safetensors"
    secret.write_bytes(packed(spelled({"b": entry()}), bytes(24)))
    return secret


GOOD_SHARDS = sharded()
DEEP = '{"a":' * 20_000 + "1" + "}" * 20_000
BIG = 1 << 20

ATTACKS = (
    # the file and its header's length
    Attack("an empty file", weights(b""), GOOD_FILE),
    Attack("seven bytes", weights(b"\x02\0\0\0\0\0\0"), weights(packed(b"{}"))),
    Attack("a header of no bytes", weights(packed(b"")), weights(packed(b"{}"))),
    Attack("a header longer than the file", weights(packed(b"{}", length=3)), weights(packed(b"{} "))),
    Attack("a header of 2^64-1 bytes", weights(packed(b"{}", length=2**64 - 1)), weights(packed(b"{}"))),
    Attack("a header of 2^63 bytes", weights(packed(b"{}", length=2**63)), weights(packed(b"{}"))),
    Attack("a sparse header of 100 GB", sparse(100 << 30, b"{"), weights(packed(b"{}"))),
    Attack("a sparse header of 64 MiB of NUL", sparse(64 << 20, b"{"), weights(packed(b"{}" + b" " * 4096))),
    Attack("data cut off by one byte", of(GOOD, DATA[:-1]), GOOD_FILE),
    Attack("data cut off in the header", weights(packed(spelled(GOOD))[:-20]), GOOD_FILE),
    Attack("one byte behind the data", of(GOOD, DATA + b"\0"), GOOD_FILE),
    Attack("a pickle", weights(b"\x80\x02cos\nsystem\nX\x02\0\0\0id\x85R." + bytes(64)), GOOD_FILE),
    Attack("a file of zeros", weights(bytes(4096)), GOOD_FILE),
    # the JSON
    Attack("a blank before the header", text(f' {{"a":{{{A}}}}}'), text(f'{{ "a":{{{A}}}}}')),
    Attack("a byte order mark", text(f'\ufeff{{"a":{{{A}}}}}'), GOOD_ONE),
    Attack("a NUL behind the header", text(f'{{"a":{{{A}}}}}\0'), text(f'{{"a":{{{A}}}}} ')),
    Attack("a newline behind the header", text(f'{{"a":{{{A}}}}}\n'), text(f'{{"a":{{{A}}}}} ')),
    Attack("a second object behind the header", text(f'{{"a":{{{A}}}}}{{}}'), GOOD_ONE),
    Attack("an array for a header", text("[]", b""), text("{}", b"")),
    Attack("a header in UTF-16", headed(f'{{"a":{{{A}}}}}'.encode("utf-16-le"), bytes(24)), GOOD_ONE),
    Attack("bytes that are no UTF-8", headed(b'{"__metadata__":{"k":"\xff"}}', b""), headed(b'{"__metadata__":{"k":"\xc3\xa9"}}', b"")),
    Attack("an overlong encoding", headed(b'{"__metadata__":{"k":"\xc0\xaf"}}', b""), headed(b'{"__metadata__":{"k":"/"}}', b"")),
    Attack("half a surrogate pair", text('{"__metadata__":{"k":"\\ud83d"}}', b""), text('{"__metadata__":{"k":"\\ud83d\\ude00"}}', b"")),
    Attack("a surrogate in UTF-8", text('{"__metadata__":{"k":"\ud83d"}}', b""), text('{"__metadata__":{"k":"\U0001f600"}}', b"")),
    Attack("NaN for an offset", text('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[NaN,24]}}'), GOOD_ONE),
    Attack("Infinity for an axis", text('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}'), GOOD_ONE),
    Attack("1e999 for an axis", text('{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,24]}}'), GOOD_ONE),
    Attack("an integer of 5000 digits", text(f'{{"a":{{"dtype":"F32","shape":[{"9" * 5000}],"data_offsets":[0,24]}}}}'), GOOD_ONE),
    Attack("minus zero for an offset", text('{"a":{"dtype":"F32","shape":[2,3],"data_offsets":[-0,24]}}'), GOOD_ONE),
    Attack("a leading zero", text('{"a":{"dtype":"F32","shape":[02,3],"data_offsets":[0,24]}}'), GOOD_ONE),
    Attack("a comment", text(f'{{"a":{{{A}}}/**/}}'), GOOD_ONE),
    Attack("a comma too many", text(f'{{"a":{{{A}}},}}'), GOOD_ONE),
    Attack("a tensor twice", text(f'{{"a":{{{A}}},"a":{{{A}}}}}'), text(f'{{"a":{{{A}}},"b":{{{A.replace("0,24", "24,48")}}}}}', bytes(48))),
    Attack("a tensor twice, once with an escape", text(f'{{"a":{{{A}}},"\\u0061":{{{A}}}}}'), text(f'{{"\\u0061":{{{A}}}}}')),
    Attack("a dtype twice", text(f'{{"a":{{"dtype":"U8",{A}}}}}'), GOOD_ONE),
    Attack("metadata twice", text('{"__metadata__":{},"__metadata__":{}}', b""), text('{"__metadata__":{}}', b"")),
    # its cost
    Attack("objects 20,000 deep", text(DEEP), GOOD_ONE),
    Attack("arrays ten million deep", large(lambda: b'{"a":' + b"[" * 10_000_000 + b"}"), GOOD_ONE),
    Attack("60 MB of empty objects", large(lambda: b'{"a":[' + b"{}," * 20_000_000 + b"{}]}"), text('{"__metadata__":{}}', b"")),
    Attack("750,000 empty objects", large(lambda: b'{"a":[' + b"{}," * 750_000 + b"{}]}"), text('{"__metadata__":{}}', b"")),
    Attack("three million numbers in a shape", large(lambda: b'{"a":{"shape":[' + b"1," * 3_000_000 + b"1]}}"), GOOD_ONE),
    Attack("a million flat keys", large(lambda: b"{" + b",".join(b'"%d":0' % n for n in range(1_000_000)) + b"}"), GOOD_ONE),
    Attack("a string of 30 MB", large(lambda: b'{"__metadata__":{"k":"' + b"x" * 30_000_000 + b'"}}'), text('{"__metadata__":{"k":"x"}}', b"")),
    Attack("30 MB of backslashes", large(lambda: b'{"__metadata__":{"k":"' + b"\\" * 30_000_000 + b'"}}'),
           text('{"__metadata__":{"k":"\\\\"}}', b"")),
    Attack("30 MB of quotes", large(lambda: b'{"a":' + b'"' * 30_000_000 + b"}"), GOOD_ONE),
    Attack("a quote that never ends", text('{"a":"' + "{" * 100_000 + "}"), GOOD_ONE),
    Attack("metadata of more than 1 MiB", of({"__metadata__": {"k": "x" * BIG}}, b""), of({"__metadata__": {"k": "x" * (BIG - 1)}}, b"")),
    Attack("20 MB with an emoji", large(lambda: ('{"__metadata__":{"k":"\U0001f600"}' + " " * 20_000_000 + "}").encode()),
           text('{"__metadata__":{"k":"\U0001f600"}}', b"")),
    # what it says of tensors
    Attack("two tensors in one place", of({"a": entry(), "b": entry()}, bytes(24)), GOOD_FILE),
    Attack("tensors that overlap by a byte", of({"a": entry(), "b": entry("U8", [9], [23, 32])}),
           of({"a": entry(), "b": entry("U8", [8], [24, 32])})),
    Attack("a gap between tensors", of({"a": entry(), "b": entry("U8", [7], [25, 32])}), of({"a": entry(), "b": entry("U8", [8], [24, 32])})),
    Attack("a gap before the first tensor", one(offsets=[8, 32], data=bytes(32)), GOOD_ONE),
    Attack("a hole for a file inside the file", of({"a": entry(), "b": entry("U8", [2], [30, 32])}), GOOD_FILE),
    Attack("an empty tensor beyond the end", of({"a": entry(), "b": entry("U8", [0], [99, 99])}, bytes(24)),
           of({"a": entry(), "b": entry("U8", [0], [24, 24])}, bytes(24))),
    Attack("an empty tensor inside another", of({"a": entry(), "b": entry("U8", [0], [8, 8])}, bytes(24)),
           of({"a": entry(), "b": entry("U8", [0], [0, 0])}, bytes(24))),
    Attack("offsets in reverse", one(offsets=[24, 0]), GOOD_ONE),
    Attack("a negative offset", one(offsets=[-24, 0]), GOOD_ONE),
    Attack("offsets of 2^64", one(offsets=[2**64, 2**64 + 24]), GOOD_ONE),
    Attack("a float for an offset", one(offsets=[0.0, 24]), GOOD_ONE),
    Attack("a float for an axis", one(shape=[2.0, 3]), GOOD_ONE),
    Attack("true for an axis", one(shape=[True, 6]), one(shape=[1, 6])),
    Attack("true for an offset", one("U8", [23], [True, 24]), one("U8", [24], [0, 24])),
    Attack("a string for an axis", one(shape=["2", 3]), GOOD_ONE),
    Attack("null for a shape", one(shape=None), GOOD_ONE),
    Attack("a nested shape", one(shape=[[2, 3]]), GOOD_ONE),
    Attack("three offsets", one(offsets=[0, 12, 24]), GOOD_ONE),
    Attack("a negative axis", one(shape=[-2, -3]), GOOD_ONE),
    Attack("a shape that is not its bytes", one(shape=[2, 4]), GOOD_ONE),
    Attack("an axis of 2^63", one(shape=[2**63], offsets=[0, 2**65]), GOOD_ONE),
    Attack("axes whose product wraps to 24 bytes", one("U8", [2**61 + 3, 8], [0, 24]), one("U8", [3, 8], [0, 24])),
    Attack("axes of 2^63 beside a zero", of({"a": entry(shape=[2**63, 2**63, 0], offsets=[0, 0])}, b""),
           of({"a": entry(shape=[2**20, 2**20, 0], offsets=[0, 0])}, b"")),
    Attack("nine axes", one(shape=[1, 1, 1, 1, 1, 1, 1, 2, 3]), one(shape=[1, 1, 1, 1, 1, 1, 2, 3])),
    Attack("a dtype that nobody knows", one("F33"), GOOD_ONE, UnsupportedError),
    Attack("a dtype of half bytes", one("F4", [48]), GOOD_ONE, UnsupportedError),
    Attack("a number for a dtype", one(32), GOOD_ONE),
    Attack("a member too many", text(f'{{"a":{{{A},"x":1}}}}'), GOOD_ONE),
    Attack("a member too few", text('{"a":{"dtype":"F32","shape":[2,3]}}'), GOOD_ONE),
    Attack("a number for a tensor", of({"a": 1}), GOOD_ONE),
    Attack("an array for a tensor", of({"a": ["F32", [2, 3], [0, 24]]}, bytes(24)), GOOD_ONE),
    Attack("a header that is a tensor", text(f"{{{A}}}"), GOOD_ONE),
    Attack("metadata that is a tensor", text(f'{{"__metadata__":{{{A}}}}}'), GOOD_ONE),
    Attack("a number in the metadata", of({"__metadata__": {"k": 1}}, b""), of({"__metadata__": {"k": "1"}}, b"")),
    Attack("null for metadata", of({"__metadata__": None}, b""), of({"__metadata__": {}}, b"")),
    Attack("a tensor without a name", of({"": entry()}, bytes(24)), GOOD_ONE),
    Attack("a control character in a name", of({"a\x1b[2J": entry()}, bytes(24)), of({"a[2J": entry()}, bytes(24))),
    Attack("a NUL in a name", of({"a\0b": entry()}, bytes(24)), GOOD_ONE),
    Attack("a name beyond ASCII", of({"\u202eweight": entry()}, bytes(24)), GOOD_ONE),
    Attack("a name of 513 characters", of({"n" * 513: entry()}, bytes(24)), of({"n" * 512: entry()}, bytes(24))),
    # the index
    Attack("an index with ..", mapped("../" + SHARDS[1]), GOOD_SHARDS),
    Attack("an index with an absolute path", mapped("/etc/passwd.safetensors"), GOOD_SHARDS),
    Attack("an index with a folder", mapped("sub/model.safetensors"), GOOD_SHARDS),
    Attack("an index with a backslash", mapped("..\\model.safetensors"), GOOD_SHARDS),
    Attack("an index with a NUL", mapped("model\0.safetensors"), GOOD_SHARDS),
    Attack("an index with a pickle", mapped("pytorch_model.bin"), GOOD_SHARDS),
    Attack("an index with a number", mapped(2), GOOD_SHARDS),
    Attack("an index with a missing file", mapped("model-00003-of-00003.safetensors"), GOOD_SHARDS),
    Attack("an index with a bad name", sharded(weight_map={"a\n": SHARDS[0]}), GOOD_SHARDS),
    Attack("an index without a weight_map", sharded(b"{}"), GOOD_SHARDS),
    Attack("an index whose weight_map is an array", sharded(weight_map=[]), GOOD_SHARDS),
    Attack("an index whose metadata are null", sharded(metadata=None), GOOD_SHARDS),
    Attack("an index with a tensor twice", sharded(f'{{"weight_map":{{"a":"{SHARDS[0]}","a":"{SHARDS[1]}"}}}}'.encode()), GOOD_SHARDS),
    Attack("an index 40 deep", sharded(b'{"metadata":' + b"[" * 40 + b"]" * 40 + b',"weight_map":{}}'), sharded(metadata={"x": [[[]]]})),
    Attack("an index of 60 MB of objects", large(lambda: b'{"metadata":[' + b"{}," * 20_000_000 + b"{}]}", INDEX), GOOD_SHARDS),
    Attack("an empty index", sharded(b""), GOOD_SHARDS),
    # the folder
    Attack("a pipe for a shard", replaced(os.mkfifo), GOOD_SHARDS),
    Attack("a pipe for the index", replaced(os.mkfifo, INDEX), GOOD_SHARDS),
    Attack("a socket for a shard", replaced(bound_socket), GOOD_SHARDS),
    Attack("a folder for a shard", replaced(Path.mkdir), GOOD_SHARDS),
    Attack("a link to /dev/zero", replaced(lambda path: path.symlink_to("/dev/zero")), GOOD_SHARDS),
    Attack("a link to itself", replaced(lambda path: path.symlink_to(path.name)), GOOD_SHARDS),
    Attack("a link to nothing", replaced(lambda path: path.symlink_to("nothing")), GOOD_SHARDS),
    Attack("a link out of the folder", replaced(lambda path: path.symlink_to(outside(path.parent))), GOOD_SHARDS),
    Attack("a relative link out of the folder", replaced(lambda path: path.symlink_to(f"../{outside(path.parent).name}")), GOOD_SHARDS),
    Attack("a link inside the folder", replaced(lambda path: path.symlink_to(SHARDS[0])), GOOD_SHARDS),
    Attack("a link to blobs that is in no snapshot", replaced(lambda path: path.symlink_to("../../blobs/" + "0" * 64)), GOOD_SHARDS),
    Attack("names that differ by case", beside(WEIGHTS.upper()), beside("other.safetensors")),
    Attack("names that differ by Unicode form", beside("cafe\u0301.safetensors", "caf\u00e9.safetensors"), beside("caf\u00e9.safetensors")),
    Attack("a file's name with a newline", beside("a\nb.safetensors"), beside("ab.safetensors")),
)  # fmt: skip


TOKENS = (
    b"0", b"1", b"-1", b"-0", b"24", b"32", b"1e1", b"1.0", b"18446744073709551616", b"999999999999999999999", b"true", b"null",
    b'"F32"', b'"U8"', b"BOOL", b"F16", b'"a"', b'"\\u0061"', b'"\\ud800"', b'"dtype"', b"__metadata__",
    b"[]", b"{}", b"[0,24]", b",", b":", b'"', b"\\", b"\xff", b" ", b"\n",
)  # fmt: skip


def benign(rng: random.Random) -> tuple[dict[str, object], bytes]:
    """A header's document and its data: up to five tensors of small shapes, with or without metadata."""
    document: dict[str, object] = {}
    if rng.random() < 0.5:
        document["__metadata__"] = {rng.choice("kl\u00e9"): rng.choice(["", "pt", '{"x":[1]}', "\\", '"'])}
    at = 0
    for name in rng.sample(["a", "b", "model.c", "d{", "e,]"], rng.randrange(6)):
        dtype, itemsize = rng.choice([("F32", 4), ("BF16", 2), ("U8", 1), ("I64", 8), ("BOOL", 1)])
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        size = itemsize
        for n in shape:
            size *= n
        document[name] = entry(dtype, shape, [at, at + size])
        at += size
    return document, bytes(at)


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Files that are nearly right: tokens replaced, numbers moved, bytes flipped, members swapped, ends cut. Some are right."""
    rng = random.Random(seed)
    for _ in range(count):
        document, data = benign(rng)
        names = list(document)
        rng.shuffle(names)  # an entry's place in the header says nothing about its data's
        header = bytearray(spelled({name: document[name] for name in names}))
        for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
            at = rng.randrange(len(header)) if header else 0
            kind = rng.randrange(5)
            if kind == 0:
                header[at : at + rng.randrange(6)] = rng.choice(TOKENS)
            elif kind == 1 and header:
                header[at] ^= 1 << rng.randrange(8)
            elif kind == 2 and any(48 <= c < 58 for c in header):
                digit = rng.choice([n for n, c in enumerate(header) if 48 <= c < 58])
                header[digit] = rng.choice(b"0123456789")
            elif kind == 3:
                header += rng.choice([b" ", b"  ", b"\n", b"\0", b"}"])
            else:
                other = rng.randrange(len(header)) if header else 0
                header[at:at] = header[other : other + rng.randrange(30)]
        length = len(header) + (rng.choice([-1, 1, 8]) if rng.random() < 0.05 else 0)
        data = data[: -1 - rng.randrange(4)] if rng.random() < 0.05 else data + bytes(rng.random() < 0.05)
        yield packed(bytes(header), data, max(0, length))
