"""GGUF files made of others: the same data under a header that was changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from glmconv import open_checkpoint
from glmconv.engine.inputs import InputFolder
from glmconv.formats.gguf_header import GgufHeader, padded, read_header, write_header
from glmconv.formats.gguf_metadata import embedded
from glmconv.formats.gguf_types import Entry, Kind
from glmconv.formats.torch_dist_layout import LAYOUT, layout_json
from tests.roundtrip.shards import INDEX, MANIFEST, contents

Change = Callable[[list[Entry], dict[str, tuple[object, tuple[int, ...], bytes]]], None]


def header(path: Path) -> GgufHeader:
    with InputFolder(path.parent) as folder:
        return read_header(folder.open(path.name))


def parts(path: Path) -> tuple[list[Entry], dict[str, tuple[object, tuple[int, ...], bytes]]]:
    """(keys, name -> (type, ne, bytes)) of a file."""
    found, raw = header(path), path.read_bytes()
    entries = [Entry(key, value.kind, value.value) for key, value in found.kv.items()]
    return entries, {name: (t.type, t.ne, raw[t.offset : t.offset + t.size]) for name, t in found.tensors.items()}


def written(path: Path, entries: list[Entry], tensors: Mapping[str, tuple[object, tuple[int, ...], bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    head = write_header(entries, [(name, kind, ne) for name, (kind, ne, _) in tensors.items()])  # type: ignore[misc]
    path.write_bytes(head + b"".join(data + bytes(padded(len(data)) - len(data)) for _, _, data in tensors.values()))
    return path


def changed(path: Path, out: Path, change: Change) -> Path:
    """A copy whose keys and tensors `change` has had in its hands."""
    entries, tensors = parts(path)
    change(entries, tensors)
    return written(out, entries, tensors)


def with_source(path: Path, source: Path, out: Path) -> Path:
    """A copy in which the files of the release `source` ride along, and how its tensors lay in files."""
    names = [name for name in sorted(contents(source)) if name.endswith((".json", ".jinja")) and name not in (INDEX, MANIFEST)]
    files = {name: (source / name).read_bytes() for name in names}
    with open_checkpoint(source) as opened:
        files[LAYOUT] = layout_json(opened.opened.layout)
    return changed(path, out, lambda entries, tensors: entries.extend(embedded(files)))


def split(path: Path, folder: Path, count: int, prefix: str = "model") -> list[Path]:
    """The file in `count` parts, as llama-gguf-split cuts: the keys in the first, those of the set in each."""
    entries, tensors = parts(path)
    names = list(tensors)
    made = []
    for number in range(count):
        chosen = names[number * len(names) // count : (number + 1) * len(names) // count]
        keys = [Entry("split.no", Kind.U16, number), Entry("split.tensors.count", Kind.I32, len(names)), Entry("split.count", Kind.U16, count)]
        made.append(
            written(
                folder / f"{prefix}-{number + 1:05d}-of-{count:05d}.gguf", [*(entries if not number else []), *keys], {n: tensors[n] for n in chosen}
            )
        )
    return made
