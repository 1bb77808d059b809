"""`.metadata`: torch's own is read, ours is read by torch, and what tiles nothing or points elsewhere is refused."""

from __future__ import annotations

import io
import pickle
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from glmconv.dtypes import ALL, BY_NAME
from glmconv.errors import SourceError
from glmconv.formats.dcp import Chunk, DcpMetadata, StoredObject, StoredTensor, read_metadata, write_metadata
from glmconv.formats.torch_zip import EXTRA_STATE, TorchSaveFrame, object_blob, read_object_blob, read_tensor_blob

BF16 = BY_NAME["bfloat16"]


def box(offsets: tuple[int, ...], sizes: tuple[int, ...], at: int = 0, length: int = 5000, path: str = "__0_0.distcp") -> Chunk:
    return Chunk(offsets, sizes, path, at, length)


def grid(shape: tuple[int, int], cuts: tuple[list[int], list[int]]) -> tuple[Chunk, ...]:
    """A tensor cut at these rows and columns."""
    spans = [[(a, b - a) for a, b in zip([0, *c], [*c, n], strict=True)] for c, n in zip(cuts, shape, strict=True)]
    places = [(r, c) for r in spans[0] for c in spans[1]]
    return tuple(box((r[0], c[0]), (r[1], c[1]), at=5000 * n) for n, (r, c) in enumerate(places))


def torchs(tensors: Mapping[str, StoredTensor], objects: Mapping[str, StoredObject]) -> Metadata:
    """The same as torch's own classes."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    described: dict[str, object] = {
        key: TensorStorageMetadata(
            TensorProperties(getattr(torch, t.dtype.name)),
            torch.Size(t.shape),
            [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in t.chunks],
        )
        for key, t in tensors.items()
    }
    places = {MetadataIndex(key, c.offsets): _StorageInfo(c.relative_path, c.offset, c.length) for key, t in tensors.items() for c in t.chunks}
    places |= {MetadataIndex(key): _StorageInfo(o.relative_path, o.offset, o.length) for key, o in objects.items()}
    return Metadata({**described, **{key: BytesStorageMetadata() for key in objects}}, None, places, None, "1.0.0")  # type: ignore[dict-item]


TENSORS = {
    "decoder.norm": StoredTensor(BF16, (7,), (box((0,), (7,), at=1_000_000),)),
    "scalar": StoredTensor(BY_NAME["float32"], (), (box((), (), at=2_000_000),)),
    "empty": StoredTensor(BF16, (0, 4), (box((0, 0), (0, 4), at=2_100_000),)),
    "experts": StoredTensor(BF16, (3, 6, 4), tuple(box((e, h, 0), (1, 3, 4), at=3_000_000 + 9000 * (2 * e + h)) for e in range(3) for h in (0, 3))),
    "uneven": StoredTensor(BF16, (10, 6), grid((10, 6), ([3, 4], [5]))),
    **{f"of {dtype}": StoredTensor(dtype, (2**33,), (box((0,), (2**33,), at=2**40 * (n + 1), length=2**37),)) for n, dtype in enumerate(ALL)},
}
OBJECTS = {"decoder.layers.0._extra_state/shard_0_1": StoredObject("__1_0.distcp", 0, 900), "x/shard_0_1": StoredObject("__1_0.distcp", 900, 1)}


def test_ours_is_equal_to_torchs_own_and_comes_back() -> None:
    data = write_metadata(TENSORS, OBJECTS)
    assert pickle.loads(data) == torchs(TENSORS, OBJECTS)
    assert read_metadata(data, "m") == DcpMetadata(TENSORS, OBJECTS)
    assert write_metadata(dict(TENSORS), dict(OBJECTS)) == data


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_torchs_own_is_read_in_every_protocol(protocol: int) -> None:
    assert read_metadata(pickle.dumps(torchs(TENSORS, OBJECTS), protocol), "m") == DcpMetadata(TENSORS, OBJECTS)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.data())
def test_any_cut_of_any_shape_survives_the_way_through_torch(shape: list[int], data: st.DataObject) -> None:
    rows = sorted(data.draw(st.sets(st.integers(1, max(shape[0] - 1, 1)), max_size=5)) - {shape[0]})
    spans = [(a, b - a) for a, b in zip([0, *rows], [*rows, shape[0]], strict=True)]
    rest = tuple(shape[1:])
    chunks = tuple(box((a, *(0 for _ in rest)), (n, *rest), at=2**20 * k, length=2**20) for k, (a, n) in enumerate(spans))
    tensors = {"t": StoredTensor(BY_NAME["float32"], tuple(shape), chunks)}
    loaded = pickle.loads(write_metadata(tensors, {}))
    assert loaded == torchs(tensors, {})
    assert read_metadata(pickle.dumps(loaded), "m").tensors == tensors


def blob_reader(folder: Path, where: Chunk | StoredObject) -> Callable[[int, int], bytes]:
    data = (folder / where.relative_path).read_bytes()[where.offset : where.offset + where.length]
    return lambda at, size: data[at : at + size]


def test_a_checkpoint_that_torch_saved_is_read(tmp_path: Path) -> None:
    state = {"w": torch.rand(5, 7), "n": {"b": torch.arange(6, dtype=torch.int64).to(torch.bfloat16)}, "step": 17, "s": torch.tensor(2.5)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    found = read_metadata((tmp_path / ".metadata").read_bytes(), tmp_path)
    assert {key: (t.dtype.name, t.shape) for key, t in found.tensors.items()} == {
        "w": ("float32", (5, 7)),
        "n.b": ("bfloat16", (6,)),
        "s": ("float32", ()),
    }
    for key, tensor in (("w", state["w"]), ("n.b", state["n"]["b"])):  # type: ignore[index]
        (chunk,) = found.tensors[key].chunks
        read = blob_reader(tmp_path, chunk)
        blob = read_tensor_blob(read, chunk.length, file=key)
        assert isinstance(tensor, torch.Tensor)
        assert read(blob.payload_offset, blob.payload_size) == tensor.view(torch.uint8).numpy().tobytes()
    assert read_object_blob(blob_reader(tmp_path, found.objects["step"]), found.objects["step"].length, file="step") == 17


def written(folder: Path) -> torch.Tensor:
    """A folder of ours: one tensor in four boxes of two files, and one object. Returns the tensor."""
    whole = torch.rand(6, 8).to(torch.bfloat16)
    files: dict[str, bytearray] = {"__0_0.distcp": bytearray(), "__0_1.distcp": bytearray()}
    chunks = []
    for n, ((row, rows), (column, columns)) in enumerate((r, c) for r in ((0, 5), (5, 1)) for c in ((0, 3), (3, 5))):
        payload = whole[row : row + rows, column : column + columns].contiguous().view(torch.uint8).numpy().tobytes()
        frame = TorchSaveFrame(BF16, (rows, columns))
        blob = frame.before() + payload + frame.after(zlib.crc32(payload))
        name = f"__0_{n % 2}.distcp"
        chunks.append(Chunk((row, column), (rows, columns), name, len(files[name]), len(blob)))
        files[name] += blob
    stored = StoredObject("__0_1.distcp", len(files["__0_1.distcp"]), len(EXTRA_STATE))
    files["__0_1.distcp"] += EXTRA_STATE
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / ".metadata").write_bytes(write_metadata({"w": StoredTensor(BF16, (6, 8), chunks)}, {"w._extra_state/shard_0_1": stored}))
    return whole


def test_torch_loads_what_we_write(tmp_path: Path) -> None:
    whole = written(tmp_path)
    reader = dcp.FileSystemReader(tmp_path)
    assert set(reader.read_metadata().state_dict_metadata) == {"w", "w._extra_state/shard_0_1"}
    target: dict[str, object] = {"w": torch.zeros(6, 8, dtype=torch.bfloat16), "w._extra_state/shard_0_1": io.BytesIO()}
    dcp.load(target, storage_reader=reader, planner=dcp.DefaultLoadPlanner(), no_dist=True)
    assert isinstance(target["w"], torch.Tensor)
    assert torch.equal(target["w"], whole)
    assert isinstance(target["w._extra_state/shard_0_1"], list)
    assert target["w._extra_state/shard_0_1"][0].shape == (0,)


def test_megatron_loads_what_we_write(tmp_path: Path) -> None:
    dist_checkpointing = pytest.importorskip("megatron.core.dist_checkpointing")
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    whole = written(tmp_path)
    (tmp_path / "common.pt").write_bytes(object_blob({}))
    (tmp_path / "metadata.json").write_text(
        '{"sharded_backend":"torch_dist","sharded_backend_version":1,"common_backend":"torch","common_backend_version":1}'
    )
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wanted = {
            "w": dist_checkpointing.ShardedTensor.from_rank_offsets("w", torch.zeros(6, 8, dtype=torch.bfloat16)),
            "x": ShardedObject("w._extra_state", None, (1,), (0,)),
        }
        found = dist_checkpointing.load(wanted, str(tmp_path))
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(found["w"], whole)
    assert found["x"].shape == (0,)


class MCoreSavePlan:
    """Stands for a class that is nowhere but in the run that saved."""

    def __init__(self) -> None:
        self.items = [{"a": (1, 2)}]
        self.usable = True


def test_metadata_under_megatrons_class_with_plans_beside_it_is_read() -> None:
    """0.15 names MCoreMetadata and keeps every rank's plan."""
    metadata = torchs(TENSORS, OBJECTS)
    metadata.all_local_plans = [MCoreSavePlan()]  # type: ignore[attr-defined]
    metadata.mcore_data = {"w": {"nd_reformulated_orig_global_shape": torch.Size((2,))}}  # type: ignore[attr-defined]
    data = pickle.dumps(metadata, 2).replace(b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"cmegatron.core.x\nMCoreMetadata\n")
    assert b"MCoreMetadata" in data
    assert read_metadata(data, "m") == DcpMetadata(TENSORS, OBJECTS)


Change = Callable[[Metadata], None]


def _info(m: Metadata, **changes: object) -> None:
    index = MetadataIndex("uneven", (0, 0))
    m.storage_data[index] = replace(m.storage_data[index], **changes)  # type: ignore[type-var]


def _chunk(m: Metadata, n: int, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    """Moves chunk n of the tensor `uneven`, and its storage record with it."""
    entry = m.state_dict_metadata["uneven"]
    assert isinstance(entry, TensorStorageMetadata)
    old = entry.chunks[n]
    entry.chunks[n] = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
    m.storage_data[MetadataIndex("uneven", offsets)] = m.storage_data.pop(MetadataIndex("uneven", old.offsets))


def _described(m: Metadata) -> TensorStorageMetadata:
    entry = m.state_dict_metadata["uneven"]
    assert isinstance(entry, TensorStorageMetadata)
    return entry


HOSTILE: dict[str, Change] = {
    "path leaves the folder": lambda m: _info(m, relative_path="../__0_0.distcp"),
    "absolute path": lambda m: _info(m, relative_path="/etc/x.distcp"),
    "path of another folder": lambda m: _info(m, relative_path="a/__0_0.distcp"),
    "path of another kind": lambda m: _info(m, relative_path="__0_0.safetensors"),
    "hidden path": lambda m: _info(m, relative_path="..distcp"),
    "path with a NUL": lambda m: _info(m, relative_path="a\0.distcp"),
    "path with a line end": lambda m: _info(m, relative_path="a.distcp\n"),
    "path that is a number": lambda m: _info(m, relative_path=7),
    "negative offset": lambda m: _info(m, offset=-1),
    "huge offset": lambda m: _info(m, offset=2**62),
    "offset that is a float": lambda m: _info(m, offset=1.0),
    "offset that is a bool": lambda m: _info(m, offset=True),
    "no length": lambda m: _info(m, length=0),
    "negative length": lambda m: _info(m, length=-5),
    "length shorter than the elements": lambda m: _info(m, length=9),
    "length into the next chunk": lambda m: _info(m, length=5001),
    "the same bytes as another chunk": lambda m: _info(m, offset=5000),
    "compressed": lambda m: _info(m, transform_descriptors=["zstd"]),
    "chunk twice as large": lambda m: _chunk(m, 0, (0, 0), (6, 5)),
    "chunk smaller": lambda m: _chunk(m, 0, (0, 0), (2, 5)),
    "chunk over another, volumes equal": lambda m: _chunk(m, 0, (4, 1), (3, 5)),
    "chunk outside": lambda m: _chunk(m, 0, (8, 1), (3, 5)),
    "negative chunk": lambda m: _chunk(m, 0, (-1, 0), (3, 5)),
    "chunk of another rank": lambda m: _chunk(m, 0, (0,), (15,)),
    "chunk missing": lambda m: _described(m).chunks.pop() and None,
    "chunk twice": lambda m: _described(m).chunks.append(_described(m).chunks[0]),
    "no chunks": lambda m: _described(m).chunks.clear(),
    "storage missing": lambda m: m.storage_data.pop(MetadataIndex("uneven", (0, 0))) and None,
    "storage of nothing": lambda m: m.storage_data.update({MetadataIndex("ghost", (0,)): m.storage_data[MetadataIndex("uneven", (0, 0))]}),
    "tensor stored as an object": lambda m: m.storage_data.update({MetadataIndex("uneven"): m.storage_data[MetadataIndex("x/shard_0_1")]}),
    "object stored in chunks": lambda m: m.storage_data.update(
        {MetadataIndex("x/shard_0_1", (0,)): m.storage_data.pop(MetadataIndex("x/shard_0_1"))}
    ),
    "unknown dtype": lambda m: setattr(_described(m).properties, "dtype", torch.complex64),
    "dtype that is a string": lambda m: setattr(_described(m).properties, "dtype", "bfloat16"),
    "shape of a million axes": lambda m: setattr(_described(m), "size", torch.Size((1,) * 1_000_000)),
    "negative shape": lambda m: setattr(_described(m), "size", (-10, -6)),
    "shape beyond any tensor": lambda m: setattr(_described(m), "size", (2**63, 6)),
    "chunks are no list": lambda m: setattr(_described(m), "chunks", "abc"),
    "key that is a number": lambda m: m.state_dict_metadata.update({7: _described(m)}),  # type: ignore[dict-item]
    "key of a megabyte": lambda m: m.state_dict_metadata.update({"k" * 1_000_000: _described(m)}),
    "entry of another class": lambda m: m.state_dict_metadata.update({"uneven": torch.Size((1,))}),  # type: ignore[dict-item]
    "no storage data": lambda m: setattr(m, "storage_data", None),
    "storage data is a list": lambda m: setattr(m, "storage_data", [1]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_metadata_is_refused(name: str) -> None:
    metadata = torchs(TENSORS, OBJECTS)
    assert read_metadata(pickle.dumps(metadata), "m").tensors  # the benign twin
    HOSTILE[name](metadata)
    with pytest.raises(SourceError) as caught:
        read_metadata(pickle.dumps(metadata), "m")
    assert len(caught.value.line) < 800


def test_another_root_is_refused() -> None:
    for value in (Path("/x"), {"state_dict_metadata": {}, "storage_data": {}}, [], None):
        with pytest.raises(SourceError):
            read_metadata(pickle.dumps(value), "m")


def test_keys_that_are_skipped_are_not_checked() -> None:
    metadata = torchs({**TENSORS, "optimizer.x": replace(TENSORS["uneven"], shape=(99, 99))}, OBJECTS)
    with pytest.raises(SourceError):
        read_metadata(pickle.dumps(metadata), "m")
    found = read_metadata(pickle.dumps(metadata), "m", lambda key: key.startswith("optimizer"))
    assert found == DcpMetadata(TENSORS, OBJECTS)
