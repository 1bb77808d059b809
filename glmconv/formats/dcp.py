"""torch.distributed.checkpoint's `.metadata`: which chunk of which tensor lies where. Read as plain data and checked; nothing is taken on trust.

Source: torch.distributed.checkpoint.metadata and .filesystem; megatron-core 0.15 names the root class MCoreMetadata, newer ones do not.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from glmconv.dtypes import BY_NAME, DType
from glmconv.errors import SourceError
from glmconv.formats import tiling
from glmconv.formats.dcp_records import CHUNK, INDEX, INFO, MODULE, OBJECT, PROPERTIES, TENSOR, Chunk, DcpMetadata, StoredObject, StoredTensor
from glmconv.formats.dcp_writer import write_metadata
from glmconv.formats.pickle_reader import LARGEST, Budget, Global, Object, read_pickle

__all__ = ["Chunk", "DcpMetadata", "StoredObject", "StoredTensor", "read_metadata", "write_metadata"]

BUDGET = Budget(32_000_000, 1 << 30)  # some 400,000 chunks, and as many of them in plans
CHUNKS = 1 << 20
KEY_LONGEST = 1024
RANK = 8
FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=-]{0,200}\.distcp\Z")
# How the pickle of a Metadata begins, whatever its protocol. Looked at first: a large budget is for what looks like one.
BEGINNING = re.compile(rb"\x80[\x02-\x05](\x95.{8})?(c|\x8c.)(torch\.distributed\.checkpoint\.metadata|megatron\.[\w.]{1,200})[\n\x94q]", re.DOTALL)
Size = tuple[int, ...]


@dataclass
class Places:
    """The storage records of one key: of its chunks, in any order, and of the object itself."""

    chunks: list[tuple[Size, str, int, int]]
    whole: StoredObject | None = None


def read_metadata(data: bytes, file: object, skip: Callable[[str], bool] = lambda key: False) -> DcpMetadata:
    """Read a `.metadata`. SourceError unless every chunk has its storage record and the reverse, and every tensor is tiled exactly once.

    Keys that `skip` names (a trainer's own state, which may be cut in ways that tile nothing) are left out, unchecked.
    """
    return _Metadata(file, skip).read(data)


class _Metadata:
    def __init__(self, file: object, skip: Callable[[str], bool]) -> None:
        self.file = file
        self.skip = skip

    def fail(self, what: str, key: str | None = None) -> NoReturn:
        raise SourceError(what, file=self.file, tensor=key)

    def read(self, data: bytes) -> DcpMetadata:
        if not BEGINNING.match(data):
            self.fail("is not a checkpoint's metadata.")
        root = read_pickle(data, file=self.file, limit=LARGEST, budget=BUDGET)
        if not isinstance(root, Object) or not _is_root(root.cls):
            self.fail("is not a checkpoint's metadata.")
        described, stored = root.field("state_dict_metadata"), root.field("storage_data")
        if not isinstance(described, dict) or not isinstance(stored, dict):
            self.fail("has no state_dict_metadata or no storage_data.")
        if len(stored) > CHUNKS or len(described) > CHUNKS:
            self.fail(f"has more than {CHUNKS:,} chunks.")
        places = self.places(stored)
        tensors: dict[str, StoredTensor] = {}
        objects: dict[str, StoredObject] = {}
        for key, entry in described.items():
            if not isinstance(key, str) or not 1 <= len(key) <= KEY_LONGEST:
                self.fail("has a key that is no name.")
            if self.skip(key):
                continue
            own = places.pop(key, None) or Places([])
            if isinstance(entry, Object) and entry.cls == OBJECT:
                objects[key] = self.whole(key, own)
            else:
                tensors[key] = self.tensor(key, entry, own)
        if places:
            self.fail("is stored, but nothing says what it is.", next(iter(places)))
        self.check_bytes(tensors, objects)
        return DcpMetadata(tensors, objects)

    def places(self, stored: Mapping[object, object]) -> dict[str, Places]:
        """The storage records by key. Nothing here hashes a number that the file chose."""
        found: dict[str, Places] = {}
        for index, where in stored.items():
            if not isinstance(index, Object) or index.cls != INDEX or not isinstance(where, Object) or where.cls != INFO:
                self.fail("has storage records of an unknown kind.")
            key, offsets = index.field("fqn"), index.field("offset")
            path, at, length = where.field("relative_path"), where.field("offset"), where.field("length")
            if not isinstance(key, str) or not 1 <= len(key) <= KEY_LONGEST:
                self.fail("has a key that is no name.")
            if self.skip(key):
                continue
            if not isinstance(path, str) or not FILE.match(path):
                self.fail(f"names the file {path!r}; a chunk lies in a .distcp file of the same folder." if isinstance(path, str) else NO_FILE, key)
            if where.field("transform_descriptors"):
                self.fail("is stored compressed or transformed.", key)
            if type(at) is not int or type(length) is not int or not 0 <= at < 2**62 or not 0 < length < 2**62:
                self.fail("has an offset or a length that is none.", key)
            own = found.setdefault(key, Places([]))
            if offsets is not None:
                own.chunks.append((self.size(offsets, key), path, at, length))
            elif own.whole is None:
                own.whole = StoredObject(path, at, length)
            else:
                self.fail("is stored twice.", key)
        return found

    def whole(self, key: str, own: Places) -> StoredObject:
        if own.whole is None or own.chunks:
            self.fail("is an object that is stored nowhere, or in chunks.", key)
        return own.whole

    def tensor(self, key: str, entry: object, own: Places) -> StoredTensor:
        if not isinstance(entry, Object) or entry.cls != TENSOR:
            self.fail("is neither a tensor nor an object.", key)
        if own.whole is not None:
            self.fail("is a tensor, but is stored as an object.", key)
        dtype = self.dtype(entry.field("properties"), key)
        shape, described = self.size(entry.field("size"), key), entry.field("chunks")
        if not isinstance(described, list):
            self.fail("has no list of chunks.", key)
        boxes = sorted(self.box(item, key) for item in described)
        own.chunks.sort()
        if [offsets for offsets, _ in boxes] != [place[0] for place in own.chunks]:
            self.fail("has a chunk that is stored nowhere, or a stored one that is none of its own.", key)
        wrong = tiling.problem(shape, boxes)
        if wrong:
            self.fail(f"{wrong}.", key)
        chunks = tuple(Chunk(offsets, sizes, *place[1:]) for (offsets, sizes), place in zip(boxes, own.chunks, strict=True))
        if any(chunk.length < math.prod(chunk.sizes) * dtype.itemsize for chunk in chunks):
            self.fail("has a chunk shorter than its elements.", key)
        return StoredTensor(dtype, shape, chunks)

    def dtype(self, properties: object, key: str) -> DType:
        """Of TensorProperties: the first of the tuple that is its state."""
        state = properties.state if isinstance(properties, Object) and properties.cls == PROPERTIES else None
        named = state[0] if isinstance(state, tuple) and state else (state.get("dtype") if isinstance(state, dict) else None)
        dtype = BY_NAME.get(named.name) if isinstance(named, Global) and named.module == "torch" else None
        if dtype is None:
            self.fail(f"has the dtype {named.name if isinstance(named, Global) else 'of no name'}, which is not known.", key)
        return dtype

    def box(self, item: object, key: str) -> tiling.Box:
        if not isinstance(item, Object) or item.cls != CHUNK:
            self.fail("has a chunk that is none.", key)
        return self.size(item.field("offsets"), key), self.size(item.field("sizes"), key)

    def size(self, value: object, key: str) -> Size:
        """A shape or an offset: torch.Size, a tuple or a list."""
        if isinstance(value, list):
            value = tuple(value)
        if not isinstance(value, tuple) or len(value) > RANK or not all(type(n) is int and 0 <= n < 2**48 for n in value):
            self.fail("has a shape or an offset that is none.", key)
        return value

    def check_bytes(self, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> None:
        """No two blobs share bytes."""
        ranges: dict[str, list[tuple[int, int, str]]] = {}
        for key, tensor in tensors.items():
            for chunk in tensor.chunks:
                ranges.setdefault(chunk.relative_path, []).append((chunk.offset, chunk.length, key))
        for key, stored in objects.items():
            ranges.setdefault(stored.relative_path, []).append((stored.offset, stored.length, key))
        for places in ranges.values():
            places.sort()
            for (begin, length, _), (after, _, key) in itertools.pairwise(places):
                if begin + length > after:
                    self.fail("shares bytes with another chunk.", key)


NO_FILE = "names no file; a chunk lies in a .distcp file of the same folder."


def _is_root(cls: object) -> bool:
    return isinstance(cls, Global) and ((cls.module, cls.name) == (MODULE, "Metadata") or (cls.name == "MCoreMetadata" and "megatron" in cls.module))
