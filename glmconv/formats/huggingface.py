"""Hugging Face folders: config.json, safetensors shards with or without an index, side files. The canonical names are this format's own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from glmconv import strict_json
from glmconv.archs import Model, preset_of
from glmconv.dtypes import DType
from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.engine.plan import OutputFile, Piece, Plan, Run, SmallFile
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.binding import canonical_dtype, expected, has_aliases, mismatch, model_dtype
from glmconv.formats.format import FileLayout, FileRows, Format, LayoutOptions, Opened, OpenOptions, RowReader, row_size
from glmconv.formats.safetensors_header import Header, read_header, read_index, write_header
from glmconv.formats.side_files import CONFIG, INDEX, output_files, side_files
from glmconv.formats.widen import Widened

SHARD_SIZE = 5_000_000_000
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
    refuse_quantized(config, path / CONFIG)
    shards = read_shards(folder, names)
    aliases = has_aliases(config, shards.home, path / CONFIG)
    wanted = expected(config, aliases=aliases, mtp=options.mtp, file=path / CONFIG)
    model = wanted.model
    numbers = {name: n for n, name in enumerate(shards.files)}
    stored = {t: shards.headers[file].tensors[t] for t, file in shards.home.items()}
    dtype = model_dtype(config, {name: t.dtype for name, t in stored.items()}, model)
    tensors: dict[str, RowReader] = {}
    wrong: list[tuple[str, str]] = []
    for name, tensor in model.tensors.items():
        if name not in stored:
            continue
        found, canonical = stored[name], canonical_dtype(tensor, dtype)
        if problem := mismatch(tensor, found.shape, found.dtype, canonical):
            wrong.append((name, problem))
            continue
        file = shards.home[name]
        rows = FileRows(shards.files[file], numbers[file], found.offset, found.shape, found.dtype, row_size(found.shape, found.dtype))
        tensors[name] = rows if found.dtype == canonical else Widened(rows, canonical)
    known = set(model.tensors) | set(wanted.dropped)
    side = side_files(folder, names, len(numbers))
    fingerprint = {
        "format": "hf",
        "files": {name: [file.size, shards.headers[name].digest] for name, file in shards.files.items()}
        | {n: list(d) for n, d in side.digests.items()},
    }
    return Opened(
        format="hf", path=path, config=config, config_bytes=config_bytes, model=model, tensors=tensors, folders=(folder,), fingerprint=fingerprint,
        missing=tuple(n for n in model.tensors if n not in stored), unexpected=tuple(n for n in stored if n not in known), wrong=tuple(wrong),
        dropped=tuple(n for n in wanted.dropped if n in stored), side_files=side.files, layout=shards.layout,
        notes=(*side.notes, *_ignored(config)), stored_bytes=sum(t.size for t in stored.values()),
    )  # fmt: skip


def refuse_quantized(config: Mapping[str, object], file: Path) -> None:
    """UnsupportedError for a checkpoint whose config says that it is quantized."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else quantization
        raise UnsupportedError(
            f"says that the weights are quantized ({method}); such sources are not read yet.", file=file, hint="Use the bf16 release."
        )


def _ignored(config: Mapping[str, object]) -> tuple[str, ...]:
    found = [field for field in IGNORED_FIELDS if field in config]
    return (f"config.json: {', '.join(found)} ignored (no code of a model is ever run)",) if found else ()


def config_for(opened: Opened, mtp: bool) -> bytes:
    """config.json as it is written: the source's own bytes, unless the MTP layers are dropped."""
    field = opened.model.spec.mtp_field
    if mtp or not opened.config.get(field):
        return opened.config_bytes
    return (json.dumps({**opened.config, field: 0}, indent=2, ensure_ascii=False) + "\n").encode()


def plan(opened: Opened, options: LayoutOptions) -> Plan:
    """Shards as the release has them, or of `file_size` bytes; side files as they are; index and config.json last."""
    layout = file_layout(opened, options)
    dtypes = {name: reader.dtype for name, reader in opened.tensors.items()}
    shapes = {name: reader.shape for name, reader in opened.tensors.items()}
    files = [_shard(name, metadata, order, dtypes, shapes) for name, metadata, order in layout.files]
    files += output_files(opened.side_files)
    marks = []
    if layout.index is not None:
        weight_map = {tensor: name for name, _, order in layout.files for tensor in order}
        total = sum(piece.payload for file in files for piece in file.pieces if piece.digested)
        index = {"metadata": {**layout.index, "total_size": total}, "weight_map": weight_map}
        marks.append(SmallFile(INDEX, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode()))
    marks.append(SmallFile(CONFIG, config_for(opened, options.mtp)))
    return Plan("hf", {"mtp": options.mtp}, opened.fingerprint, tuple(files), tuple(marks), opened.notes)


def _shard(
    name: str, metadata: Mapping[str, str], order: Iterable[str], dtypes: Mapping[str, DType], shapes: Mapping[str, tuple[int, ...]]
) -> OutputFile:
    order = list(order)
    pieces = []
    for tensor in order:
        shape = shapes[tensor]
        size = row_size(shape, dtypes[tensor]) * shape[0]
        pieces.append(Piece(tensor, dtypes[tensor].name, shape, size, (Run(tensor, 0, shape[0]),)))
    return OutputFile(name, write_header([(t, dtypes[t], shapes[t]) for t in order], metadata), tuple(pieces))


def file_layout(opened: Opened, options: LayoutOptions) -> FileLayout:
    """The release's own files where they are known and still fit what is written, else shards numbered from 00001."""
    names = list(opened.tensors)
    if opened.layout is not None and options.file_size is None:
        kept = [(name, metadata, tuple(t for t in order if t in opened.tensors)) for name, metadata, order in opened.layout.files]
        numbered = any(not order and "-of-" in name for name, _, order in kept)
        if not numbered and {t for _, _, order in kept for t in order} == set(names):
            return FileLayout(tuple(file for file in kept if file[2]), opened.layout.index)
    preset = preset_of(opened.config)
    apart = options.apart or (preset.mtp_file if preset else "")
    return sharded(opened.model, opened.tensors, options.file_size or SHARD_SIZE, apart)


def sharded(model: Model, tensors: Mapping[str, RowReader], file_size: int, mtp_file: str = "") -> FileLayout:
    """Tensors in the spec's order, a new shard when the next tensor would make it larger than `file_size` bytes."""
    shards: list[list[str]] = [[]]
    apart: list[str] = []
    filled = 0
    for name, reader in tensors.items():
        if mtp_file and model.tensors[name].mtp:
            apart.append(name)
            continue
        size = row_size(reader.shape, reader.dtype) * reader.shape[0]
        if filled and filled + size > file_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    metadata = {"format": "pt"}
    count = len(shards)
    names = ["model.safetensors"] if count == 1 and not apart else [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    files = [(name, metadata, tuple(order)) for name, order in zip(names, shards, strict=True)]
    files += [(mtp_file, metadata, tuple(apart))] if apart else []
    return FileLayout(tuple(files), {} if len(files) > 1 else None)


HUGGINGFACE = Format("hf", "Hugging Face safetensors", detect, open_folder, plan)
