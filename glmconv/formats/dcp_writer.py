"""Writes a checkpoint's `.metadata`: the pickle of torch's Metadata, without torch, piece by piece.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py of torch 2.13; read back by FileSystemReader.read_metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from glmconv.dtypes import DType
from glmconv.formats.dcp_records import CHUNK, INDEX, INFO, METADATA, MODULE, OBJECT, PROPERTIES, SIZE, TENSOR, Chunk, StoredObject, StoredTensor
from glmconv.formats.pickle_reader import Global
from glmconv.formats.pickle_writer import integer

BATCH = 1000  # as Python's pickler: a reader's stack stays small


class Words:
    """What a large pickle repeats: each name, string and shape is written in full once and fetched from the memo afterwards."""

    def __init__(self) -> None:
        self.slots: dict[object, bytes] = {}

    def _put(self, value: object, written: bytes) -> bytes:
        slot = len(self.slots)
        self.slots[value] = b"h" + bytes([slot]) if slot < 256 else b"j" + slot.to_bytes(4, "little")
        return written + (b"q" + bytes([slot]) if slot < 256 else b"r" + slot.to_bytes(4, "little"))

    def text(self, value: str) -> bytes:
        known = self.slots.get(value)
        if known is not None:
            return known
        raw = value.encode("utf-8")
        return self._put(value, b"X" + len(raw).to_bytes(4, "little") + raw)

    def name(self, value: Global) -> bytes:
        return self.slots.get(value) or self._put(value, f"c{value.module}\n{value.name}\n".encode("ascii"))

    def size(self, value: tuple[int, ...]) -> bytes:
        """torch.Size(value); equal ones become one object, which nobody can change."""
        known = self.slots.get(value)
        if known is not None:
            return known
        name = self.name(SIZE)
        numbers = b"".join(integer(n) for n in value)
        made = {0: b")", 1: numbers + b"\x85", 2: numbers + b"\x86", 3: numbers + b"\x87"}.get(len(value), b"(" + numbers + b"t")
        return self._put(value, name + made + b"\x85R")

    def new(self, cls: Global) -> bytes:
        """An object of the class, and the beginning of its members; `ub` ends them."""
        return self.name(cls) + b")\x81}("

    def properties(self, dtype: DType) -> bytes:
        """TensorProperties of a plain CPU tensor: dtype, strided, no gradient, contiguous, not pinned."""
        layout = self.name(Global("torch.serialization", "_get_layout")) + self.text("torch.strided") + b"\x85R"
        memory_format = self.name(Global(MODULE, "_MEM_FORMAT_ENCODING")) + b"K\x00\x85R"
        return b"(" + self.name(Global("torch", dtype.name)) + layout + b"\x89" + memory_format + b"\x89t"

    def chunk(self, chunk: Chunk) -> bytes:
        return self.new(CHUNK) + self.text("offsets") + self.size(chunk.offsets) + self.text("sizes") + self.size(chunk.sizes) + b"ub"

    def tensor(self, tensor: StoredTensor) -> Iterator[bytes]:
        yield self.new(TENSOR) + self.text("properties") + self.name(PROPERTIES) + b")\x81" + self.properties(tensor.dtype) + b"b"
        yield self.text("size") + self.size(tensor.shape) + self.text("chunks") + b"]"
        yield from _batches((self.chunk(chunk) for chunk in tensor.chunks), b"e")
        yield b"ub"

    def place(self, key: str, offsets: tuple[int, ...] | None, stored: Chunk | StoredObject) -> bytes:
        """A line of storage_data: which chunk, and where it lies."""
        index = self.new(INDEX) + self.text("fqn") + self.text(key) + self.text("offset") + (b"N" if offsets is None else self.size(offsets))
        where = self.text("index") + b"Nub" + self.new(INFO) + self.text("relative_path") + self.text(stored.relative_path)
        return index + where + self.text("offset") + integer(stored.offset) + self.text("length") + integer(stored.length) + b"ub"


def _batches(items: Iterable[bytes], end: bytes) -> Iterator[bytes]:
    """The items, each thousand of them between a mark and `end`."""
    count = 0
    for count, item in enumerate(items, 1):
        yield b"(" + item if count % BATCH == 1 else item
        if count % BATCH == 0:
            yield end
    if count % BATCH:
        yield end


def _described(words: Words, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> Iterator[bytes]:
    for key, tensor in tensors.items():
        yield words.text(key) + b"".join(words.tensor(tensor))
    for key in objects:
        yield words.text(key) + words.name(OBJECT) + b")\x81"


def _places(words: Words, tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> Iterator[bytes]:
    for key, tensor in tensors.items():
        for chunk in tensor.chunks:
            yield words.place(key, chunk.offsets, chunk)
    for key, stored in objects.items():
        yield words.place(key, None, stored)


def write_metadata(tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> bytes:
    """The `.metadata` of a checkpoint. The same tensors and objects give the same bytes: torch's random save id is left out."""
    words = Words()
    out = bytearray(b"\x80\x02" + words.new(METADATA) + words.text("state_dict_metadata") + b"}")
    for part in _batches(_described(words, tensors, objects), b"u"):
        out += part
    out += words.text("planner_data") + b"N" + words.text("storage_data") + b"}"
    for part in _batches(_places(words, tensors, objects), b"u"):
        out += part
    out += words.text("storage_meta") + b"N" + words.text("version") + words.text("1.0.0") + b"ub."
    return bytes(out)
