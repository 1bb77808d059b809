"""Megatron-Core judges the torch_dist folders that glmconv writes, and glmconv reads those that Megatron-Core saved: same bits both ways.

Megatron-Core 0.16.1 itself builds, saves, loads and runs models small enough for a CPU, as two processes at several parallel layouts. What of them
is not its own is listed in `test_key_maps.py`. All cases run in one pair of processes (`ranks.py`), whose findings the tests read. What each tensor
should be is said by key maps that share nothing with glmconv (`glm4_moe.py` and its neighbours, proven by `test_key_maps.py`).
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")
pytest.importorskip("psutil")  # without it Megatron-Core's save waits for ever
pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

from glmconv.checkpoint import open_checkpoint
from glmconv.convert import Options, convert
from tests.megatron.release import Shape, reference_logits
from tests.megatron.session import Made
from tests.megatron.shapes import COMPARED, IN_FLOAT32, LIKE_9B, LIKE_355B, LIKE_AIR, LIKE_FLASH, LIKE_GLM5


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().view(torch.uint8).numpy().tobytes()


def aliases(shape: Shape) -> set[str]:
    return {f"model.layers.{shape.layers}.{name}.weight" for name in ("embed_tokens", "shared_head.head")} if shape.mtp and shape.aliases else set()


@pytest.mark.parametrize(("shape", "layout"), COMPARED, ids=str)
def test_megatron_core_loads_every_parameter_bit_by_bit(made: Made, shape: Shape, layout: str) -> None:
    assert made.problems(f"load {shape.name} {layout}") == []


def test_megatron_core_loads_what_was_quantized_as_its_dequantized_weights(made: Made) -> None:
    assert made.problems("fp8") == []
    before, after = (load_file(made.release(LIKE_AIR) / "model.safetensors"), load_file(next((made.folder / "fp8-plain").glob("*.safetensors"))))
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_the_ranks_tell_rows_in_another_order_apart(made: Made) -> None:
    assert made.problems("swapped") == ["decoder.layers.0.self_attention.linear_qkv.weight differs"] * 2


def read_back(path: Path, origin: Path | None = None) -> dict[str, object]:
    with open_checkpoint(path, origin=origin) as checkpoint:
        return {name: bits(tensor.read()) for name, tensor in checkpoint}


@pytest.mark.parametrize(("shape", "layout"), [*COMPARED, (LIKE_9B, "per-layer")], ids=str)
def test_what_megatron_core_saved_is_read_back_bit_by_bit(made: Made, shape: Shape, layout: str) -> None:
    assert made.problems(f"save {shape.name} {layout}") == []
    release = load_file(made.release(shape) / "model.safetensors")
    read = read_back(made.saved(shape, layout), made.release(shape))
    assert read.keys() | aliases(shape) == release.keys()
    assert [name for name in read if read[name] != bits(release[name])] == []


@pytest.mark.parametrize("shape", [LIKE_355B, LIKE_AIR], ids=str)
def test_what_megatron_core_saved_is_read_back_without_its_release(made: Made, shape: Shape) -> None:
    release = load_file(made.release(shape) / "model.safetensors")
    assert read_back(made.saved(shape, "tp2")) == {name: bits(tensor) for name, tensor in release.items() if name not in aliases(shape)}


@pytest.mark.parametrize("shape", [LIKE_355B, LIKE_FLASH, *LIKE_GLM5.values(), LIKE_9B], ids=str)
def test_what_megatron_core_saved_becomes_the_release_again(made: Made, shape: Shape, tmp_path: Path) -> None:
    convert(made.saved(shape, "tp2"), {"hf": tmp_path / "back"}, options=Options(origin=str(made.release(shape))))
    back = {path.name: path.read_bytes() for path in (tmp_path / "back").glob("*.safetensors")}
    assert back.keys() == {"model.safetensors"}
    assert {name: bits(tensor) for name, tensor in load_file(tmp_path / "back" / "model.safetensors").items()} == {
        name: bits(tensor) for name, tensor in load_file(made.release(shape) / "model.safetensors").items()
    }


@pytest.mark.parametrize("shape", IN_FLOAT32, ids=str)
def test_logits_agree_with_transformers(made: Made, shape: Shape) -> None:
    ours, theirs = made.logits(f"run {shape.name}"), reference_logits(made.release(shape), shape)
    assert ours.keys() == theirs.keys()
    for head, expected in theirs.items():
        assert expected.abs().max() > 1
        assert (ours[head] - expected).abs().max().item() < 1e-5  # 1e-6 to 3e-6 seen, at logits up to 4
