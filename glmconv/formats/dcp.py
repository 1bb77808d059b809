"""torch.distributed.checkpoint's `.metadata`: which chunk of which tensor lies where. Read as plain data, written without torch.

Source: torch.distributed.checkpoint.metadata and .filesystem (Metadata, TensorStorageMetadata, MetadataIndex, _StorageInfo).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from glmconv.dtypes import BY_NAME, DType
from glmconv.errors import SourceError
from glmconv.formats.pickle_reader import Global, Object, read_pickle
from glmconv.formats.pickle_writer import write_pickle

MODULE = "torch.distributed.checkpoint.metadata"
STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Global("torch", "Size")
ROOTS = (f"{MODULE}.Metadata", "megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader.MCoreMetadata")
CHUNKS = 1 << 20
RANK = 8
FILE = re.compile(r"[A-Za-z0-9_.-]{1,200}\.distcp\Z")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor, and the blob that holds it: `offset` and `length` in bytes."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    relative_path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A global tensor and the chunks that tile it."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: Sequence[Chunk]


@dataclass(frozen=True, slots=True)
class StoredObject:
    """A pickled object, by the blob that holds it."""

    relative_path: str
    offset: int
    length: int


@dataclass(frozen=True)
class DcpMetadata:
    """All of a checkpoint's tensors and objects, by key."""

    tensors: Mapping[str, StoredTensor]
    objects: Mapping[str, StoredObject]


Spot = tuple[str, tuple[int, ...] | None]


def read_metadata(data: bytes, file: object, skip: Callable[[str], bool] = lambda key: False) -> DcpMetadata:
    """Read a `.metadata`. SourceError unless every chunk has its storage record and the reverse, and every tensor is tiled exactly once.

    Keys that `skip` names (a trainer's own state, which may be cut in ways that tile nothing) are left out, unchecked.
    """
    root = read_pickle(data, file=file)
    if not isinstance(root, Object) or not isinstance(root.cls, Global) or not root.cls.name.endswith("Metadata"):
        raise SourceError("is not a checkpoint's metadata.", file=file)
    described, stored = root.field("state_dict_metadata"), root.field("storage_data")
    if not isinstance(described, dict) or not isinstance(stored, dict):
        raise SourceError("has no state_dict_metadata or no storage_data.", file=file)
    spots = _spots(stored, file)
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredObject] = {}
    total = 0
    for key, entry in described.items():
        if not isinstance(key, str) or not 1 <= len(key) <= 1024:
            raise SourceError("has a key that is no string.", file=file)
        if skip(key):
            continue
        if isinstance(entry, Object) and entry.named(f"{MODULE}.BytesStorageMetadata"):
            objects[key] = StoredObject(*_take(spots, (key, None), file))
        else:
            tensors[key] = _tensor(key, entry, spots, file)
            total += len(tensors[key].chunks)
        if total > CHUNKS:
            raise SourceError(f"has more than {CHUNKS:,} chunks.", file=file)
    spots = {spot: place for spot, place in spots.items() if not skip(spot[0])}
    if spots:
        raise SourceError("is stored, but no tensor has such a chunk.", file=file, tensor=next(iter(spots))[0])
    _check_bytes(tensors, objects, file)
    return DcpMetadata(tensors, objects)


def _spots(stored: Mapping[object, object], file: object) -> dict[Spot, tuple[str, int, int]]:
    """(key, chunk offsets or None) -> (file, offset, length)."""
    spots: dict[Spot, tuple[str, int, int]] = {}
    for index, where in stored.items():
        if not isinstance(index, Object) or not index.named(f"{MODULE}.MetadataIndex") or not isinstance(where, Object) or where.cls != STORAGE_INFO:
            raise SourceError("has storage records of an unknown kind.", file=file)
        key, offset = index.field("fqn"), index.field("offset")
        path, at, length = where.field("relative_path"), where.field("offset"), where.field("length")
        if not isinstance(key, str) or not isinstance(path, str) or not FILE.match(path) or path.startswith("."):
            raise SourceError(f"names the file {str(path)[:200]!r}; a chunk lies in a .distcp file of the same folder.", file=file)
        if where.field("transform_descriptors"):
            raise SourceError("is stored compressed or transformed.", file=file, tensor=key)
        if not _whole(at) or not _whole(length) or not length:
            raise SourceError("has an offset or a length that is none.", file=file, tensor=key)
        spot = (key, None if offset is None else _size(offset, file, key))
        if spot in spots:
            raise SourceError("has the same chunk twice.", file=file, tensor=key)
        spots[spot] = (path, at, length)  # type: ignore[assignment]
    return spots


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def _size(value: object, file: object, key: str) -> tuple[int, ...]:
    if isinstance(value, Object) and value.named("torch.Size") and len(value.args) == 1:
        value = value.args[0]
    if isinstance(value, list):
        value = tuple(value)
    if not isinstance(value, tuple) or len(value) > RANK or not all(_whole(n) and n < 2**48 for n in value):
        raise SourceError("has a shape or an offset that is none.", file=file, tensor=key)
    return value


def _take(spots: dict[Spot, tuple[str, int, int]], spot: Spot, file: object) -> tuple[str, int, int]:
    found = spots.pop(spot, None)
    if found is None:
        raise SourceError("has a chunk that is stored nowhere.", file=file, tensor=spot[0])
    return found


def _tensor(key: str, entry: object, spots: dict[Spot, tuple[str, int, int]], file: object) -> StoredTensor:
    if not isinstance(entry, Object) or not entry.named(f"{MODULE}.TensorStorageMetadata"):
        raise SourceError("is neither a tensor nor an object.", file=file, tensor=key)
    properties, described = entry.field("properties"), entry.field("chunks")
    state = properties.state if isinstance(properties, Object) else None
    named = state[0] if isinstance(state, tuple) and state else (state.get("dtype") if isinstance(state, dict) else None)
    dtype = BY_NAME.get(named.name) if isinstance(named, Global) and named.module == "torch" else None
    if dtype is None:
        shown = named.name if isinstance(named, Global) else "of no name"
        raise SourceError(f"has the dtype {shown}, which is not known.", file=file, tensor=key)
    shape = _size(entry.field("size"), file, key)
    if not isinstance(described, list):
        raise SourceError("has no list of chunks.", file=file, tensor=key)
    chunks = []
    for item in described:
        if not isinstance(item, Object):
            raise SourceError("has a chunk that is none.", file=file, tensor=key)
        offsets, sizes = _size(item.field("offsets"), file, key), _size(item.field("sizes"), file, key)
        if len(offsets) != len(shape) or len(sizes) != len(shape) or any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            raise SourceError("has a chunk outside its shape.", file=file, tensor=key)
        chunks.append(Chunk(offsets, sizes, *_take(spots, (key, offsets), file)))
    _check_tiling(key, shape, chunks, file)
    return StoredTensor(dtype, shape, chunks)


def _check_tiling(key: str, shape: tuple[int, ...], chunks: Sequence[Chunk], file: object) -> None:
    """Volumes that add up and boxes that do not overlap tile the tensor exactly."""
    if sum(math.prod(chunk.sizes) for chunk in chunks) != math.prod(shape):
        raise SourceError("is not covered exactly once by its chunks.", file=file, tensor=key)
    if len(chunks) > 1 and _overlap([(chunk.offsets, chunk.sizes) for chunk in chunks if math.prod(chunk.sizes)], 0):
        raise SourceError("has chunks that overlap.", file=file, tensor=key)


def _overlap(boxes: list[tuple[tuple[int, ...], tuple[int, ...]]], axis: int) -> bool:
    """Whether two boxes share an element: cut the axis at every border, look at the next axis within each slab that holds several."""
    if len(boxes) < 2:
        return False
    if axis == len(boxes[0][0]):
        return True
    groups: dict[tuple[int, int], list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for box in boxes:
        groups.setdefault((box[0][axis], box[1][axis]), []).append(box)
    spans = sorted(groups)
    if all(a[0] + a[1] <= b[0] for a, b in itertools.pairwise(spans)):
        return any(_overlap(group, axis + 1) for group in groups.values())
    active: list[tuple[int, tuple[tuple[int, ...], tuple[int, ...]]]] = []
    for begin, length in spans:
        active = [item for item in active if item[0] > begin]
        for box in groups[begin, length]:
            if any(_boxes_meet(box, other, axis + 1) for _, other in active):
                return True
            active.append((begin + length, box))
    return False


def _boxes_meet(a: tuple[tuple[int, ...], tuple[int, ...]], b: tuple[tuple[int, ...], tuple[int, ...]], axis: int) -> bool:
    return all(a[0][n] < b[0][n] + b[1][n] and b[0][n] < a[0][n] + a[1][n] for n in range(axis, len(a[0])))


def _check_bytes(tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject], file: object) -> None:
    """No two blobs share bytes, and each is as long as its elements at least."""
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            if chunk.length < math.prod(chunk.sizes) * tensor.dtype.itemsize:
                raise SourceError("has a chunk shorter than its elements.", file=file, tensor=key)
            ranges.setdefault(chunk.relative_path, []).append((chunk.offset, chunk.length, key))
    for key, stored in objects.items():
        ranges.setdefault(stored.relative_path, []).append((stored.offset, stored.length, key))
    for places in ranges.values():
        places.sort()
        for (begin, length, _), (after, _, key) in itertools.pairwise(places):
            if begin + length > after:
                raise SourceError("shares bytes with another chunk.", file=file, tensor=key)


def write_metadata(tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> bytes:
    """The `.metadata` of a checkpoint, as torch's FileSystemReader reads it. Deterministic: no save id."""
    out = MetadataEmitter()
    out.parts.append(out.new("Metadata") + b"}(" + out.word("state_dict_metadata") + b"}(")
    for key, tensor in tensors.items():
        out.parts.append(out.key(key) + out.new("TensorStorageMetadata") + b"}(" + out.word("properties") + out.properties(tensor.dtype))
        out.parts.append(out.word("size") + out.size(tensor.shape) + out.word("chunks") + b"](")
        for c in tensor.chunks:
            made = out.new("ChunkStorageMetadata") + b"}("
            out.parts.append(made + out.word("offsets") + out.size(c.offsets) + out.word("sizes") + out.size(c.sizes) + b"ub")
        out.parts.append(b"eub")
    for key in objects:
        out.parts.append(out.key(key) + out.new("BytesStorageMetadata"))
    out.parts.append(b"u" + out.word("planner_data") + b"N" + out.word("storage_data") + b"}(")
    for key, tensor in tensors.items():
        for c in tensor.chunks:
            out.parts.append(out.index(key, out.size(c.offsets)) + out.info(c.relative_path, c.offset, c.length))
    for key, item in objects.items():
        out.parts.append(out.index(key, b"N") + out.info(item.relative_path, item.offset, item.length))
    out.parts.append(b"u" + out.word("storage_meta") + b"N" + out.word("version") + out.key("1.0.0") + b"ub.")
    return b"".join(out.parts)


class MetadataEmitter:
    """A pickle of some 10 MB for a large model, written piece by piece: names and classes are written once, then fetched from the memo."""

    def __init__(self) -> None:
        self.parts = [b"\x80\x02"]
        self.slots: dict[object, bytes] = {}
        self.sizes: dict[tuple[int, ...], bytes] = {}

    def known(self, value: object) -> bytes:
        """The value from the memo; written in full where it comes first."""
        return self.slots[value] if value in self.slots else self.put(value)

    def put(self, value: object) -> bytes:
        """The value, remembered in the next memo slot."""
        slot = len(self.slots)
        self.slots[value] = b"h" + bytes([slot]) if slot < 256 else b"j" + slot.to_bytes(4, "little")
        plain = write_pickle(value)[2:-1]  # without protocol and end; its own memo opcode (q and slot 0) is cut off too
        return plain[:-2] + b"r" + slot.to_bytes(4, "little")

    def word(self, text: str) -> bytes:
        return self.known(text)

    def key(self, text: str) -> bytes:
        return self.known(text)

    def new(self, name: str) -> bytes:
        return self.known(Global(MODULE, name)) + b")\x81"

    def size(self, numbers: tuple[int, ...]) -> bytes:
        """torch.Size((...))."""
        if numbers not in self.sizes:
            shape = write_pickle((numbers,))[2:-1] + b"R"
            if SIZE not in self.slots:
                return self.put(SIZE) + shape
            self.sizes[numbers] = self.slots[SIZE] + shape
        return self.sizes[numbers]

    def number(self, value: int) -> bytes:
        return write_pickle(value)[2:-1]

    def properties(self, dtype: DType) -> bytes:
        """TensorProperties of a plain CPU tensor: dtype, strided, no gradient, contiguous, not pinned."""
        made = self.new("TensorProperties")
        layout = b"ctorch.serialization\n_get_layout\n" + write_pickle(("torch.strided",))[2:-1].replace(b"q\x00", b"") + b"R"
        memory_format = f"c{MODULE}\n_MEM_FORMAT_ENCODING\n".encode() + b"K\x00\x85R"
        return made + f"(ctorch\n{dtype.name}\n".encode() + layout + b"\x89" + memory_format + b"\x89tb"

    def index(self, key: str, offset: bytes) -> bytes:
        made = self.new("MetadataIndex")
        fields = self.word("fqn") + self.key(key) + self.word("offset") + offset + self.word("index") + b"N"
        return made + b"}(" + fields + b"ub"

    def info(self, path: str, offset: int, length: int) -> bytes:
        info = self.known(STORAGE_INFO)
        place = self.word("relative_path") + self.key(path) + self.word("offset") + self.number(offset) + self.word("length") + self.number(length)
        return info + b")\x81}(" + place + b"ub"
