"""The nouns of torch.distributed.checkpoint's `.metadata`: tensors in chunks, objects, and the classes that its pickle names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glmconv.dtypes import DType
from glmconv.formats.pickle_reader import Global

MODULE = "torch.distributed.checkpoint.metadata"
METADATA = Global(MODULE, "Metadata")
TENSOR = Global(MODULE, "TensorStorageMetadata")
PROPERTIES = Global(MODULE, "TensorProperties")
CHUNK = Global(MODULE, "ChunkStorageMetadata")
OBJECT = Global(MODULE, "BytesStorageMetadata")
INDEX = Global(MODULE, "MetadataIndex")
INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
SIZE = Global("torch", "Size")


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
