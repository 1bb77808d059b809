"""A GGUF file in a few lines, so that two can be held against each other, or one against what another machine wrote down."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from glmconv.engine.inputs import InputFolder
from glmconv.formats.gguf_header import padded, read_header
from glmconv.formats.gguf_types import packed

FILE_TYPE, IMATRIX = "general.file_type", "quantize.imatrix."


@dataclass(frozen=True)
class Row:
    """A tensor of a file: its data by its sha256."""

    name: str
    type: str
    ne: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Content:
    """All that a GGUF file says. `keys`: (key, kind, its value's bytes), `rows`: the tensors, both in the file's order."""

    keys: Sequence[tuple[str, str, bytes]]
    rows: Sequence[Row]

    def without(self, keys: Container[str]) -> Content:
        return Content([entry for entry in self.keys if entry[0] not in keys], self.rows)

    def digest(self) -> dict[str, str]:
        """What is written down of a file: its tensors' types in runs, and two digests."""
        types = " ".join(f"{kind}*{len(list(run))}" for kind, run in groupby(row.type for row in self.rows))
        rows = "\n".join(f"{row.name} {row.type} {list(row.ne)} {row.sha256}" for row in self.rows)
        keys = b"".join(f"{key} {kind} {len(value)} ".encode() + value for key, kind, value in self.keys)
        return {"types": types, "tensors": hashlib.sha256(rows.encode()).hexdigest(), "metadata": hashlib.sha256(keys).hexdigest()}

    def listed(self) -> list[str]:
        """The metadata, a line each, long values by their digest: what all files of a model share."""
        values = {key: value.hex() if len(value) <= 16 else f"sha256 {hashlib.sha256(value).hexdigest()}" for key, _, value in self.keys}
        return [f"{key} {kind} {values[key]}" for key, kind, _ in self.keys if key != FILE_TYPE and not key.startswith(IMATRIX)]


def content(path: Path) -> Content:
    """Read a file; gaps and what lies behind the last tensor are the reader's to refuse. ValueError for padding that is not of zeros."""
    with InputFolder(path.parent) as folder:
        header = read_header(folder.open(path.name))
    data = path.read_bytes()
    rows = []
    for name, tensor in header.tensors.items():
        end = tensor.offset + tensor.size
        if any(data[end : tensor.offset + padded(tensor.size, header.alignment)]):
            raise ValueError(f"{path}: {name} is not padded with zeros")
        rows.append(Row(name, tensor.type.name, tuple(tensor.ne), hashlib.sha256(data[tensor.offset : end]).hexdigest()))
    return Content([(key, value.kind.name, packed(value.kind, value.value)) for key, value in header.kv.items()], rows)


def differences(ours: Content, theirs: Content) -> Iterator[str]:
    """What differs, a line each; nothing if the files are the same."""
    if ours == theirs:
        return
    a, b = {key: (kind, value) for key, kind, value in ours.keys}, {key: (kind, value) for key, kind, value in theirs.keys}
    yield from _of_maps("key", a, b)
    rows, others = {row.name: row for row in ours.rows}, {row.name: row for row in theirs.rows}
    yield from _of_maps("tensor", rows, others)


def _of_maps(what: str, ours: Mapping[str, object], theirs: Mapping[str, object]) -> Iterator[str]:
    yield from (f"{what} {name} is only in ours: {str(ours[name])[:200]}" for name in ours if name not in theirs)
    yield from (f"{what} {name} is only in theirs: {str(theirs[name])[:200]}" for name in theirs if name not in ours)
    both = [name for name in ours if name in theirs]
    if both != [name for name in theirs if name in ours]:
        yield f"the {what}s are in another order: {both} and {[name for name in theirs if name in ours]}"
    yield from (f"{what} {name}: {str(ours[name])[:200]} and {str(theirs[name])[:200]}" for name in both if ours[name] != theirs[name])
