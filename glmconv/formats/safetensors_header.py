"""The safetensors header, read strictly and written as the library writes it.

Source: the format's own description (8 bytes of little-endian length, JSON, data); the library accepts more than it says (duplicate keys,
for one), we do not.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.dtypes import BY_SAFETENSORS, DType
from glmconv.engine.inputs import InputFile
from glmconv.errors import SourceError
from glmconv.strict_json import integer, parse, string, strings

HEADER_LARGEST = 64 << 20
INDEX_LARGEST = 64 << 20
TENSORS = 262_144
RANK = 8
METADATA_LARGEST = 1 << 20
NAME = re.compile(r"[\x20-\x7e]{1,512}\Z")
SHARD = re.compile(r"[\x21-\x2e\x30-\x5b\x5d-\x7e]{1,200}\.safetensors\Z")  # printable, no separator, no blank


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a file: `offset` is absolute, in bytes."""

    dtype: DType
    shape: tuple[int, ...]
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """A checked header: its tensors tile the file's data exactly. `digest` is the sha256 of the header's bytes."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]
    data_start: int
    digest: str


def read_header(file: InputFile) -> Header:
    """Read and check a file's header. SourceError says what is wrong with which tensor."""
    path = file.path
    if file.size < 8:
        raise SourceError(f"is {file.size} bytes long: too short for a safetensors file.", file=path, hint="Download it again.")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > HEADER_LARGEST:
        raise SourceError(f"says its header is {length:,} bytes long; at most {HEADER_LARGEST:,} are read.", file=path)
    if length > file.size - 8:
        raise SourceError(
            f"says its header is {length:,} bytes long, the file has {file.size:,}.", file=path, hint="Is it cut off? Download it again."
        )
    raw = file.read(8, length)
    if not raw.startswith(b"{") or not raw.rstrip(b" ").endswith(b"}"):
        raise SourceError("has a header that is no JSON object followed by blanks.", file=path, offset=8)
    value = parse(raw, file=path, limit=HEADER_LARGEST, depth=4)
    if not isinstance(value, dict) or len(value) > TENSORS + 1:
        raise SourceError(f"has more than {TENSORS:,} tensors.", file=path)
    metadata = strings(value.pop("__metadata__", {}), "__metadata__", path)
    if sum(len(k) + len(v) for k, v in metadata.items()) > METADATA_LARGEST:
        raise SourceError(f"has more than {METADATA_LARGEST:,} bytes of __metadata__.", file=path)
    start = 8 + length
    tensors = {name: _tensor(name, entry, start, path) for name, entry in value.items()}
    _check_tiling(tensors, start, file.size, path)
    return Header(tensors, metadata, start, hashlib.sha256(raw).hexdigest())


def _tensor(name: str, entry: object, start: int, path: Path) -> StoredTensor:
    if not NAME.match(name):
        raise SourceError(f"{name[:80]!r} is no tensor name: 1 to 512 printable ASCII characters.", file=path)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise SourceError("is not described by exactly dtype, shape and data_offsets.", file=path, tensor=name)
    code = entry["dtype"]
    if not isinstance(code, str) or code not in BY_SAFETENSORS:
        raise SourceError(f"has the dtype {str(code)[:40]!r}, which is not known.", file=path, tensor=name)
    dtype, shape, offsets = BY_SAFETENSORS[code], entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or len(shape) > RANK:
        raise SourceError(f"has no shape of at most {RANK} axes.", file=path, tensor=name)
    if not isinstance(offsets, list) or len(offsets) != 2:
        raise SourceError("has no data_offsets [begin, end].", file=path, tensor=name)
    axes = tuple(integer(n, f"{name}: an axis", path, 0, 2**48) for n in shape)
    begin, end = (integer(n, f"{name}: an offset", path) for n in offsets)
    size = math.prod(axes) * dtype.itemsize
    if end - begin != size:
        raise SourceError(f"is {list(axes)} {dtype}, {size:,} bytes, but lies from {begin:,} to {end:,}.", file=path, tensor=name)
    return StoredTensor(dtype, axes, start + begin, size)


def _check_tiling(tensors: Mapping[str, StoredTensor], start: int, size: int, path: Path) -> None:
    at = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
        if tensor.offset != at:
            kind = "overlaps the tensor before it" if tensor.offset < at else "leaves a gap before it"
            raise SourceError(f"{kind} (begins at {tensor.offset - start:,}, expected {at - start:,}).", file=path, tensor=name)
        at += tensor.size
    if at != size:
        what = f"is cut off: {at - size:,} bytes are missing" if at > size else f"has {size - at:,} bytes behind its last tensor"
        raise SourceError(f"{what}.", file=path, hint="Download it again.")


def write_header(entries: Sequence[tuple[str, DType, tuple[int, ...]]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length and header for tensors (name, dtype, shape) in the order of their data; the bytes that the library writes for that order."""
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        size = math.prod(shape) * dtype.itemsize
        document[name] = {"dtype": dtype.safetensors, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def read_index(data: bytes, file: Path, shards: Sequence[str]) -> tuple[Mapping[str, str], Mapping[str, object]]:
    """(tensor -> shard, metadata) of a model.safetensors.index.json whose shards must be among `shards`, the files that are there."""
    value = parse(data, file=file, limit=INDEX_LARGEST, depth=4)
    if not isinstance(value, dict) or not isinstance(value.get("weight_map"), dict):
        raise SourceError("has no weight_map.", file=file)
    metadata = value.get("metadata", {})
    if not isinstance(metadata, dict):
        raise SourceError("has metadata that are no object.", file=file)
    there = set(shards)
    weight_map: dict[str, str] = {}
    for tensor, name in value["weight_map"].items():
        shard = string(name, "a shard's name", file)
        if not SHARD.match(shard) or shard.startswith("."):
            raise SourceError(f"{shard[:200]!r} cannot be the name of a shard.", file=file, tensor=tensor)
        if shard not in there:
            raise SourceError(f"{shard} is in the index but not in the folder.", file=file, hint="Is the download complete?")
        weight_map[tensor] = shard
    return weight_map, metadata
