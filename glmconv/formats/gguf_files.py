"""The files of a GGUF model: one, or a set `PREFIX-00001-of-0000N.gguf`, whose headers are read and held against each other.

Source: llama.cpp's src/llama-model-loader.cpp and tools/gguf-split for the names and the three keys of a set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.gguf_header import GgufHeader, GgufTensor, read_header
from glmconv.formats.gguf_split import PART, split_name
from glmconv.formats.gguf_types import Kind, Value

SUFFIX = ".gguf"
NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
SPLIT_KEYS = (NUMBER, COUNT, TENSORS)
MOST = 4096
AGAIN = "Is the download complete?"


@dataclass(frozen=True)
class StoredTensor:
    """One tensor where it lies: in a file, the `number`-th of its model's."""

    name: str
    file: InputFile
    number: int
    tensor: GgufTensor

    @property
    def place(self) -> tuple[int, int]:
        return self.number, self.tensor.offset


@dataclass(frozen=True)
class GgufFiles:
    """A model's files, opened and agreed. `kv` are the keys of the first, those of the set left out."""

    path: Path
    folder: InputFolder
    files: Mapping[str, InputFile]
    kv: Mapping[str, Value]
    tensors: Mapping[str, StoredTensor]
    digests: Mapping[str, str]  # of each file's header

    @property
    def fingerprint(self) -> dict[str, list[object]]:
        return {name: [file.size, self.digests[name]] for name, file in self.files.items()}

    @property
    def stored_bytes(self) -> int:
        return sum(stored.tensor.size for stored in self.tensors.values())


def models_in(folder: Path) -> list[str]:
    """The GGUF models of a folder, by their first files' names, but for the towers (mmproj) that lie beside them."""
    names = sorted(child.name for child in folder.iterdir() if child.name.lower().endswith(SUFFIX))
    first: dict[str, str] = {}
    for name in names:
        part = PART.fullmatch(name)
        first.setdefault(f"{part['prefix']}-of-{part['count']}" if part else name, name)
    return [name for name in first.values() if "mmproj" not in name.lower()]


def model_at(path: Path) -> Path:
    """The file that `path` means: itself, or the one model of a folder. UnsupportedError if a folder has several."""
    if not path.is_dir():
        return path
    found = models_in(path)
    if len(found) != 1:
        what = f"holds {len(found)} GGUF models ({', '.join(found[:4])})" if found else "holds no GGUF model"
        raise UnsupportedError(f"{what}.", file=path, hint="Name the one that is meant.")
    return path / found[0]


def open_files(path: Path) -> GgufFiles:
    """The file at `path` and those of its set. SourceError if one is missing, broken, or contradicts the others."""
    folder = InputFolder(path.parent)
    part = PART.fullmatch(path.name)
    names = _names_of_set(part, path) if part else [path.name]
    _refuse_missing(folder, names)
    found = {name: folder.open(name) for name in names}
    headers: dict[str, GgufHeader] = {}
    for number, (name, file) in enumerate(found.items()):
        header = read_header(file)
        _check_part(header, number, len(names) if part else 0, file.path)
        headers[name] = header if not number else replace(header, kv={key: header.kv[key] for key in SPLIT_KEYS})
    tensors = _merged(found, headers)
    if part:
        _check_total(headers, len(tensors), path)
    digests = {name: found[name].digest(min(header.data_start, found[name].size)) for name, header in headers.items()}
    kv = {key: value for key, value in headers[names[0]].kv.items() if key not in SPLIT_KEYS}
    return GgufFiles(path, folder, found, kv, tensors, digests)


def _names_of_set(part: re.Match[str], path: Path) -> list[str]:
    number, count = int(part["number"]), int(part["count"])
    if not 1 <= number <= count <= MOST:
        raise SourceError(f"names itself part {number} of {count}; a set has 1 to {MOST:,} parts.", file=path)
    return [split_name(f"{part['prefix']}{SUFFIX}", n, count) for n in range(count)]


def _refuse_missing(folder: InputFolder, names: list[str]) -> None:
    if len(names) == 1:
        return
    there = set(folder.names())
    missing = [name for name in names if name not in there]
    if missing:
        more = f", and {len(missing) - 1:,} more of the {len(names):,} parts" if len(missing) > 1 else f", one of {len(names):,} parts"
        raise SourceError(f"is missing{more}.", file=folder.root / missing[0], hint=AGAIN)


def _check_part(header: GgufHeader, number: int, count: int, path: Path) -> None:
    """Hold what a file says of its set (`count` parts; 0: it is alone) against its name."""
    stated = {key: _whole(header.kv[key], key, path) for key in SPLIT_KEYS if key in header.kv}
    if not count:
        if stated.get(COUNT, 0) > 1:
            what = f"is part {stated.get(NUMBER, 0) + 1} of {stated[COUNT]}, and its name does not say so."
            raise SourceError(what, file=path, hint="Give the parts their names back: NAME-00001-of-00002.gguf.")
        return
    for key, wanted in ((NUMBER, number), (COUNT, count)):
        if stated.get(key) != wanted:
            what = f"{key} is {stated[key]}" if key in stated else f"{key} is missing"
            raise SourceError(f"{what}; by its name it is {wanted}.", file=path, hint="Is the file named as it was downloaded?")
    if TENSORS not in stated:
        raise SourceError(f"{TENSORS} is missing.", file=path)


def _whole(value: Value, key: str, path: Path) -> int:
    if value.kind in (Kind.U16, Kind.I32, Kind.U32, Kind.I16, Kind.U64, Kind.I64) and isinstance(value.value, int):
        return value.value
    raise SourceError(f"{key} is no whole number.", file=path)


def _merged(files: Mapping[str, InputFile], headers: Mapping[str, GgufHeader]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for number, (name, header) in enumerate(headers.items()):
        for tensor, described in header.tensors.items():
            if tensor in tensors:
                raise SourceError(f"is in {tensors[tensor].file.name} too.", file=files[name].path, tensor=tensor)
            tensors[tensor] = StoredTensor(tensor, files[name], number, described)
    return tensors


def _check_total(headers: Mapping[str, GgufHeader], total: int, path: Path) -> None:
    for name, header in headers.items():
        stated = header.kv[TENSORS].value
        if stated != total:
            raise SourceError(f"{TENSORS} is {stated}, the set has {total:,} tensors.", file=path.parent / name, hint="Are all parts of one set?")
