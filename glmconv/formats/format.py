"""What every format offers: a reader that names canonical tensors, and a layout that plans files. Formats are looked up in a registry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from glmconv.archs import Model
from glmconv.codecs.codec import Codec
from glmconv.dtypes import DType
from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.engine.plan import Plan
from glmconv.formats.gguf_options import GgufOptions
from glmconv.formats.gguf_types import Entry
from glmconv.formats.selection import QuantOptions

FILE_PREFIX = "file:"  # the engine reads a side file as the rows (bytes) of a "tensor" of this name


class RowReader(Protocol):
    """One canonical tensor as a source stores it; decodes on read, reads only the rows asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...
    @property
    def place(self) -> tuple[int, int]:
        """Number of the source file and offset where its bytes begin."""

    def read_into(self, start: int, out: memoryview) -> None:
        """Fill `out`, a whole number of rows, from row `start`. Raises SourceError."""


@dataclass(frozen=True)
class FileRows:
    """A tensor, or a side file as bytes, that lies whole and contiguous in one file."""

    file: InputFile
    number: int
    offset: int
    shape: tuple[int, ...]
    dtype: DType
    row_size: int

    @property
    def place(self) -> tuple[int, int]:
        return self.number, self.offset

    def read_into(self, start: int, out: memoryview) -> None:
        self.file.read_into(self.offset + start * self.row_size, out)


def row_size(shape: Sequence[int], dtype: DType) -> int:
    """Bytes of one row: of everything behind the first axis."""
    size = dtype.itemsize
    for n in shape[1:]:
        size *= n
    return size


def content_of(reader: RowReader) -> bytes:
    """All bytes of a side file or a small tensor. SourceError as of reading it."""
    content = bytearray(row_size(reader.shape, reader.dtype) * reader.shape[0])
    reader.read_into(0, memoryview(content))
    return bytes(content)


@dataclass(frozen=True)
class FileLayout:
    """How a Hugging Face release spreads its tensors over files: remembered, so that the way back gives the same files.

    `files`: (name, safetensors metadata, tensor names in data order); `index`: the index's metadata, None if the release has no index.
    """

    files: tuple[tuple[str, Mapping[str, str], tuple[str, ...]], ...]
    index: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Opened:
    """A folder read by its format: names, places and facts, no weights."""

    format: str
    path: Path
    config: Mapping[str, object]
    config_bytes: bytes
    model: Model
    tensors: Mapping[str, RowReader]
    folders: tuple[InputFolder, ...]
    fingerprint: Mapping[str, object]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    wrong: tuple[tuple[str, str], ...] = ()  # (tensor, what is wrong with it)
    dropped: tuple[str, ...] = ()  # MTP tensors left out on request
    side_files: Mapping[str, RowReader] = field(default_factory=dict)
    layout: FileLayout | None = None
    notes: tuple[str, ...] = ()
    stored_bytes: int = 0
    apart: tuple[str, ...] = ()  # canonical tensors that the format keeps in a file of their own, which was not given
    read: tuple[Path, ...] = ()  # files that no target may touch; empty: all of the folders
    entries: tuple[Entry, ...] = ()  # GGUF: its keys

    @property
    def roots(self) -> tuple[Path, ...]:
        """What a target must not lie in, or around."""
        return self.read or tuple(folder.root for folder in self.folders)


@dataclass(frozen=True)
class OpenOptions:
    """How to read: `mtp` False leaves the MTP layers out; `origin` is the release that a trainer's checkpoint came from, `dialect` the trainer's.

    `mmproj` is the GGUF file of the vision tower, which a GGUF source keeps apart.
    """

    mtp: bool = True
    origin: Path | None = None
    dialect: str = "auto"
    mmproj: Path | None = None


@dataclass(frozen=True)
class LayoutOptions:
    """How to write. `file_size`: bytes per file at most, None for the release's own layout or the format's default."""

    file_size: int | None = None
    chunk_size: int = 64 << 20  # of a DCP chunk, at most
    iteration: int | None = None
    mtp: bool = True
    dialect: str = "auto"
    apart: str = ""  # file for the MTP layers, where the release's layout is not known
    file_type: str = ""  # GGUF: the mix
    name: str = "model.gguf"  # GGUF: of the file
    gguf: GgufOptions = field(default_factory=GgufOptions)
    codec: Codec | None = None  # how linear weights are encoded; None: not at all
    quant: QuantOptions = field(default_factory=QuantOptions)


@dataclass(frozen=True)
class Format:
    """One registered format."""

    name: str
    title: str
    detect: Callable[[Path], bool]
    open: Callable[[Path, OpenOptions], Opened]
    plan: Callable[[Opened, LayoutOptions], Plan]
    readable: bool = True
    writable: bool = True
    manifest_at: Callable[[Path], Path] = lambda path: path  # the folder that holds the manifest of a checkpoint given by this path
