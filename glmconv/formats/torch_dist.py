"""Megatron `torch_dist` folders: finds the iteration, the release it came from, and the rows of every canonical tensor in its DCP chunks."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from glmconv import strict_json
from glmconv.archs import Model, bind, spec_for
from glmconv.dtypes import DType
from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.engine.plan import sha256
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats import torch_dist_layout
from glmconv.formats.binding import canonical_dtype, expected, has_aliases, mismatch, model_dtype
from glmconv.formats.coded import QUANTIZATION
from glmconv.formats.common_pt import read_common
from glmconv.formats.dcp import DcpMetadata, StoredTensor, read_metadata
from glmconv.formats.dcp_rows import Boxes, ChunkedRows, Stretch
from glmconv.formats.dialects import known_as, read_as
from glmconv.formats.format import FileLayout, Format, Opened, OpenOptions, RowReader
from glmconv.formats.megatron_args import to_config
from glmconv.formats.megatron_keys import COMMON_STATE, MegatronTensor, is_optimizers, is_trainers, megatron_tensors, spellings, stacked_spelling
from glmconv.formats.origin import Origin, find_origin
from glmconv.formats.run_config import RUN_CONFIG, read_run_config
from glmconv.formats.side_files import CONFIG
from glmconv.formats.torch_dist_layout import BACKEND, COMMON, METADATA, TRACKER
from glmconv.formats.widen import Widened

METADATA_LARGEST = 256 << 20
ITERATION = re.compile(r"^(release|iter_(\d{1,10}))$")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint's parts lie: `root` has the tracker, `iteration` the chunks; they may be the same folder."""

    root: Path
    iteration: Path


def is_iteration(path: Path) -> bool:
    return (path / METADATA).is_file() or (path / "metadata.json").is_file()


def locate(path: Path) -> Place | None:
    """The iteration that `path` names: itself, or the one its tracker names (by number, whatever the zero padding), or its newest."""
    if is_iteration(path):
        return Place(path.parent if ITERATION.match(path.name) else path, path)
    if not path.is_dir():
        return None
    found: dict[int, Path] = {}
    for child in path.iterdir():
        match = ITERATION.match(child.name)
        if match and is_iteration(child):
            number = int(match[2]) if match[2] else -1
            if number in found:
                raise SourceError(f"is the same iteration as {found[number].name}.", file=child, hint="Pass the one that is meant.")
            found[number] = child
    tracker = path / TRACKER
    if tracker.is_file() and not tracker.is_symlink():
        with tracker.open("rb") as file:
            named = file.read(64).decode("ascii", "replace").strip()
        if named != "release" and not re.fullmatch(r"\d{1,10}", named):
            raise SourceError(f"names {named!r}; it must be 'release' or an iteration's number.", file=tracker)
        number = -1 if named == "release" else int(named)
        if number not in found:
            raise SourceError(
                f"names {named}, but there is no such finished folder beside it.", file=tracker, hint="Pass the iteration's folder itself."
            )
        return Place(path, unlinked(found[number]))
    return Place(path, unlinked(found[max(found)])) if found else None


def same_number(path: Path) -> Path:
    """The folder of the iteration that `path` names, if it is there under another zero padding: documents write eight digits, Megatron seven."""
    named = ITERATION.match(path.name)
    if not named or not named[2] or path.exists() or not path.parent.is_dir():
        return path
    there = [child for child in path.parent.iterdir() if (match := ITERATION.match(child.name)) and match[2] and int(match[2]) == int(named[2])]
    return there[0] if len(there) == 1 else path


def unlinked(folder: Path) -> Path:
    """The folder. SourceError if it is a link: it may lead out of the checkpoint."""
    if folder.is_symlink():
        raise SourceError("is a link.", file=folder, hint="Pass the folder that it leads to.")
    return folder


def detect(path: Path) -> bool:
    """A folder with an iteration in it, or one that is an iteration, even a broken one if nothing else speaks for another format."""
    if not path.is_dir():
        return False
    if is_iteration(path) or (path / TRACKER).is_file():
        return True
    inside = [child for child in path.iterdir() if ITERATION.match(child.name)]
    return any(map(is_iteration, inside)) or (bool(inside) and not (path / CONFIG).exists())


def manifest_at(path: Path) -> Path:
    place = locate(path)
    return place.root if place else path


def open_folder(path: Path, options: OpenOptions) -> Opened:
    """Open a torch_dist checkpoint. SourceError or UnsupportedError if it is broken or not GLM's; tensors are matched, not judged."""
    place = locate(path)
    if place is None:
        raise SourceError("has no iteration with .metadata in it.", file=path, hint="Was the save finished?")
    folder = InputFolder(place.iteration)
    metadata_file = folder.open(METADATA)
    if metadata_file.size > METADATA_LARGEST:
        raise SourceError(f"is {metadata_file.size:,} bytes; at most {METADATA_LARGEST:,} are read.", file=place.iteration / METADATA)
    raw = metadata_file.read(0, metadata_file.size)
    check_backend(folder)
    metadata = read_metadata(raw, place.iteration / METADATA, is_optimizers)
    origin = find_origin(place.root, place.iteration, options.origin)
    config, config_bytes, notes = config_of(folder, origin, metadata)
    file = origin.config_file or place.iteration
    aliases = bool(origin.layout) and _layout_has_aliases(origin.layout, config, place.iteration)
    opened_names = sorted({chunk.relative_path for stored in metadata.tensors.values() for chunk in stored.chunks})
    files = {name: (folder.open(name), number) for number, name in enumerate(opened_names)}
    refuse_cut(metadata, {name: file.size for name, (file, _) in files.items()}, place.iteration)
    keys = {key: stored for key, stored in metadata.tensors.items() if not is_trainers(key)}
    whole = bind(spec_for(config, file), config, aliases=aliases, file=file)
    by_dialect = {dialect: Matched(whole, keys, files, dialect) for dialect in whole.spec.dialects.values()}
    all_there = by_dialect[read_as(whole.spec, options.dialect, lambda dialect: len(by_dialect[dialect].stored_keys), place.iteration)]
    wanted = expected(config, all_there.canonical.__contains__, aliases=aliases, mtp=options.mtp, file=file, whole=whole)
    matched = all_there if wanted.model is whole else Matched(wanted.model, keys, files, all_there.dialect)
    tensors, wrong = matched.readers(config)
    if len(set(whole.spec.dialects.values())) > 1:
        notes = (*notes, f"read as Megatron dialect {known_as(whole.spec, matched.dialect)}")
    dropped_keys = all_there.stored_keys - matched.used if wanted.dropped else set()
    fingerprint = {
        "format": "torch_dist",
        "files": {METADATA: [len(raw), sha256(raw)]} | {name: [file.size, ""] for name, (file, _) in files.items()} | dict(origin.digests),
    }
    return Opened(
        format="torch_dist", path=path, config=config, config_bytes=config_bytes, model=wanted.model, tensors=tensors,
        folders=(folder, *origin.folders), fingerprint=fingerprint, missing=tuple(matched.missing), wrong=tuple(wrong),
        unexpected=tuple(sorted(set(keys) - matched.used - dropped_keys)), dropped=wanted.dropped if dropped_keys else (),
        side_files=origin.side_files,
        layout=origin.layout, notes=(*wanted.notes, *origin.notes, *notes), stored_bytes=sum(_bytes(stored) for stored in keys.values()),
    )  # fmt: skip


def refuse_cut(metadata: DcpMetadata, sizes: Mapping[str, int], folder: Path) -> None:
    """SourceError for the first tensor with a chunk that does not lie inside its file: half a download is no checkpoint, whatever is read of it."""
    for key, stored in metadata.tensors.items():
        for chunk in stored.chunks:
            if chunk.offset + chunk.length > sizes[chunk.relative_path]:
                raise SourceError(
                    f"has {sizes[chunk.relative_path]:,} bytes, but the tensor lies at {chunk.offset:,} to {chunk.offset + chunk.length:,}.",
                    file=folder / chunk.relative_path, tensor=key, hint="Is the copy complete?",
                )  # fmt: skip


def check_backend(folder: InputFolder) -> None:
    """UnsupportedError if metadata.json names another backend than torch_dist (zarr, fsdp_dtensor)."""
    if folder.exists(BACKEND):
        file = folder.open(BACKEND)
        value = strict_json.parse(file.read(0, min(file.size, 1 << 16)), file=folder.root / BACKEND, limit=1 << 16)
        backend = value.get("sharded_backend") if isinstance(value, dict) else None
        if backend != "torch_dist":
            raise UnsupportedError(f"says that the backend is {backend!r}; only torch_dist is read.", file=folder.root / BACKEND)


def _bytes(stored: StoredTensor) -> int:
    size = stored.dtype.itemsize
    for n in stored.shape:
        size *= n
    return size


def _layout_has_aliases(layout: FileLayout | None, config: Mapping[str, object], file: Path) -> bool:
    names = {tensor: True for _, _, order in layout.files for tensor in order} if layout else {}
    return has_aliases(config, names, file)


class Matched:
    """A model's Megatron tensors found in a checkpoint, under whichever spelling and stacking it uses."""

    def __init__(self, model: Model, keys: Mapping[str, StoredTensor], files: Mapping[str, tuple[InputFile, int]], dialect: str) -> None:
        self.model = model
        self.keys = keys
        self.files = dict(files)
        self.dialect = dialect
        self.used: set[str] = set()
        self.missing: list[str] = []
        self.boxes: dict[tuple[str, tuple[int, ...]], Boxes] = {}

    def find(self, key: str) -> tuple[str, int | None] | None:
        """The stored key and, if all layers are stacked in it, this layer's number."""
        for spelling in spellings(key):
            if spelling in self.keys:
                return spelling, None
            stacked = stacked_spelling(spelling)
            if stacked and stacked[0] in self.keys:
                return stacked
        return None

    @cached_property
    def wanted(self) -> dict[str, MegatronTensor]:
        return megatron_tensors(self.model, self.dialect)

    @cached_property
    def stored_keys(self) -> set[str]:
        """Every stored key that holds a tensor of the model."""
        return {found[0] for key in self.wanted if (found := self.find(key))}

    @cached_property
    def canonical(self) -> set[str]:
        """The canonical tensors of which at least a part is stored."""
        return {tile.tensor for key, wanted in self.wanted.items() if self.find(key) for tile in wanted.tiles}

    def readers(self, config: Mapping[str, object]) -> tuple[dict[str, RowReader], list[tuple[str, str]]]:
        """Canonical name -> reader, and what is wrong with which tensor; fills `used` and `missing`."""
        wanted = self.wanted
        places = {key: self.find(key) for key in wanted}
        dtypes = {tile.tensor: self.keys[found[0]].dtype for key, found in places.items() if found for tile in wanted[key].tiles}
        dtype = model_dtype(config, dtypes, self.model)
        stretches: dict[str, list[Stretch]] = {}
        wrong: dict[str, str] = {}
        for key, found in places.items():
            tensors = dict.fromkeys(tile.tensor for tile in wanted[key].tiles)
            if found is None:
                self.missing += tensors
                continue
            self.used.add(found[0])
            problem = self._problem(wanted[key], found)
            if problem:
                wrong[key] = problem
                continue
            boxes, base = self._boxes(wanted[key], found)
            for tile in wanted[key].tiles:
                stretches.setdefault(tile.tensor, []).append(Stretch(tile.source, base + tile.target, tile.rows, boxes))
        return self._assemble(stretches, dtypes, dtype, wrong), list(wrong.items())

    def _problem(self, wanted: MegatronTensor, found: tuple[str, int | None]) -> str:
        shape, needed = tuple(self.keys[found[0]].shape), wanted.shape
        if found[1] is not None:
            if not shape or not found[1] < shape[0]:
                return f"is {list(shape)}, too short for layer {found[1]}"
            shape = shape[1:]
        if wanted.padded and shape[1:] == needed[1:] and shape and shape[0] >= needed[0]:
            return ""  # the vocabulary is padded to a multiple of the parallel layout; what lies behind config.json's size is cut off
        return "" if shape == needed else f"is {list(shape)}, the config needs {list(needed)}"

    def _boxes(self, wanted: MegatronTensor, found: tuple[str, int | None]) -> tuple[Boxes, int]:
        key, layer = found
        stored = self.keys[key]
        if (key, wanted.tail) not in self.boxes:
            self.boxes[key, wanted.tail] = Boxes(stored, wanted.tail, self.files)
        return self.boxes[key, wanted.tail], (layer or 0) * wanted.rows

    def _assemble(
        self, stretches: Mapping[str, list[Stretch]], dtypes: Mapping[str, DType], dtype: DType, wrong: dict[str, str]
    ) -> dict[str, RowReader]:
        readers: dict[str, RowReader] = {}
        for name, tensor in self.model.tensors.items():
            source = tensor.alias or name
            if source not in stretches:
                if tensor.alias and source not in self.model.tensors:
                    self.missing.append(name)
                continue
            parts = tuple(sorted(stretches[source], key=lambda s: s.source))
            if sum(part.rows for part in parts) != tensor.rows:
                continue  # part of it is missing or wrong, and already said to be
            rows = ChunkedRows(tensor.shape, dtypes[source], parts)
            canonical = canonical_dtype(tensor, dtype, rows.dtype)
            if problem := mismatch(tensor, tensor.shape, rows.dtype, canonical):
                wrong[name] = problem
                continue
            readers[name] = rows if rows.dtype == canonical else Widened(rows, canonical)
        return readers


def config_of(folder: InputFolder, origin: Origin, metadata: DcpMetadata) -> tuple[Mapping[str, object], bytes, tuple[str, ...]]:
    """config.json from the origin, else rebuilt from what the run recorded. UnsupportedError or SourceError if neither tells enough."""
    if origin.config is not None:
        config = {name: value for name, value in origin.config.items() if name != QUANTIZATION}
        data = origin.config_bytes if len(config) == len(origin.config) else _dumped(config)
        return config, data, ()
    args, source = recorded_args(folder, metadata)
    if args is None:
        raise SourceError("has no config.json beside it, and no common.pt or run_config.yaml to rebuild one from.", file=folder.root,
                          hint="Name the model's release with --origin DIR or --origin zai-org/....")  # fmt: skip
    kind = "with latent attention" if args.get("multi_latent_attention") or args.get("q_lora_rank") else "without experts"
    if kind != "without experts" or not (args.get("num_experts") or args.get("num_moe_experts")):
        raise UnsupportedError(
            f"{source} describes a model {kind}, whose config is not rebuilt.", file=folder.root, hint="Name the model's release with --origin."
        )
    config = to_config(args) | {"torch_dtype": weights_dtype(metadata)}
    missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size", "n_routed_experts", "first_k_dense_replace") if name not in config]
    if missing:
        raise SourceError(f"{source} does not tell {', '.join(missing)}.", file=folder.root, hint="Name the model's release with --origin.")
    note = f"config.json rebuilt from {source}; token ids, tokenizer, templates and file layout are not known: pass --origin for them"
    return config, _dumped(config), (note,)


def weights_dtype(metadata: DcpMetadata) -> str:
    """The dtype that most bytes of the weights have, whatever the run's arguments say."""
    sizes: dict[str, int] = {}
    for key, stored in metadata.tensors.items():
        if not is_trainers(key):
            sizes[stored.dtype.name] = sizes.get(stored.dtype.name, 0) + _bytes(stored)
    return max(sizes, key=lambda name: (sizes[name], name), default="bfloat16")


def _dumped(config: Mapping[str, object]) -> bytes:
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()


def recorded_args(folder: InputFolder, metadata: DcpMetadata) -> tuple[Mapping[str, object] | None, str]:
    """The run's arguments: from common.pt (Megatron up to 0.18), from the common state inside (0.19 on), or from Bridge's run_config.yaml."""
    if folder.exists(COMMON):
        file = folder.open(COMMON)
        common = read_common(lambda at, size: file.read(at, size), file.size, file=folder.root / COMMON)
        if isinstance(common.get("args"), Mapping):
            return common["args"], COMMON  # type: ignore[return-value]
    state = next((metadata.objects[key] for key in metadata.objects if key.startswith(COMMON_STATE)), None)
    if state is not None:
        file = folder.open(state.relative_path)
        begin = state.offset
        common = read_common(lambda at, size: file.read(begin + at, size), state.length, file=folder.root / state.relative_path)
        if isinstance(common.get("args"), Mapping):
            return common["args"], "common_state"  # type: ignore[return-value]
    if folder.exists(RUN_CONFIG):
        return read_run_config(folder.open(RUN_CONFIG), folder.root / RUN_CONFIG), RUN_CONFIG
    return None, ""


TORCH_DIST = Format("torch_dist", "Megatron torch_dist", detect, open_folder, torch_dist_layout.plan, manifest_at=manifest_at)
