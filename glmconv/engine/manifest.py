"""The manifest: its presence is the only meaning of done. It vouches for every file and every tensor of an output, and for itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from glmconv.dtypes import BY_NAME
from glmconv.engine.files import Disk
from glmconv.engine.journal import (
    MANIFEST,
    Record,
    StoredTensor,
    checked_name,
    digest_field,
    is_count,
    read_whole,
    sealed,
    stored_tensor,
    unsealed,
)
from glmconv.engine.plan import Plan, sha256
from glmconv.errors import SourceError

FORMAT = "glmconv manifest 1"
LIMIT = 1 << 30
KEYS = {"digest", "format", "tool", "version", "plan_id", "to", "options", "source", "files", "tensors"}


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file of the output, by its size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class ManifestTensor(StoredTensor):
    """One tensor, with the file that holds it."""

    file: str


@dataclass(frozen=True)
class Manifest:
    """A read manifest. Everything in it has been checked for form; whether the files still fit it is `verify`'s question."""

    plan_id: str
    to: str
    version: str
    options: Mapping[str, object]
    source: Mapping[str, object]
    files: Mapping[str, StoredFile]
    tensors: Mapping[str, ManifestTensor]
    digest: str


def tool_version() -> str:
    try:
        return metadata.version("glmconv")
    except metadata.PackageNotFoundError:
        return "unknown"


def manifest_of(plan: Plan, records: Iterable[Record]) -> bytes:
    """The manifest's bytes. The same plan, records and tool version give the same bytes."""
    files: dict[str, object] = {mark.name: {"size": len(mark.content), "sha256": sha256(mark.content)} for mark in plan.marks}
    tensors: dict[str, object] = {}
    for record in records:
        files[record.name] = {"size": record.size, "sha256": record.sha256}
        for name, t in record.tensors.items():
            tensors[name] = {"dtype": t.dtype, "shape": list(t.shape), "sha256": t.sha256, "file": record.name, "offset": t.offset}
    head = {"format": FORMAT, "tool": "glmconv", "version": tool_version(), "plan_id": plan.id, "to": plan.to}
    return sealed({**head, "options": dict(plan.options), "source": dict(plan.source), "files": files, "tensors": tensors})


def load_manifest(disk: Disk, root: Path) -> Manifest:
    """The manifest of the output in `root`. FileNotFoundError if it is not finished, SourceError if one bit of the manifest is wrong."""
    path = root / MANIFEST
    document = unsealed(read_whole(disk, path, LIMIT), file=path, limit=LIMIT)
    if set(document) != KEYS or document["format"] != FORMAT or document["tool"] != "glmconv":
        raise SourceError("is not a manifest of this version of glmconv.", file=path)
    to, version = document["to"], document["version"]
    if not isinstance(to, str) or not isinstance(version, str) or len(to) > 256 or len(version) > 256:
        raise SourceError("to or version is not a short string.", file=path)
    files = {checked_name(name, root, path): stored_file(entry, path) for name, entry in mapping(document, "files", path).items()}
    tensors = {name: manifest_tensor(entry, path, name, files) for name, entry in mapping(document, "tensors", path).items()}
    options, source = mapping(document, "options", path), mapping(document, "source", path)
    return Manifest(digest_field(document, "plan_id", path), to, version, options, source, files, tensors, digest_field(document, "digest", path))


def mapping(document: Mapping[str, object], key: str, file: object) -> dict[str, object]:
    value = document[key]
    if not isinstance(value, dict):
        raise SourceError(f"{key} is not an object.", file=file)
    return value


def stored_file(entry: object, file: object) -> StoredFile:
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"} or not is_count(entry["size"]):
        raise SourceError("a file's entry is not {size, sha256}.", file=file)
    return StoredFile(entry["size"], digest_field(entry, "sha256", file))


def manifest_tensor(entry: object, file: object, name: str, files: Mapping[str, StoredFile]) -> ManifestTensor:
    """A tensor's entry, every member checked, its file among the manifest's and its first byte inside that."""
    if not 1 <= len(name) <= 4096 or not name.isprintable():
        raise SourceError("a tensor's name is empty, too long or not printable.", file=file)
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "sha256", "file", "offset"}:
        raise SourceError("is not {dtype, shape, sha256, file, offset}.", file=file, tensor=name)
    t = stored_tensor([entry["dtype"], entry["shape"], entry["sha256"], entry["offset"]], file, name)
    if t.dtype not in BY_NAME:
        raise SourceError("has a dtype that is not known.", file=file, tensor=name)
    home = files.get(entry["file"]) if isinstance(entry["file"], str) else None
    if home is None or t.offset > home.size:
        raise SourceError("lies in no file of the manifest.", file=file, tensor=name)
    return ManifestTensor(t.dtype, t.shape, t.sha256, t.offset, entry["file"])
