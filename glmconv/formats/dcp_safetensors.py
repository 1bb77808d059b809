"""Sharded safetensors of torch.distributed.checkpoint, as NeMo AutoModel saves a model: each rank's part of each tensor, with where it belongs.

Source: torch's `HuggingFaceStorageWriter` (names of files, `DCP_SHARDING_INFO` in each header: tensor -> `saved_offsets`; the whole shape is nowhere
and is what the parts reach) and AutoModel's `.hf_metadata` folder (config.json, tokenizer, `fqn_to_file_index_mapping.json`: tensor -> number of the
release's shard). Names are Hugging Face's. Read only; what is written from it is a Hugging Face folder like any other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from glmconv import strict_json
from glmconv.engine.inputs import InputFile, InputFolder
from glmconv.engine.plan import Plan
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats import tiling
from glmconv.formats.binding import canonical_dtype, expected, has_aliases, mismatch, model_dtype
from glmconv.formats.dcp_records import Chunk, StoredTensor
from glmconv.formats.dcp_rows import Boxes, ChunkedRows, PlainBlob, Stretch
from glmconv.formats.format import FileLayout, Format, LayoutOptions, Opened, OpenOptions, RowReader
from glmconv.formats.origin import Origin, find_origin
from glmconv.formats.safetensors_header import Header, read_header
from glmconv.formats.side_files import CONFIG
from glmconv.formats.widen import Widened

SHARD = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors\Z")
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"
SHARDING_LARGEST = 1 << 20  # a header's metadata are no longer
METADATA, MAPPING = ".hf_metadata", "fqn_to_file_index_mapping.json"
MAPPING_LARGEST = 64 << 20
MOST_FILES = 99_999
Files = Mapping[str, tuple[InputFile, int]]


def shards_in(path: Path) -> Path | None:
    """The folder of the shards: this one, or `model` in it, as a training step's folder has it."""
    folders = [folder for folder in (path, path / "model") if folder.is_dir() and not (folder != path and folder.is_symlink())]
    return next((folder for folder in folders if any(SHARD.match(child.name) for child in folder.iterdir())), None)


def detect(path: Path) -> bool:
    return shards_in(path) is not None


def open_folder(path: Path, options: OpenOptions) -> Opened:
    """Open sharded safetensors. SourceError if parts are missing, overlap or contradict; tensors are matched, not judged."""
    place = shards_in(path)
    if place is None:
        raise SourceError("has no shard-N-model-N-of-N.safetensors.", file=path)
    folder = InputFolder(place)
    names = [name for name in folder.names() if SHARD.match(name)]
    headers = {name: read_header(folder.open(name)) for name in names}
    files: dict[str, tuple[InputFile, int]] = {name: (folder.open(name), number) for number, name in enumerate(names)}
    stored = stored_tensors(place, headers)
    origin = origin_of(place, options)
    config, where = origin.config or {}, origin.config_file or place
    aliases = has_aliases(config, stored, where)
    wanted = expected(config, stored.__contains__, aliases=aliases, mtp=options.mtp, file=where)
    dtype = model_dtype(config, {name: tensor.dtype for name, tensor in stored.items()}, wanted.model)
    tensors: dict[str, RowReader] = {}
    wrong = []
    for name, tensor in wanted.model.tensors.items():
        if name in stored:
            canonical = canonical_dtype(tensor, dtype, stored[name].dtype)
            if problem := mismatch(tensor, stored[name].shape, stored[name].dtype, canonical):
                wrong.append((name, problem))
                continue
            rows = reader_of(stored[name], files)
            tensors[name] = rows if rows.dtype == canonical else Widened(rows, canonical)
    there = set(stored)
    return Opened(
        format="dcp_safetensors", path=path, config=config, config_bytes=origin.config_bytes, model=wanted.model, tensors=tensors,
        folders=(folder, *origin.folders),
        fingerprint={"format": "dcp_safetensors", "files": {n: [files[n][0].size, headers[n].digest] for n in names} | dict(origin.digests)},
        missing=tuple(name for name in wanted.model.tensors if name not in there), wrong=tuple(wrong),
        unexpected=tuple(name for name in stored if name not in wanted.model.tensors and name not in wanted.dropped),
        dropped=tuple(name for name in wanted.dropped if name in there), side_files=origin.side_files, layout=origin.layout,
        notes=(*wanted.notes, *origin.notes), stored_bytes=sum(tensor.size for header in headers.values() for tensor in header.tensors.values()),
    )  # fmt: skip


def stored_tensors(place: Path, headers: Mapping[str, Header]) -> dict[str, StoredTensor]:
    """Every tensor with its parts. SourceError unless they have one dtype and tile it exactly once."""
    chunks: dict[str, list[Chunk]] = {}
    for name, header in headers.items():
        offsets = offsets_of(header.metadata, place / name)
        for tensor, part in header.tensors.items():
            at = offsets.get(tensor)
            if at is None or len(at) != len(part.shape):
                raise SourceError(f"has no {OFFSETS} of its {len(part.shape)} axes.", file=place / name, tensor=tensor)
            chunks.setdefault(tensor, []).append(Chunk(at, part.shape, name, part.offset, part.size))
    found = {}
    for tensor, parts in chunks.items():
        shape = tuple(max(at + size for at, size in zip(*axis, strict=True)) for axis in _axes(parts))
        dtypes = {headers[part.relative_path].tensors[tensor].dtype for part in parts}
        if len(dtypes) > 1:
            raise SourceError(f"is {' and '.join(sorted(dtype.name for dtype in dtypes))} in different shards.", file=place, tensor=tensor)
        if problem := tiling.problem(shape, [(part.offsets, part.sizes) for part in parts]):
            raise SourceError(f"{problem}.", file=place, tensor=tensor, hint="Is every rank's shard here?")
        found[tensor] = StoredTensor(dtypes.pop(), shape, tuple(parts))
    return found


def _axes(parts: Sequence[Chunk]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each axis the parts' offsets and sizes. SourceError if they have not one rank."""
    if len({len(part.sizes) for part in parts}) > 1:
        raise SourceError("has parts of different ranks.", file=parts[0].relative_path)
    return [(tuple(part.offsets[axis] for part in parts), tuple(part.sizes[axis] for part in parts)) for axis in range(len(parts[0].sizes))]


def offsets_of(metadata: Mapping[str, str], file: Path) -> dict[str, tuple[int, ...]]:
    """Tensor -> where its part begins. SourceError if the header does not say."""
    if SHARDING not in metadata:
        raise SourceError(f"has no {SHARDING} in its header.", file=file, hint="Was it saved by torch.distributed.checkpoint?")
    value = strict_json.parse(metadata[SHARDING].encode(), file=file, limit=SHARDING_LARGEST)
    found = {}
    for name, entry in value.items() if isinstance(value, dict) else ():
        at = entry.get(OFFSETS) if isinstance(entry, dict) else None
        if not isinstance(at, list) or not all(type(n) is int and 0 <= n < 2**40 for n in at):
            raise SourceError(f"has {OFFSETS} that are not whole numbers.", file=file, tensor=name)
        found[name] = tuple(at)
    return found


def reader_of(stored: StoredTensor, files: Files) -> ChunkedRows:
    boxes = Boxes(stored, stored.shape[1:], dict(files), PlainBlob)
    return ChunkedRows(stored.shape, stored.dtype, (Stretch(0, 0, stored.shape[0], boxes),))


def origin_of(place: Path, options: OpenOptions) -> Origin:
    """The release's config and side files: as given, from `.hf_metadata`, or from the step's folder. SourceError if there is none."""
    if options.origin is not None:
        return find_origin(place, place, options.origin)
    home = next((folder for folder in (place / METADATA, place.parent) if (folder / CONFIG).is_file()), None)
    if home is None or home.is_symlink():
        raise SourceError(f"has no {METADATA}/{CONFIG}.", file=place, hint="Name the model's release with --origin DIR or --origin zai-org/....")
    origin = find_origin(home, home, None)
    sides = {name: rows for name, rows in origin.side_files.items() if name != MAPPING}
    digests = {name: digest for name, digest in origin.digests.items() if not name.endswith(f"/{MAPPING}")}
    return replace(origin, side_files=sides, digests=digests, layout=origin.layout or _layout(home))


def _layout(home: Path) -> FileLayout | None:
    """The release's shards by their numbers, tensors in the mapping's order; None if there is no mapping."""
    folder = InputFolder(home)
    if not folder.exists(MAPPING):
        return None
    file = folder.open(MAPPING)
    value = strict_json.parse(file.read(0, min(file.size, MAPPING_LARGEST + 1)), file=home / MAPPING, limit=MAPPING_LARGEST)
    numbers = value if isinstance(value, dict) else {}
    if not numbers or not all(type(n) is int and 1 <= n <= MOST_FILES for n in numbers.values()):
        raise SourceError("is no mapping of tensors to numbers of files.", file=home / MAPPING)
    count = max(numbers.values())
    orders: dict[int, list[str]] = {}
    for name, number in numbers.items():
        orders.setdefault(number, []).append(name)
    files = tuple((f"model-{n:05d}-of-{count:05d}.safetensors", {"format": "pt"}, tuple(orders[n])) for n in sorted(orders))
    return FileLayout(files, {})


def no_plan(opened: Opened, options: LayoutOptions) -> Plan:
    raise UnsupportedError("sharded safetensors are read and not written.", hint="--to hf writes one folder.")


DCP_SAFETENSORS = Format("dcp_safetensors", "sharded safetensors (AutoModel)", detect, open_folder, no_plan, writable=False)
