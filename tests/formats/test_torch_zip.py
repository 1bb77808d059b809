"""Blobs are torch.save's own bytes, and only such blobs are read."""

from __future__ import annotations

import argparse
import io
import zipfile
import zlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.dtypes import BY_NAME
from glmconv.errors import SourceError
from glmconv.formats.common_pt import read_common, write_common
from glmconv.formats.torch_zip import EXTRA_STATE, TorchSaveFrame, object_blob, read_object_blob, read_tensor_blob


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def at(data: bytes) -> Callable[[int, int], bytes]:
    def read(offset: int, size: int) -> bytes:
        if offset < 0 or offset + size > len(data):
            raise SourceError("ends early", file="blob")
        return data[offset : offset + size]

    return read


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 4, 5), (300, 70), (0,), (1, 70000)])
def test_a_frame_around_the_payload_is_torch_save_byte_for_byte(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) % 100).reshape(shape).to(getattr(torch, dtype))
    payload, frame = raw(tensor), TorchSaveFrame(BY_NAME[dtype], shape)
    made = frame.before() + payload + frame.after(zlib.crc32(payload))
    assert made == saved(tensor)
    assert len(made) == frame.size_before + len(payload) + frame.size_after


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=4), st.sampled_from(["float32", "bfloat16"]))
def test_what_torch_saves_is_found_where_it_lies(shape: list[int], dtype: str) -> None:
    tensor = torch.rand(shape).to(getattr(torch, dtype))
    blob = saved(tensor)
    found = read_tensor_blob(at(blob), len(blob), file="blob")
    assert (found.dtype.name, found.shape) == (dtype, tuple(shape))
    assert blob[found.payload_offset : found.payload_offset + found.payload_size] == raw(tensor)


def test_a_slice_saved_with_its_whole_storage_is_read_at_its_offset() -> None:
    tensor = torch.arange(12.0).reshape(4, 3)[2:]
    blob = saved(tensor)
    found = read_tensor_blob(at(blob), len(blob), file="blob")
    assert blob[found.payload_offset : found.payload_offset + found.payload_size] == raw(tensor.clone())


def test_the_extra_state_is_what_transformer_engine_writes() -> None:
    assert saved([torch.empty(0, dtype=torch.uint8)]) == EXTRA_STATE


def test_common_pt_is_a_namespace_for_torch_and_a_mapping_for_us() -> None:
    content = {"args": {"num_layers": 5, "moe_layer_freq": [0, 1], "norm_epsilon": 1e-5, "spec": None}, "iteration": 1, "checkpoint_version": 3.0}
    data = write_common(content)
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert vars(loaded["args"]) == {**content["args"], "params_dtype": torch.bfloat16}  # type: ignore[dict-item]
    ours = read_common(at(data), len(data), file="common.pt")
    assert ours["iteration"] == 1
    assert ours["args"]["num_layers"] == 5


def test_common_pt_as_torch_saves_it_is_read_with_unknown_classes_in_it() -> None:
    import pathlib
    import signal

    data = saved({"args": argparse.Namespace(num_layers=3, exit_signal=signal.SIGTERM, path=pathlib.PurePosixPath("/x")), "iteration": 7})
    found = read_common(at(data), len(data), file="common.pt")
    assert found["args"]["num_layers"] == 3
    assert found["iteration"] == 7


def rezipped(blob: bytes, change: Callable[[zipfile.ZipFile, zipfile.ZipFile], None]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob)) as old, zipfile.ZipFile(out, "w") as new:
        change(old, new)
    return out.getvalue()


def copy(old: zipfile.ZipFile, new: zipfile.ZipFile, skip: str = "", **how: int) -> None:
    for name in old.namelist():
        if not skip or not name.endswith(skip):
            new.writestr(name, old.read(name), **how)


BROKEN: dict[str, Callable[[zipfile.ZipFile, zipfile.ZipFile], None]] = {
    "compressed": lambda old, new: copy(old, new, compress_type=zipfile.ZIP_DEFLATED),
    "without its pickle": lambda old, new: copy(old, new, "data.pkl"),
    "without its storage": lambda old, new: copy(old, new, "data/0"),
    "two prefixes": lambda old, new: (copy(old, new), new.writestr("other/x", b"1"))[1],
    "leaves the archive": lambda old, new: (copy(old, new), new.writestr("archive/../../x", b"1"))[1],
    "big endian": lambda old, new: (copy(old, new, "byteorder"), new.writestr("archive/byteorder", b"big"))[1],
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_zip_that_torch_would_not_write_is_refused(name: str) -> None:
    blob = rezipped(saved(torch.ones(4)), BROKEN[name])
    with pytest.raises(SourceError):
        read_tensor_blob(at(blob), len(blob), file="blob")


def test_a_plain_rezipped_blob_is_still_read() -> None:
    blob = rezipped(saved(torch.ones(4)), copy)
    assert read_tensor_blob(at(blob), len(blob), file="blob").shape == (4,)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_blob_is_read_right_or_refused(data: st.DataObject) -> None:
    blob = bytearray(saved(torch.ones(4)))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = read_tensor_blob(at(bytes(blob)), len(blob), file="blob")
    except SourceError:
        return
    assert found.payload_offset >= 0
    assert found.payload_offset + found.payload_size <= len(blob)


def test_an_object_blob_comes_back_as_plain_data() -> None:
    value = {"a": [1, 2.5, "x", None, True], "b": {"c": (1, 2, 3, 4)}, "n": -5, "big": 2**40}
    data = object_blob(value)
    assert torch.load(io.BytesIO(data), weights_only=True) == value
    assert read_object_blob(at(data), len(data), file="blob") == value
