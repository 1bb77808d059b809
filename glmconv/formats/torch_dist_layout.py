"""Plans a torch_dist folder: what Megatron-Core's own `dist_checkpointing.load` reads, in Transformer Engine's naming (docs/torch_dist.md)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from glmconv.dtypes import DType
from glmconv.engine.plan import OutputFile, Piece, Plan, Run, SmallFile
from glmconv.formats.coded import label_of
from glmconv.formats.common_pt import write_common
from glmconv.formats.dcp import Chunk, StoredObject, StoredTensor, write_metadata
from glmconv.formats.dialects import known_as, written
from glmconv.formats.format import FileLayout, LayoutOptions, Opened
from glmconv.formats.huggingface_layout import config_for
from glmconv.formats.megatron_args import to_args
from glmconv.formats.megatron_keys import MegatronTensor, extra_states, megatron_tensors, stacked_layers
from glmconv.formats.run_config import RUN_CONFIG, write_run_config
from glmconv.formats.side_files import CONFIG, output_files
from glmconv.formats.torch_zip import EXTRA_STATE, TorchSaveFrame

FILE_SIZE = 1 << 30  # small enough that 16 ranks share a 355B model within a few per cent
METADATA, COMMON, BACKEND, TRACKER = ".metadata", "common.pt", "metadata.json", "latest_checkpointed_iteration.txt"
BRIDGE = "bridge"
ORIGIN, LAYOUT = "glmconv_origin", "glmconv_layout.json"
# Exactly these four: Megatron-Core 0.12 to 0.18 hands the object to a dataclass, where another field is a TypeError
BACKEND_JSON = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


@dataclass
class Writing:
    """The files so far, and what `.metadata` will say of them."""

    folder: str
    file_size: int
    files: list[OutputFile] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    filled: int = 0
    chunks: dict[str, list[Chunk]] = field(default_factory=dict)
    objects: dict[str, StoredObject] = field(default_factory=dict)

    @property
    def current(self) -> str:
        return f"__0_{len(self.files)}.distcp"

    def add(self, piece: Piece) -> tuple[str, int, int]:
        """Append a piece, beginning a new file where this one would grow too large; returns file, offset, length."""
        if self.filled and self.filled + piece.size > self.file_size:
            self.close()
        at = self.filled
        self.pieces.append(piece)
        self.filled += piece.size
        return self.current, at, piece.size

    def close(self) -> None:
        if self.pieces:
            self.files.append(OutputFile(self.folder + self.current, b"", tuple(self.pieces)))
        self.pieces, self.filled = [], 0


def plan(opened: Opened, options: LayoutOptions) -> Plan:
    """Chunks of whole rows: experts per expert and half, other tensors cut at `chunk_size` bytes."""
    dialect = written(opened.model.spec, options.dialect, opened.config, opened.path)
    name = "release" if options.iteration is None else f"iter_{options.iteration:07d}"
    writing = Writing(f"{name}/", options.file_size or FILE_SIZE)
    tensors = megatron_tensors(opened.model, dialect, opened.tensors)
    if opened.model.spec.stacked:
        tensors = stacked_layers(tensors)
    aliases = _aliases(opened)
    states: dict[str, list[str]] = {}
    for key, object_key in extra_states(tensors):
        states.setdefault(key, []).append(object_key)
    for key, stored in tensors.items():
        dtype = opened.tensors[stored.tiles[0].tensor].dtype
        for offsets, sizes, runs in chunks(stored, dtype, options.chunk_size):
            whole = sizes == stored.shape
            label = key if whole else f"{key}[{','.join(map(str, offsets))}]"
            payload = _product(sizes) * dtype.itemsize
            equals = tuple(alias for run in runs for alias in aliases.get(run.tensor, ()))
            piece = Piece(label, dtype.name, sizes, payload, runs, frame=TorchSaveFrame(dtype, sizes), equals=equals)
            writing.chunks.setdefault(key, []).append(Chunk(offsets, sizes, *writing.add(piece)))
        for object_key in states.get(key, ()):
            piece = Piece(object_key, "object", (), len(EXTRA_STATE), literal=EXTRA_STATE, digested=False)
            writing.objects[object_key] = StoredObject(*writing.add(piece))
    writing.close()
    described = {key: StoredTensor(opened.tensors[t.tiles[0].tensor].dtype, t.shape, writing.chunks[key]) for key, t in tensors.items()}
    marks = (
        SmallFile(f"{ORIGIN}/{LAYOUT}", layout_json(opened.layout)),
        SmallFile(f"{ORIGIN}/{CONFIG}", config_for(opened)),
        SmallFile(writing.folder + COMMON, write_common(common(opened, options))),
        *run_config(opened, options, writing.folder),
        SmallFile(writing.folder + METADATA, write_metadata(described, writing.objects)),
        SmallFile(writing.folder + BACKEND, json.dumps(BACKEND_JSON).encode()),
        SmallFile(TRACKER, (name if options.iteration is None else str(options.iteration)).encode()),
    )
    side = output_files(opened.side_files, f"{ORIGIN}/")
    asked = BRIDGE if options.dialect == BRIDGE else known_as(opened.model.spec, dialect)
    chosen: dict[str, object] = {"mtp": options.mtp, "iteration": options.iteration, "megatron_dialect": asked}
    chosen |= {"file_size": options.file_size, "chunk_size": options.chunk_size}
    return Plan("torch_dist", chosen, opened.fingerprint, (*writing.files, *side), marks, (*opened.notes, *_without_run_config(opened, options)))


def run_config(opened: Opened, options: LayoutOptions, folder: str) -> tuple[SmallFile, ...]:
    """Megatron-Bridge's description of the model, if the checkpoint is for Bridge and it is known how Bridge builds this architecture."""
    if options.dialect != BRIDGE or not opened.model.spec.bridge_provider:
        return ()
    return (SmallFile(folder + RUN_CONFIG, write_run_config(opened.config, opened.model, weights_dtype(opened))),)


def _without_run_config(opened: Opened, options: LayoutOptions) -> Iterator[str]:
    if options.dialect == BRIDGE and not opened.model.spec.bridge_provider:
        yield f"no {RUN_CONFIG} is written: how Megatron-Bridge describes {opened.model.spec.model_type} in one is not known"


def chunks(stored: MegatronTensor, dtype: DType, chunk_size: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[Run, ...]]]:
    """(offsets, sizes, canonical rows) of each DCP chunk, in the order of rows; together they tile the tensor."""
    row_bytes = _product(stored.tail) * dtype.itemsize
    tallest = max(1, chunk_size // row_bytes)
    tail = (0,) * len(stored.tail)
    if stored.stride and not stored.layered:
        for tile in stored.tiles:
            for at in range(0, tile.rows, tallest):
                rows = min(tallest, tile.rows - at)
                expert, row = divmod(tile.target + at, stored.stride)
                yield (expert, row, *tail), (1, rows, *stored.tail), (Run(tile.tensor, tile.source + at, rows),)
        return
    first = 0
    height = stored.stride or stored.rows
    for low in (top + at for top in range(0, stored.rows, height) for at in range(0, height, tallest)):
        layer, row = divmod(low, height)
        high = min(low + tallest, (layer + 1) * height)
        while stored.tiles[first].target + stored.tiles[first].rows <= low:
            first += 1
        runs = tuple(_runs(stored, first, low, high))
        if stored.layered:
            yield (layer, row, *tail), (1, high - low, *stored.tail), runs
        else:
            yield (low, *tail), (high - low, *stored.tail), runs


def _runs(stored: MegatronTensor, first: int, low: int, high: int) -> Iterator[Run]:
    """The canonical rows behind rows low..high; `first` is the tile that holds row `low`."""
    for tile in stored.tiles[first:]:
        if tile.target >= high:
            break
        begin, end = max(low, tile.target), min(high, tile.target + tile.rows)
        yield Run(tile.tensor, tile.source + begin - tile.target, end - begin)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def _aliases(opened: Opened) -> Mapping[str, tuple[str, ...]]:
    """Canonical tensor -> those of the source's tensors that repeat it: Megatron has no place for them, so they must be equal."""
    found: dict[str, tuple[str, ...]] = {}
    for name, tensor in opened.model.tensors.items():
        if tensor.alias and name in opened.tensors and not label_of(opened.tensors[name]):  # a quantized copy is not what it repeats
            found[tensor.alias] = (*found.get(tensor.alias, ()), name)
    return found


def common(opened: Opened, options: LayoutOptions) -> dict[str, object]:
    """What common.pt holds: `args`, and the few fields that Megatron's `load_checkpoint` asks for. `checkpoint_version` 3.0: QKV is not reordered."""
    dtype = weights_dtype(opened)
    return {
        "args": to_args(opened.config, opened.model) | {"params_dtype": dtype, "bf16": dtype == "bfloat16", "fp16": dtype == "float16"},
        "checkpoint_version": 3.0,
        "iteration": 1 if options.iteration is None else options.iteration,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def weights_dtype(opened: Opened) -> str:
    """The dtype of the weights whose dtype the table leaves open."""
    return next(opened.tensors[name].dtype.name for name, tensor in opened.model.tensors.items() if not tensor.dtype and name in opened.tensors)


def layout_json(layout: FileLayout | None) -> bytes:
    """The release's files as JSON; `null` where they are not known. Metadata keep their order: it shows in the bytes of a safetensors header."""
    if layout is None:
        return b"null"
    value = {"files": [[name, dict(meta), list(order)] for name, meta, order in layout.files], "index": layout.index, "version": 1}
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
