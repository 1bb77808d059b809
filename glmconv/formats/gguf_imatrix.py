"""llama.cpp's importance files: how much each input column of a weight mattered on some text. Two forms; values are read when they are asked for.

Source: llama.cpp's tools/imatrix/imatrix.cpp and tools/quantize/quantize.cpp. Large: GLM-5's is a gigabyte, so that no more than one weight's
values are held.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.errors import SourceError
from glmconv.formats.gguf_header import MAGIC, NAME_LONGEST, GgufHeader, read_header
from glmconv.formats.gguf_metadata import ImportanceOrigin
from glmconv.formats.gguf_types import Array, Kind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ENTRIES = 32_768
DATASET_LONGEST = 4096
SUMS, COUNTS = ".in_sum2", ".counts"
EMBEDDING = "token_embd.weight"
AGAIN = "Is it cut off? Make or download it again."


@dataclass(frozen=True, slots=True)
class StoredSums:
    """One weight's entry: `parts` rows of `columns` sums at `offset`, each to be divided by its count.

    counts: where these are; None if `calls` counts for all, and 0 calls mean that the sums are taken as they are
    """

    offset: int
    parts: int
    columns: int
    counts: int | None
    calls: int = 0


@dataclass(frozen=True)
class Importance:
    """An importance file. `entries` are by the weight's GGUF name; `name` is the file's own, without its folder."""

    file: InputFile
    entries: Mapping[str, StoredSums]
    dataset: str
    chunks: int
    name: str = ""

    @cached_property
    def digest(self) -> str:
        """The file's sha256."""
        found = self.file.digest()
        self.file.check_unchanged()
        return found

    @cached_property
    def unused(self) -> Mapping[str, int]:
        """Weight -> how many of its slices were never used, where some were not. Reads every value once: SourceError as of `values`."""
        found = {}
        for name, stored in self.entries.items():
            self._read(name, stored)
            if stored.counts is not None and (idle := sum(count == 0 for count in self._counts(name, stored.counts, stored.parts).flat)):
                found[name] = idle
        return found

    def of(self, name: str, slices: int, columns: int) -> WeightImportance | None:
        """A weight's values, not yet read: one row per expert or head. None if the file has no entry for it, SourceError for another size."""
        stored = self.entries.get(name)
        if stored is None:
            return None
        if stored.parts * stored.columns != slices * columns or stored.parts not in (1, slices):
            if name == EMBEDDING:  # which is looked up, not multiplied: llama.cpp ignores what is said of it
                return None
            what = f"has {stored.parts} x {stored.columns:,} values for a weight of {slices} x {columns:,}."
            raise SourceError(what, file=self.file.path, tensor=name, hint="Was it made from this model?")
        return WeightImportance(self, name, (slices, columns))

    def values(self, name: str, slices: int, columns: int) -> NDArray[np.float32] | None:
        """[slices, columns] float32, as `of` has them.

        A slice that was never used counts 1.0 throughout. SourceError for another size, or for a value that is not finite or below 0.
        """
        found = self.of(name, slices, columns)
        return None if found is None else found.read()

    def check(self) -> None:
        """Read every value once. SourceError as of `values`."""
        self.unused  # noqa: B018 - reads all

    def origin(self, path: str) -> ImportanceOrigin:
        """What a file that is quantized with it says of it; `path` as it is to be named there."""
        return ImportanceOrigin(path, self.dataset, len(self.entries), self.chunks)

    def _counts(self, name: str, offset: int, parts: int) -> NDArray[np.float32]:
        """[parts, 1]"""
        import numpy as np

        counts = np.frombuffer(self.file.read(offset, 4 * parts), "<f4")[:, None]
        if not np.isfinite(counts).all() or (counts < 0).any():
            raise SourceError("has a count that is not finite or below 0.", file=self.file.path, tensor=name)
        return counts

    def _read(self, name: str, stored: StoredSums) -> NDArray[np.float32]:
        import numpy as np

        raw = self.file.read(stored.offset, 4 * stored.parts * stored.columns)
        sums = np.frombuffer(raw, "<f4").reshape(stored.parts, stored.columns)
        if stored.counts is None:
            values = sums / np.float32(stored.calls) if stored.calls else sums
        else:
            counts = self._counts(name, stored.counts, stored.parts)
            with np.errstate(all="ignore"):
                values = np.where(counts > 0, sums / counts, np.float32(1))
        if not np.isfinite(values).all() or (values < 0).any():
            raise SourceError("has a value that is not finite or below 0.", file=self.file.path, tensor=name, hint="Make it again from other text.")
        return values.astype(np.float32, copy=False)


@dataclass(frozen=True)
class WeightImportance:
    """The values of one weight, read when they are needed; an encoder's `StoredImportance`. `shape` is (slices, columns)."""

    source: Importance
    name: str
    shape: tuple[int, int]

    @property
    def id(self) -> str:
        return f"of {self.name} in {self.source.digest}"

    def read(self) -> NDArray[np.float32]:
        """SourceError for a value that is not finite or below 0, or if the file is not the one that was opened any more."""
        values = self.source._read(self.name, self.source.entries[self.name])
        self.source.file.check_unchanged()
        return values.reshape(self.shape)


def open_importance(path: Path) -> Importance:
    """The importance file of this path, each of its values checked. SourceError says what is wrong with it.

    Links on the way are followed: the user named this file. It stays open as long as the result is held.
    """
    real = Path(os.path.realpath(path))
    found = replace(read_importance(InputFolder(real.parent).open(real.name)), name=path.name)
    found.check()
    return found


def read_importance(file: InputFile) -> Importance:
    """An importance file of either form, its values not yet read. SourceError says what is wrong with it."""
    if file.size >= 4 and file.read(0, 4) == MAGIC:
        return _read_gguf(file)
    return _read_old(file)


def _read_gguf(file: InputFile) -> Importance:
    header = read_header(file)
    kind = header.kv.get("general.type")
    if kind is None or kind.value != "imatrix":
        what = f"is a GGUF file of the type {str(kind.value)[:40] if kind else 'nothing'}, not imatrix."
        raise SourceError(what, file=file.path, hint="Is it a model?")
    datasets = header.kv.get("imatrix.datasets")
    named = datasets.value if datasets is not None else None
    if not isinstance(named, Array) or named.kind is not Kind.STRING:
        raise SourceError("has no list of strings imatrix.datasets.", file=file.path)
    chunks, _ = (_number(header, f"imatrix.{key}", file) for key in ("chunk_count", "chunk_size"))
    entries: dict[str, StoredSums] = {}
    for name, tensor in header.tensors.items():
        if not name.endswith((SUMS, COUNTS)):
            continue
        weight = name.removesuffix(SUMS).removesuffix(COUNTS)
        sums, counts = header.tensors.get(weight + SUMS), header.tensors.get(weight + COUNTS)
        if sums is None or counts is None:
            raise SourceError(f"has {SUMS if counts is None else COUNTS} alone.", file=file.path, tensor=weight)
        if tensor.type.name != "F32":
            raise SourceError(f"is {tensor.type.name}, F32 is needed.", file=file.path, tensor=name)
        parts = math.prod(sums.ne[1:])
        if math.prod(counts.ne) != parts:
            raise SourceError(f"has {math.prod(counts.ne):,} counts for {parts:,} rows of sums.", file=file.path, tensor=weight)
        entries[weight] = StoredSums(sums.offset, parts, sums.ne[0], counts.offset)
    if not entries:
        raise SourceError("has no entries.", file=file.path)
    return Importance(file, entries, next((text for text in named.values if isinstance(text, str)), ""), chunks)


def _number(header: GgufHeader, key: str, file: InputFile) -> int:
    found = header.kv.get(key)
    if found is None or found.kind is not Kind.U32 or not isinstance(found.value, int):
        raise SourceError(f"has no number {key} (U32).", file=file.path)
    return found.value


class _Words:
    """Reads the old form forwards."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.at = 0

    @property
    def left(self) -> int:
        return self.file.size - self.at

    def take(self, size: int) -> bytes:
        if size > self.left:
            raise SourceError(f"ends early: {size:,} bytes are needed, {self.left:,} are left.", file=self.file.path, offset=self.at, hint=AGAIN)
        self.at += size
        return self.file.read(self.at - size, size)

    def number(self, what: str, low: int, high: int) -> int:
        value: int = struct.unpack("<i", self.take(4))[0]
        if not low <= value <= high:
            what = f"says {what} is {value:,}, outside {low:,} to {high:,}."
            raise SourceError(what, file=self.file.path, offset=self.at - 4, hint="Is it an importance file of llama.cpp's?")
        return value

    def text(self, what: str, low: int, high: int) -> str:
        size = self.number(f"the length of {what}", low, high)
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise SourceError(f"has {what} that is not UTF-8.", file=self.file.path, offset=self.at - size) from None


def _read_old(file: InputFile) -> Importance:
    """The form of before 2025-07: numbers and names without a magic."""
    words = _Words(file)
    entries: dict[str, StoredSums] = {}
    for _ in range(words.number("the number of entries", 1, ENTRIES)):
        begin = words.at
        name = words.text("a weight's name", 1, NAME_LONGEST)
        if not name.isascii() or not name.isprintable():
            raise SourceError("has a weight's name that is not printable ASCII.", file=file.path, offset=begin)
        if name in entries:
            raise SourceError("is there twice.", file=file.path, tensor=name)
        calls = words.number(f"the calls of {name}", 0, 2**31 - 1)
        count = words.number(f"the values of {name}", 1, 2**31 - 1)
        if 4 * count > words.left:
            raise SourceError(f"has {count:,} values, more than fit into the file.", file=file.path, tensor=name, hint=AGAIN)
        entries[name] = StoredSums(words.at, 1, count, None, calls)
        words.at += 4 * count
    chunks, dataset = 0, ""
    if words.left:
        chunks = words.number("the number of chunks", 0, 2**31 - 1)
        dataset = words.text("the dataset's name", 0, DATASET_LONGEST)
    if words.left:
        raise SourceError(f"has {words.left:,} bytes behind its end.", file=file.path, offset=words.at)
    return Importance(file, entries, dataset, chunks)
