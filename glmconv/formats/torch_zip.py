"""torch.save's container: a stored zip with one pickle and the tensors' bytes. Written byte for byte as torch 2.13 writes it; read strictly.

Source: the bytes of torch.save (caffe2's PyTorchStreamWriter) and APPNOTE.TXT for zip. Payloads begin at multiples of 64; sizes and CRC-32
stand in a data descriptor behind each record and in the central directory, never in the local header.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from glmconv.dtypes import BY_STORAGE, DType
from glmconv.errors import SourceError
from glmconv.formats.pickle_reader import Global, Object, PersistentId, read_pickle
from glmconv.formats.pickle_writer import tensor_pickle, write_pickle
from glmconv.formats.zip_directory import Entry, ReadAt, read_directory

ALIGNMENT = 64
LARGEST = (1 << 32) - (1 << 20)  # zip64 records are not written: a chunk is far smaller
LOCAL, DESCRIPTOR, CENTRAL, END = b"PK\x03\x04", b"PK\x07\x08", b"PK\x01\x02", b"PK\x05\x06"
UTF8 = 0x0800  # names in UTF-8; an empty record has no more
FLAGS = 0x0808  # and sizes in a data descriptor
# What PyTorchStreamWriter's hash of the record names gives, with and without a tensor; the second half of the id is the hash of their CRCs
TENSOR_NAMES, PLAIN_NAMES = "15728199511854643026", "02908468677762923104"
PICKLE_LARGEST = 256 << 20
REBUILD = (Global("torch._utils", "_rebuild_tensor_v2"), Global("torch._utils", "_rebuild_tensor"))
PARAMETER = Global("torch._utils", "_rebuild_parameter")


@dataclass
class Zip:
    """A zip being written: the bytes so far, and the central directory's entries."""

    size: int = 0
    parts: list[bytes] | None = None
    central: list[tuple[str, int, int, int]] | None = None  # name, crc32, size, offset

    def __post_init__(self) -> None:
        self.parts, self.central = [], []

    def header(self, name: str, empty: bool = False) -> int:
        """Write a record's local header, padded so that its content is aligned; returns the header's offset."""
        assert self.parts is not None
        at = self.size
        padding = -(at + 30 + len(name) + 4) % ALIGNMENT
        extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self.put(struct.pack("<4s5H3I2H", LOCAL, 0, UTF8 if empty else FLAGS, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name.encode() + extra)
        return at

    def footer(self, name: str, crc32: int, size: int, offset: int) -> None:
        assert self.central is not None
        if size:
            self.put(struct.pack("<4s3I", DESCRIPTOR, crc32, size, size))
        self.central.append((name, crc32, size, offset))

    def record(self, name: str, content: bytes) -> None:
        at = self.header(name, empty=not content)
        self.put(content)
        self.footer(name, zlib.crc32(content), len(content), at)

    def put(self, data: bytes) -> None:
        assert self.parts is not None
        self.parts.append(data)
        self.size += len(data)

    def finish(self, names: str) -> None:
        """The version, the id, the central directory and its zip64 twin, which torch always writes."""
        assert self.central is not None
        self.record("archive/version", b"3\n")
        combined = 0
        for _, crc32, size, _ in self.central:
            if not size:
                continue
            combined = (combined ^ (crc32 + 0x9E3779B9 + (combined << 6) + (combined >> 2))) & 0xFFFFFFFFFFFFFFFF
        self.record("archive/.data/serialization_id", f"{names}{combined:020d}".encode())
        start = self.size
        for name, crc32, size, offset in self.central:
            self.put(
                struct.pack("<4s6H3I5H2I", CENTRAL, 0, 0, FLAGS if size else UTF8, 0, 0, 0, crc32, size, size, len(name), 0, 0, 0, 0, 0, offset)
                + name.encode()
            )
        length, count = self.size - start, len(self.central)
        end = self.size
        self.put(struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, length, start))
        self.put(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        self.put(struct.pack("<4s4H2IH", END, 0, 0, count, count, length, start, 0))

    def begin(self, pickle: bytes) -> None:
        self.record("archive/data.pkl", pickle)
        self.record("archive/.format_version", b"1")
        self.record("archive/.storage_alignment", b"64")
        self.record("archive/byteorder", b"little")

    def bytes(self) -> bytes:
        assert self.parts is not None
        return b"".join(self.parts)


def product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


@lru_cache(maxsize=4096)
def _before(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, tuple[tuple[str, int, int, int], ...], int]:
    """(bytes before the payload, central entries so far, offset of the payload's local header)."""
    made = Zip()
    made.begin(tensor_pickle(dtype, shape))
    at = made.header("archive/data/0", empty=not product(shape))
    assert made.central is not None
    return made.bytes(), tuple(made.central), at


@dataclass(frozen=True, slots=True)
class TorchSaveFrame:
    """What stands around a tensor's bytes so that the whole is `torch.save(tensor)`, byte for byte. An `engine.plan.Frame`."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def payload(self) -> int:
        return product(self.shape) * self.dtype.itemsize

    @property
    def size_before(self) -> int:
        return len(_before(self.dtype, self.shape)[0])

    @property
    def size_after(self) -> int:
        return _after_size(self.dtype, self.shape)

    def before(self) -> bytes:
        return _before(self.dtype, self.shape)[0]

    def after(self, crc32: int) -> bytes:
        """Data descriptor, last records and directory, for a payload with this CRC-32."""
        before, central, at = _before(self.dtype, self.shape)
        if self.payload > LARGEST:
            raise ValueError("a chunk of 4 GiB or more needs zip64")
        made = Zip(size=len(before) + self.payload)
        assert made.central is not None
        made.central += central
        made.footer("archive/data/0", crc32, self.payload, at)
        made.finish(TENSOR_NAMES)
        return made.bytes()


@lru_cache(maxsize=4096)
def _after_size(dtype: DType, shape: tuple[int, ...]) -> int:
    return len(TorchSaveFrame(dtype, shape).after(0))


def object_blob(value: object) -> bytes:
    """torch.save of plain data without tensors."""
    made = Zip()
    made.begin(write_pickle(value))
    made.finish(PLAIN_NAMES)
    return made.bytes()


def _empty_tensor_in_a_list() -> bytes:
    made = Zip()
    made.begin(tensor_pickle(BY_STORAGE["ByteStorage"], (0,), in_list=True))
    made.record("archive/data/0", b"")
    made.finish(TENSOR_NAMES)
    return made.bytes()


EXTRA_STATE = _empty_tensor_in_a_list()  # torch.save([torch.empty(0, dtype=torch.uint8)]): what Transformer Engine itself writes


@dataclass(frozen=True)
class TensorBlob:
    """A tensor in a blob: its elements lie contiguous at `payload_offset`, relative to the blob."""

    dtype: DType
    shape: tuple[int, ...]
    payload_offset: int
    payload_size: int


def read_tensor_blob(read_at: ReadAt, size: int, *, file: object) -> TensorBlob:
    """Find the one tensor of a `torch.save(tensor)` blob without reading its elements. SourceError if it is anything else."""
    entries, prefix = read_directory(read_at, size, file)
    value = _pickle(read_at, entries, prefix, file)
    if isinstance(value, Object) and value.cls == PARAMETER and value.args:
        value = value.args[0]
    if not isinstance(value, Object) or value.cls not in REBUILD or len(value.args) < 4:
        raise SourceError("holds something else than one tensor.", file=file)
    storage, begin, shape, strides = value.args[:4]
    if not isinstance(storage, PersistentId) or not isinstance(storage.value, tuple) or len(storage.value) != 5:
        raise SourceError("holds a tensor without a storage.", file=file)
    kind, cls, key, _, count = storage.value
    dtype = BY_STORAGE.get(cls.name) if isinstance(cls, Global) and cls.module == "torch" else None
    if kind != "storage" or dtype is None or not isinstance(key, str) or not isinstance(count, int):
        raise SourceError("holds a tensor of an unknown kind.", file=file)
    entry = entries.get(f"{prefix}/data/{key}")
    if entry is None or entry.size != count * dtype.itemsize:
        raise SourceError("holds a tensor whose storage is missing or of another size.", file=file)
    axes = _axes(shape, file)
    if not isinstance(begin, int) or isinstance(begin, bool) or begin < 0 or begin + product(axes) > count:
        raise SourceError("holds a tensor that lies outside its storage.", file=file)
    if not _contiguous(axes, strides):
        raise SourceError("holds a tensor that is not contiguous.", file=file)
    return TensorBlob(dtype, axes, entry.offset + begin * dtype.itemsize, product(axes) * dtype.itemsize)


def _axes(shape: object, file: object) -> tuple[int, ...]:
    if isinstance(shape, Object) and shape.cls == Global("torch", "Size") and len(shape.args) == 1:
        shape = shape.args[0]
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(isinstance(n, int) and 0 <= n < 2**48 for n in shape):
        raise SourceError("holds a tensor whose shape is none.", file=file)
    return shape


def _contiguous(shape: tuple[int, ...], strides: object) -> bool:
    step = 1
    if not isinstance(strides, tuple) or len(strides) != len(shape):
        return False
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != step and product(shape):
            return False
        step *= n
    return True


def read_object_blob(read_at: ReadAt, size: int, *, file: object) -> object:
    """The plain data of a `torch.save(object)`; tensors in it stay inert records."""
    entries, prefix = read_directory(read_at, size, file)
    return _pickle(read_at, entries, prefix, file)


def _pickle(read_at: ReadAt, entries: Mapping[str, Entry], prefix: str, file: object) -> object:
    order = entries.get(f"{prefix}/byteorder")
    if order is not None and (order.size > 16 or read_at(order.offset, order.size) != b"little"):
        raise SourceError("was saved on a big-endian machine.", file=file)
    entry = entries[f"{prefix}/data.pkl"]
    if entry.size > PICKLE_LARGEST:
        raise SourceError(f"has a pickle of {entry.size:,} bytes; at most {PICKLE_LARGEST:,} are read.", file=file)
    return read_pickle(read_at(entry.offset, entry.size), file=file)
