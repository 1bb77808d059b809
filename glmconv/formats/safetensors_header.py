"""The safetensors header, read strictly and written as the library writes it, and the index of a model in several files.

Source: the format's description in the README of huggingface/safetensors: 8 bytes of little-endian length, JSON, the tensors' bytes. The
library accepts more than that (duplicate keys, arrays in place of objects, names of any length); what is accepted here it accepts as well.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeGuard

from glmconv.dtypes import BY_SAFETENSORS, DType
from glmconv.engine.inputs import InputFile, plain_name
from glmconv.errors import SourceError, UnsupportedError
from glmconv.strict_json import mapping, parse, string, strings

HEADER_LARGEST = 64 << 20
INDEX_LARGEST = 64 << 20
TENSORS = 262_144
RANK = 8
NAME_LONGEST = 512
METADATA_LARGEST = 1 << 20
METADATA = "__metadata__"
LEVELS = (TENSORS + 1, 3 * TENSORS + METADATA_LARGEST // 8, (RANK + 2) * TENSORS)  # tensors; their members, and metadata's; their numbers
SUFFIX = ".safetensors"
TENSOR_LARGEST = 1 << 60  # bytes; a shape with a 0 in it is held to this as well, or its strides overflow in whoever loads it
AGAIN = "Is it cut off? Download it again."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `size` bytes from `offset`, which counts from the file's begin."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """A checked header. `tensors` are in the order of their data, which they tile exactly from `data_start` to the end of the file.

    `metadata` is empty where there is none; `digest` is the sha256 of the header's JSON and its padding.
    """

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    data_start: int
    digest: str


class Entry(NamedTuple):
    """A tensor's description, of which only the keys are checked. Small: there may be a quarter of a million of them."""

    dtype: object
    shape: object
    offsets: object


def read_header(file: InputFile) -> Header:
    """The header of a safetensors file. SourceError says what is wrong with which tensor; UnsupportedError names an unknown dtype."""
    path = file.path
    raw = _read_json(file)
    value = parse(raw, file=path, limit=HEADER_LARGEST, values=sum(LEVELS), containers=3 * TENSORS + 2, levels=LEVELS, begin=8, build=_entry)
    entries = mapping(value, "the header", path)
    metadata = strings(entries.pop(METADATA, {}), METADATA, path)
    if sum(len(key.encode()) + len(item.encode()) for key, item in metadata.items()) > METADATA_LARGEST:
        raise SourceError(f"has more than {METADATA_LARGEST:,} bytes of {METADATA}.", file=path)
    if len(entries) > TENSORS:
        raise SourceError(f"has {len(entries):,} tensors; at most {TENSORS:,} are read.", file=path)
    start = 8 + len(raw)
    found = [(name, _tensor(name, entry, start, path)) for name, entry in entries.items()]
    found.sort(key=lambda item: (item[1].offset, item[1].size))
    _check_tiling(found, start, file.size, path)
    return Header(dict(found), metadata, start, hashlib.sha256(raw).hexdigest())


def _read_json(file: InputFile) -> bytes:
    """The header's JSON with its padding; its length is believed only as far as the file reaches."""
    if file.size < 8:
        raise SourceError(f"is {file.size} bytes long, too short for a safetensors file.", file=file.path, hint=AGAIN)
    length = int.from_bytes(file.read(0, 8), "little")
    if length > HEADER_LARGEST:
        what = f"says its header is {length:,} bytes long; at most {HEADER_LARGEST:,} are read."
        raise SourceError(what, file=file.path, offset=0, hint="Is it a safetensors file?")
    if length > file.size - 8:
        raise SourceError(f"says its header is {length:,} bytes long, but has {file.size - 8:,} behind that.", file=file.path, offset=0, hint=AGAIN)
    raw = file.read(8, length)
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise SourceError("has a header that is not one JSON object and then blanks.", file=file.path, offset=8)
    return raw


def _entry(members: dict[str, object]) -> object:
    """What the parser keeps of an object: a tensor's description is made small at once."""
    if members.keys() != {"dtype", "shape", "data_offsets"}:
        return members
    code, shape, offsets = members["dtype"], members["shape"], members["data_offsets"]
    if not isinstance(shape, list) or not isinstance(offsets, list):
        return members
    return Entry(BY_SAFETENSORS.get(code, code) if isinstance(code, str) else code, tuple(shape), tuple(offsets))


def _tensor(name: str, entry: object, start: int, path: Path) -> StoredTensor:
    if not tensor_name(name):
        raise SourceError(f"is no tensor's name: that is 1 to {NAME_LONGEST} printable ASCII characters.", file=path, tensor=name)
    if not isinstance(entry, Entry):
        raise SourceError("is not described by exactly a dtype, a shape and data_offsets.", file=path, tensor=name)
    dtype, shape, offsets = entry
    if isinstance(dtype, str):
        raise UnsupportedError(f"has the dtype {dtype[:40]}, which glmconv does not know.", file=path, tensor=name)
    if not isinstance(dtype, DType):
        raise SourceError("has a dtype that is not a string.", file=path, tensor=name)
    if not _whole_numbers(shape) or len(shape) > RANK:
        raise SourceError(f"has a shape that is not {RANK} whole numbers at most.", file=path, tensor=name)
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise SourceError("has data_offsets that are not two whole numbers.", file=path, tensor=name)
    size = math.prod(shape) * dtype.itemsize
    if (size or math.prod(filter(None, shape)) * dtype.itemsize) > TENSOR_LARGEST:
        raise SourceError(f"is {list(shape)}, which is too large.", file=path, tensor=name)
    begin, end = offsets
    if end - begin != size:
        raise SourceError(f"is {list(shape)} of {dtype}, {size:,} bytes, but lies from {begin:,} to {end:,}.", file=path, tensor=name)
    return StoredTensor(dtype, shape, start + begin, size)


def tensor_name(name: str) -> bool:
    return 1 <= len(name) <= NAME_LONGEST and name.isascii() and name.isprintable()


def _whole_numbers(values: object) -> TypeGuard[tuple[int, ...]]:
    return isinstance(values, tuple) and all(type(n) is int and n >= 0 for n in values)  # `isinstance` takes true for an int


def _check_tiling(tensors: Sequence[tuple[str, StoredTensor]], start: int, size: int, path: Path) -> None:
    """The tensors, in the order of their data, leave no gap, overlap or rest."""
    at = start
    for name, tensor in tensors:
        if tensor.offset != at:
            kind = "overlaps what lies before it" if tensor.offset < at else "leaves a gap before it"
            raise SourceError(f"{kind}: it begins at {tensor.offset - start:,} of the data, not at {at - start:,}.", file=path, tensor=name)
        at += tensor.size
    if at > size:
        raise SourceError(f"ends early: {at - size:,} bytes of {at:,} are missing.", file=path, hint=AGAIN)
    if at < size:
        raise SourceError(f"has {size - at:,} bytes behind its last tensor.", file=path, offset=at, hint="Download it again.")


def write_header(entries: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and header for tensors (name, dtype, shape) in the order of their data: the bytes that the library writes for that order.

    Empty metadata are left out, as if there were none: `read_header` does not tell the two apart.
    """
    document: dict[str, object] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        if name in document:
            raise ValueError(f"two tensors are called {name}")
        size = math.prod(shape) * dtype.itemsize
        document[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_index(data: bytes, file: Path, shard_names: Sequence[str]) -> tuple[Mapping[str, str], Mapping[str, object]]:
    """(tensor -> shard, metadata) of a model.safetensors.index.json. SourceError if it is broken or names a shard not among `shard_names`."""
    value = mapping(parse(data, file=file, limit=INDEX_LARGEST), "the index", file)
    metadata = mapping(value.get("metadata", {}), "metadata", file)
    weight_map: dict[str, str] = {}
    for tensor, shard in mapping(value.get("weight_map"), "weight_map", file).items():
        if not tensor_name(tensor):
            raise SourceError(f"is no tensor's name: that is 1 to {NAME_LONGEST} printable ASCII characters.", file=file, tensor=tensor)
        weight_map[tensor] = string(shard, f"the shard of {tensor}", file)
    named = dict.fromkeys(weight_map.values())
    for shard in named:
        if not plain_name(shard) or not shard.isascii() or not shard.endswith(SUFFIX) or shard.startswith("."):
            raise SourceError(f"names {shard[:300]!r}, which cannot be the name of a shard in this folder.", file=file)
    missing = sorted(named.keys() - set(shard_names))
    if missing:
        what = f"names {len(named)} files, of which {len(missing)} are not here, {missing[0]} first."
        raise SourceError(what, file=file, hint="Is the download complete?")
    return weight_map, metadata
