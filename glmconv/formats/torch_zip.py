"""torch.save's files: one pickle and the tensors' bytes in a stored zip. Written as torch 2.13 writes them, read strictly, both without torch.

Source: torch/serialization.py (_save), torch/_utils.py (_rebuild_*), caffe2/serialize/inline_container.cc (writeSerializationId).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from functools import lru_cache

from glmconv.dtypes import BY_NAME, BY_STORAGE, DType
from glmconv.errors import SourceError
from glmconv.formats.pickle_reader import LARGEST, PLAIN_BUDGET, Budget, Global, Object, PersistentId, read_pickle
from glmconv.formats.pickle_writer import rebuilt_tensor, write_pickle
from glmconv.formats.zip_directory import Archive, Entry, ReadAt, read_archive
from glmconv.formats.zip_writer import Record, ZipWriter

# What PyTorchStreamWriter's hash of the record names gives, with and without one tensor; the second half of the id is that of their CRCs.
NAMES_WITH_TENSOR, NAMES_WITHOUT = "15728199511854643026", "02908468677762923104"
SMALL_RECORD = 64
TENSOR_PICKLE_LARGEST = 1 << 16  # that of one tensor is about 200 bytes long
TENSOR_BUDGET = Budget(20_000, 1 << 22)
REBUILD = tuple(Global("torch._utils", name) for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"))
PARAMETER = Global("torch._utils", "_rebuild_parameter")
UNTYPED = (Global("torch.storage", "UntypedStorage"), Global("torch", "UntypedStorage"))


def _begin(pickle: bytes) -> ZipWriter:
    made = ZipWriter()
    made.record("archive/data.pkl", pickle)
    made.record("archive/.format_version", b"1")
    made.record("archive/.storage_alignment", b"64")
    made.record("archive/byteorder", b"little")
    return made


def _end(made: ZipWriter, names: str) -> None:
    made.record("archive/version", b"3\n")
    made.record("archive/.data/serialization_id", f"{names}{made.combined_crc32():020d}".encode())
    made.finish()


@lru_cache(maxsize=4096)
def _before(dtype: DType, shape: tuple[int, ...]) -> tuple[bytes, tuple[Record, ...], int]:
    """(bytes before the payload, the records so far, offset of the payload's local header)."""
    made = _begin(write_pickle(rebuilt_tensor(dtype, shape)))
    offset = made.header("archive/data/0", math.prod(shape) * dtype.itemsize)
    return bytes(made.out), tuple(made.records), offset


@lru_cache(maxsize=4096)
def _size_after(dtype: DType, shape: tuple[int, ...]) -> int:
    return len(TorchSaveFrame(dtype, shape).after(0))


@dataclass(frozen=True, slots=True)
class TorchSaveFrame:
    """What stands around a tensor's bytes so that the whole is `torch.save(tensor)`, byte for byte. An `engine.plan.Frame`."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def payload(self) -> int:
        """Bytes of the tensor: its elements in C order, little-endian."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def size_before(self) -> int:
        return len(_before(self.dtype, self.shape)[0])

    @property
    def size_after(self) -> int:
        return _size_after(self.dtype, self.shape)

    def before(self) -> bytes:
        return _before(self.dtype, self.shape)[0]

    def after(self, crc32: int) -> bytes:
        """Data descriptor, last records and directory, for a payload with this CRC-32."""
        before, records, offset = _before(self.dtype, self.shape)
        made = ZipWriter(len(before) + self.payload, records=[*records])
        made.footer(Record("archive/data/0", crc32, self.payload, offset))
        _end(made, NAMES_WITH_TENSOR)
        return bytes(made.out)


def object_blob(value: object) -> bytes:
    """torch.save of data without tensors, as `pickle_writer` takes it."""
    made = _begin(write_pickle(value))
    _end(made, NAMES_WITHOUT)
    return bytes(made.out)


def _empty_tensor_in_a_list() -> bytes:
    made = _begin(write_pickle([rebuilt_tensor(BY_NAME["uint8"], (0,))]))
    made.record("archive/data/0", b"")
    _end(made, NAMES_WITH_TENSOR)
    return bytes(made.out)


EXTRA_STATE = _empty_tensor_in_a_list()  # torch.save([torch.empty(0, dtype=torch.uint8)]): what Transformer Engine itself writes


@dataclass(frozen=True)
class TensorBlob:
    """A tensor in a blob: its elements lie in C order at `payload_offset`, relative to the blob."""

    dtype: DType
    shape: tuple[int, ...]
    payload_offset: int
    payload_size: int


def _not_a_tensor(file: object, what: str) -> SourceError:
    return SourceError(f"holds {what}.", file=file)


def read_tensor_blob(read_at: ReadAt, size: int, *, file: object) -> TensorBlob:
    """Find the one tensor of a `torch.save(tensor)` blob without reading its elements. SourceError if it is anything else."""

    archive = read_archive(read_at, size, file)
    value = _pickle(archive, file, TENSOR_PICKLE_LARGEST, TENSOR_BUDGET)
    if isinstance(value, Object) and value.cls == PARAMETER and value.args:
        value = value.args[0]
    if not isinstance(value, Object) or value.cls not in REBUILD or len(value.args) < 4 or value.state is not None:
        raise _not_a_tensor(file, "something else than one tensor")
    storage, begin, shape, strides = value.args[:4]
    dtype, key, count = _storage(storage, value, file)
    entry = archive.entries.get(f"{archive.prefix}/data/{key}")
    if entry is None or entry.size != count * dtype.itemsize:
        raise _not_a_tensor(file, "a tensor whose storage is missing or of another size")
    if len(value.args) > 6 and value.cls == REBUILD[1] and value.args[6]:
        raise _not_a_tensor(file, "a tensor that is to be conjugated or negated")
    if not isinstance(shape, tuple) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
        raise _not_a_tensor(file, "a tensor whose shape is none")
    if type(begin) is not int or begin < 0 or begin + math.prod(shape) > count:
        raise _not_a_tensor(file, "a tensor that lies outside its storage")
    if not _contiguous(shape, strides):
        raise _not_a_tensor(file, "a tensor that is not contiguous")
    return TensorBlob(dtype, shape, entry.offset + begin * dtype.itemsize, math.prod(shape) * dtype.itemsize)


def _storage(storage: object, tensor: Object, file: object) -> tuple[DType, str, int]:
    """(dtype, key, number of elements) of the storage under a tensor. An untyped one counts bytes, and the tensor names its dtype."""
    if not isinstance(storage, PersistentId) or not isinstance(storage.value, tuple) or len(storage.value) != 5:
        raise _not_a_tensor(file, "a tensor without a storage")
    kind, cls, key, _, count = storage.value
    if kind != "storage" or not isinstance(cls, Global) or not isinstance(key, str) or type(count) is not int or not 0 <= count < 2**60:
        raise _not_a_tensor(file, "a tensor without a storage")
    if tensor.cls != REBUILD[2]:
        dtype = BY_STORAGE.get(cls.name) if cls.module == "torch" else None
    else:
        named = tensor.args[6] if len(tensor.args) > 6 and cls in UNTYPED else None
        dtype = BY_NAME.get(named.name) if isinstance(named, Global) and named.module == "torch" else None
        count, rest = divmod(count, dtype.itemsize) if dtype else (0, 0)
        if rest:
            raise _not_a_tensor(file, "a tensor whose storage ends within an element")
    if dtype is None:
        raise _not_a_tensor(file, f"a tensor of an unknown kind ({str(cls)[:100]})")
    return dtype, key, count


def _contiguous(shape: tuple[int, ...], strides: object) -> bool:
    """Whether these are the strides of C order; those of axes of size 1, or of no elements, do not matter."""
    if not isinstance(strides, tuple) or len(strides) != len(shape) or not all(type(n) is int for n in strides):
        return False
    step = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n > 1 and stride != step and 0 not in shape:
            return False
        step *= n
    return True


def read_object_blob(read_at: ReadAt, size: int, *, file: object) -> object:
    """The plain data of a `torch.save(object)`; tensors in it stay inert records."""
    return _pickle(read_archive(read_at, size, file), file, LARGEST, PLAIN_BUDGET)


def _pickle(archive: Archive, file: object, largest: int, budget: Budget) -> object:
    order = archive.entries.get(f"{archive.prefix}/byteorder")
    if order is not None and archive.read(order, 16) != b"little":
        raise SourceError("was saved on a big-endian machine.", file=file)
    for entry in archive.entries.values():
        if entry.size <= SMALL_RECORD:  # torch checks the versions and the id; without their CRC they would not be looked at
            _check_crc(archive.read(entry, SMALL_RECORD), entry, file)
    entry = archive.entries[f"{archive.prefix}/data.pkl"]
    data = archive.read(entry, largest)
    _check_crc(data, entry, file)
    return read_pickle(data, file=file, limit=largest, budget=budget)


def _check_crc(data: bytes, entry: Entry, file: object) -> None:
    """0 stands where torch was told to compute none (torch.serialization.set_crc32_options)."""
    if entry.crc32 and entry.crc32 != zlib.crc32(data):
        raise SourceError(f"is damaged: {entry.name} has another CRC-32 than its directory says.", file=file, hint="Copy or save it again.")
