"""The Hugging Face release behind a torch_dist checkpoint: its config, tokenizer and file layout, from wherever they lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glmconv import strict_json
from glmconv.engine.inputs import InputFolder
from glmconv.errors import SourceError
from glmconv.formats.format import FileLayout, RowReader
from glmconv.formats.huggingface import Shards, read_config, read_shards
from glmconv.formats.side_files import CONFIG, INDEX, side_files
from glmconv.formats.torch_dist_layout import LAYOUT, ORIGIN

NUMBERED_AFTER = 1 << 20  # side files' numbers lie behind any shard's
LAYOUT_LARGEST = 64 << 20


@dataclass(frozen=True)
class Origin:
    """What is known of the release; `config` None if nothing is."""

    config: Mapping[str, object] | None = None
    config_bytes: bytes = b""
    config_file: Path | None = None
    layout: FileLayout | None = None
    side_files: Mapping[str, RowReader] = field(default_factory=dict)
    digests: Mapping[str, list[object]] = field(default_factory=dict)
    folders: tuple[InputFolder, ...] = ()
    notes: tuple[str, ...] = ()


def find_origin(root: Path, iteration: Path, given: Path | None) -> Origin:
    """The given release, else what lies beside the weights: our own folder, then the iteration, then its root."""
    if given is not None:
        return _read(given, "--origin")
    for folder in (root / ORIGIN, iteration, root):
        if (folder / CONFIG).exists():
            if folder.name == ORIGIN and folder.is_symlink():
                raise SourceError("is a link.", file=folder, hint="Remove it, and name the folder that it leads to with --origin.")
            return _read(folder, "")
    return Origin()


def _read(path: Path, how: str) -> Origin:
    if how and not path.is_dir():
        raise SourceError("is not a folder.", file=path, hint="--origin names a folder or Hub id of a Hugging Face release.")
    folder = InputFolder(path)
    names = folder.names()
    config, data = read_config(folder)
    side = side_files(folder, names, NUMBERED_AFTER)
    digests = {f"{ORIGIN}/{name}": list(digest) for name, digest in side.digests.items()}
    return Origin(config, data, path / CONFIG, _layout(folder, names), side.files, digests, (folder,), side.notes)


def _layout(folder: InputFolder, names: list[str]) -> FileLayout | None:
    """From the layout that we left, or from the release's shards, or from its index alone (then in the index's order)."""
    if LAYOUT in names:
        file = folder.open(LAYOUT)
        return parse_layout(
            strict_json.parse(file.read(0, min(file.size, LAYOUT_LARGEST + 1)), file=folder.root / LAYOUT, limit=LAYOUT_LARGEST), folder.root / LAYOUT
        )
    if any(name.endswith(".safetensors") for name in names):
        shards: Shards = read_shards(folder, names)
        return shards.layout
    if INDEX in names:
        file = folder.open(INDEX)
        value = strict_json.parse(file.read(0, min(file.size, LAYOUT_LARGEST + 1)), file=folder.root / INDEX, limit=LAYOUT_LARGEST)
        return _from_index(value, folder.root / INDEX)
    return None


def _from_index(value: object, file: Path) -> FileLayout:
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict):
        raise SourceError("has no weight_map.", file=file)
    files: dict[str, list[str]] = {}
    for tensor, name in weight_map.items():
        files.setdefault(_shard_name(name, file), []).append(tensor)
    return FileLayout(tuple((name, {"format": "pt"}, tuple(order)) for name, order in sorted(files.items())), {})


def parse_layout(value: object, file: Path) -> FileLayout | None:
    """The layout file, checked like any other input: its names become file names."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("version") != 1 or not isinstance(value.get("files"), list):
        raise SourceError("is not a layout of version 1.", file=file)
    files, seen = [], set()
    for entry in value["files"]:
        if not (isinstance(entry, list) and len(entry) == 3 and isinstance(entry[1], dict) and isinstance(entry[2], list)):
            raise SourceError("has an entry that is not [name, metadata, tensors].", file=file)
        name, metadata, order = _shard_name(entry[0], file), entry[1], entry[2]
        if not all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items()) or not all(isinstance(t, str) for t in order):
            raise SourceError("has an entry that is not [name, metadata, tensors].", file=file)
        for once in (name, *order):
            if once in seen:
                raise SourceError(f"names {once[:300]} twice.", file=file)
            seen.add(once)
        files.append((name, metadata, tuple(order)))
    index = value.get("index")
    if index is not None and not isinstance(index, dict):
        raise SourceError("has an index that is no object.", file=file)
    return FileLayout(tuple(files), index)


def _shard_name(name: object, file: Path) -> str:
    good = (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and len(name) <= 200
        and not name.startswith(".")
        and "/" not in name
        and "\\" not in name
    )
    if not good or not isinstance(name, str) or not name.isprintable() or not name.isascii():
        raise SourceError(f"{name!r} cannot be the name of a shard.", file=file)
    return name
