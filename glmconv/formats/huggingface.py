"""Hugging Face folders: config.json, safetensors shards with or without an index, side files. The canonical names are this format's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmconv import strict_json
from glmconv.archs import text_of
from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.binding import canonical_dtype, expected, has_aliases, mismatch, model_dtype
from glmconv.formats.coded import check_method, coded_tensors, config_notes
from glmconv.formats.format import FileLayout, FileRows, Format, Opened, OpenOptions, RowReader, row_size
from glmconv.formats.huggingface_layout import plan
from glmconv.formats.safetensors_header import Header, StoredTensor, read_header, read_index
from glmconv.formats.side_files import CONFIG, INDEX, side_files
from glmconv.formats.widen import Widened

CONFIG_LARGEST = 4 << 20
IGNORED_FIELDS = ("auto_map", "attn_implementation", "_attn_implementation")
PICKLES = (".bin", ".pt", ".pth")


def detect(path: Path) -> bool:
    """A folder with config.json or safetensors files in it."""
    return path.is_dir() and ((path / CONFIG).exists() or any(name.suffix == ".safetensors" for name in path.iterdir()))


def read_config(folder: InputFolder, name: str = CONFIG) -> tuple[Mapping[str, object], bytes]:
    """config.json, strictly; SourceError if it is missing, broken or not an object."""
    if not folder.exists(name):
        raise SourceError("is missing.", file=folder.root / name, hint="Take it from the model's release, or name the release with --origin.")
    file = folder.open(name)
    if file.size > CONFIG_LARGEST:
        raise SourceError(f"is {file.size:,} bytes; a config has at most {CONFIG_LARGEST:,}.", file=folder.root / name)
    data = file.read(0, file.size)
    value = strict_json.parse(data, file=folder.root / name, limit=CONFIG_LARGEST)
    if not isinstance(value, dict):
        raise SourceError("is not a JSON object.", file=folder.root / name)
    return value, data


@dataclass(frozen=True)
class Shards:
    """The safetensors files of a folder, their headers read: each tensor in exactly one of them."""

    files: Mapping[str, InputFile]
    headers: Mapping[str, Header]
    home: Mapping[str, str]  # tensor -> file
    index: Mapping[str, object] | None

    @property
    def layout(self) -> FileLayout:
        files = []
        for name, header in self.headers.items():
            order = sorted(header.tensors, key=lambda t: (header.tensors[t].offset, header.tensors[t].size))
            files.append((name, header.metadata, tuple(order)))
        return FileLayout(tuple(files), self.index)


def read_shards(folder: InputFolder, names: list[str]) -> Shards:
    """Every safetensors file of the folder, checked against the index if there is one."""
    shards = [name for name in names if name.endswith(".safetensors")]
    weight_map: Mapping[str, str] | None = None
    index: Mapping[str, object] | None = None
    if INDEX in names:
        file = folder.open(INDEX)
        weight_map, index = read_index(file.read(0, min(file.size, (64 << 20) + 1)), folder.root / INDEX, shards)
    if not shards:
        pickles = [name for name in names if name.endswith(PICKLES)]
        if pickles:
            raise UnsupportedError(
                "holds pickled weights, which run code when they are loaded; they are not read.", file=folder.root / pickles[0],
                hint="Save the model as safetensors first (transformers: save_pretrained).",
            )  # fmt: skip
        raise SourceError("has no .safetensors files.", file=folder.root, hint="Is the download complete?")
    files = {name: folder.open(name) for name in shards}
    headers = {name: read_header(file) for name, file in files.items()}
    home: dict[str, str] = {}
    for name, header in headers.items():
        for tensor in header.tensors:
            if tensor in home:
                raise SourceError(f"is in {home[tensor]} too.", file=folder.root / name, tensor=tensor, hint="Which one is right? Remove the other.")
            home[tensor] = name
            if weight_map is not None and weight_map.get(tensor, name) != name:
                raise SourceError(f"is here, the index says {weight_map[tensor]}.", file=folder.root / name, tensor=tensor)
    if weight_map is not None:
        _check_index(folder.root, weight_map, home)
    return Shards(files, headers, home, index)


def _check_index(root: Path, weight_map: Mapping[str, str], home: Mapping[str, str]) -> None:
    for tensor, name in weight_map.items():
        if tensor not in home:
            raise SourceError(f"is not in {name}, where the index has it.", file=root / INDEX, tensor=tensor, hint="Download that shard again.")
    for tensor, name in home.items():
        if tensor not in weight_map:
            hint = f"Is {INDEX} of this release, and {name} too?"
            raise SourceError("is not in the index.", file=root / name, tensor=tensor, hint=hint)


def open_folder(path: Path, options: OpenOptions) -> Opened:
    """Open a Hugging Face folder. SourceError, UnsupportedError on anything that is not as it should be; tensors are matched, not judged."""
    folder = InputFolder(path)
    names = folder.names()
    config, config_bytes = read_config(folder)
    check_method(config, path / CONFIG)
    shards = read_shards(folder, names)
    aliases = has_aliases(config, shards.home, path / CONFIG)
    wanted = expected(config, shards.home.__contains__, aliases=aliases, mtp=options.mtp, file=path / CONFIG)
    model = wanted.model
    numbers = {name: n for n, name in enumerate(shards.files)}
    stored = {t: _rows(shards.headers[file].tensors[t], shards.files[file], numbers[file]) for t, file in shards.home.items()}
    dtype = model_dtype(config, {name: t.dtype for name, t in stored.items()}, model)
    coded = coded_tensors(model, frozenset(wanted.dropped), stored, dtype, config, path)
    tensors: dict[str, RowReader] = {}
    wrong = list(coded.wrong)
    for name, tensor in model.tensors.items():
        if name in coded.readers:
            tensors[name] = coded.readers[name]
        if name not in stored or name in coded.taken:
            continue
        rows = stored[name]
        canonical = canonical_dtype(tensor, dtype, rows.dtype)
        if problem := mismatch(tensor, rows.shape, rows.dtype, canonical):
            wrong.append((name, problem))
            continue
        tensors[name] = rows if rows.dtype == canonical else Widened(rows, canonical)
    known = set(model.tensors) | set(wanted.dropped) | coded.taken
    there = {name for name in (*model.tensors, *wanted.dropped) if name in stored} | set(tensors) | {name for name, _ in coded.wrong}
    tied = True in (config.get("tie_word_embeddings"), text_of(model.spec, config).get("tie_word_embeddings"))
    if tied and "lm_head.weight" in model.tensors and "lm_head.weight" not in there:
        hint = "Untie them first, or take a release that stores lm_head.weight."
        raise UnsupportedError("ties lm_head to the embeddings; no release of this architecture does.", file=path / CONFIG, hint=hint)
    side = side_files(folder, names, len(numbers))
    fingerprint = {
        "format": "hf",
        "files": {name: [file.size, shards.headers[name].digest] for name, file in shards.files.items()}
        | {n: list(d) for n, d in side.digests.items()},
    }
    return Opened(
        format="hf", path=path, config=config, config_bytes=config_bytes, model=model, tensors=tensors, folders=(folder,), fingerprint=fingerprint,
        missing=tuple(n for n in model.tensors if n not in there), unexpected=tuple(n for n in stored if n not in known), wrong=tuple(wrong),
        dropped=tuple(n for n in wanted.dropped if n in stored or n in coded.left_out), side_files=side.files, layout=shards.layout,
        notes=(*wanted.notes, *side.notes, *_ignored(config), *config_notes(config, coded.readers, path / CONFIG)),
        stored_bytes=sum(t.row_size * t.shape[0] if t.shape else t.row_size for t in stored.values()),
    )  # fmt: skip


def _rows(stored: StoredTensor, file: InputFile, number: int) -> FileRows:
    return FileRows(file, number, stored.offset, stored.shape, stored.dtype, row_size(stored.shape, stored.dtype))


def _ignored(config: Mapping[str, object]) -> tuple[str, ...]:
    found = [field for field in IGNORED_FIELDS if field in config]
    return (f"config.json: {', '.join(found)} ignored (no code of a model is ever run)",) if found else ()


HUGGINGFACE = Format("hf", "Hugging Face safetensors", detect, open_folder, plan)
