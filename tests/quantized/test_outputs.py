"""What a quantized folder holds: names, shapes, dtypes and config keys as serving engines ask for them; the same bytes however it is made.

Acceptance conditions, from the engines' sources: vLLM 0.33 `Fp8Config.from_config` (quant_method, activation_scheme; weight_block_size needs
`dynamic`), `validate_fp8_block_shape`; SGLang 0.5.23 `Fp8Config`, `validate_block_quant_shapes`; vLLM `AWQConfig.from_config` (bits, group_size,
zero_point), `awq.py` create_weights; `CompressedTensorsConfig` (config_groups, format, ignore), `CompressedTensorsWNA16`.
"""

from __future__ import annotations

import json
import sys
import threading
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from glmconv import Options, convert, open_checkpoint, verify
from glmconv.archs.spec import Role
from glmconv.check.verify import verify_same
from glmconv.errors import Interrupted
from glmconv.toy.build import ToyOptions
from tests.quantized.models import as_torch, parts_of, relative_rmse, tensors_of
from tests.roundtrip.shards import INDEX, MANIFEST, contents

TARGETS = ("fp8", "fp8:ue8m0", "fp8:channel", "fp8:tensor", "mxfp8", "awq:g32", "int4:g32", "int4:g64:asym")
TOY = ToyOptions(layers=4, experts=16, scale=Fraction(1, 16), file_size=2_000_000)
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("target", TARGETS)
def test_index_and_files_agree_and_every_module_is_listed_or_quantized(target, made):
    folder = made(target)
    stored, quantization = tensors_of(folder), config_of(folder)["quantization_config"]
    index = json.loads((folder / INDEX).read_text()) if (folder / INDEX).exists() else None
    if index:
        assert set(index["weight_map"]) == set(stored)
        assert index["metadata"]["total_size"] == sum(len(tensor.data) for tensor in stored.values())
    listed = quantization.get("modules_to_not_convert", quantization.get("ignore"))
    assert listed == sorted(set(listed))
    with open_checkpoint(folder) as checkpoint:
        linear = {Role.LINEAR, Role.EXPERT, Role.HEAD, Role.ROUTER}
        for name, tensor in checkpoint.arch.tensors.items():
            if tensor.role in linear and name.endswith(".weight"):
                whole = name in stored and stored[name].dtype == "BF16"
                assert (name.removesuffix(".weight") in listed) == whole, name
            else:
                assert name.removesuffix(".weight") not in listed
    assert {"lm_head", "model.layers.1.mlp.gate"} <= set(listed)
    assert "model.embed_tokens" not in listed


@pytest.mark.parametrize("target", ["fp8", "fp8:ue8m0", "fp8:cuda-compat"])
def test_blocks_are_as_vllm_and_sglang_ask(target, made):
    folder = made(target)
    quantization = config_of(folder)["quantization_config"]
    assert quantization["quant_method"] == "fp8"
    assert (quantization["activation_scheme"], quantization["fmt"], quantization["weight_block_size"]) == ("dynamic", "e4m3", [128, 128])
    assert quantization.get("scale_fmt") == ("ue8m0" if target == "fp8:ue8m0" else None)
    stored = tensors_of(folder)
    scales = [name for name in stored if name.endswith("_scale_inv")]
    assert len(scales) == 3 * 4 + 3 + 2 * 17 * 3
    for name in scales:
        weight, scale = stored[name.removesuffix("_scale_inv")], stored[name]
        assert (weight.dtype, scale.dtype) == ("F8_E4M3", "F32")
        assert scale.shape == [-(-n // 128) for n in weight.shape]
        assert name.split(".")[-2] in LINEAR
        if target == "fp8:ue8m0":
            assert not (as_torch(scale).view(torch.int32) & 0x7FFFFF).any()


@pytest.mark.parametrize(("target", "form"), [("fp8:channel", "float-quantized"), ("fp8:tensor", "float-quantized"), ("mxfp8", "mxfp8-quantized")])
def test_float_quantized_is_as_compressed_tensors_asks(target, form, made):
    quantization = config_of(made(target))["quantization_config"]
    assert (quantization["quant_method"], quantization["format"], quantization["quantization_status"]) == ("compressed-tensors", form, "compressed")
    (group,) = quantization["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert group["weights"]["strategy"] == {"fp8:channel": "channel", "fp8:tensor": "tensor", "mxfp8": "group"}[target]
    assert group["input_activations"]["dynamic"] is True
    for name, tensor in tensors_of(made(target)).items():
        if name.endswith("weight_scale"):
            rows, columns = tensors_of(made(target))[name.removesuffix("_scale")].shape
            assert tensor.shape == {"fp8:channel": [rows, 1], "fp8:tensor": [1], "mxfp8": [rows, columns // 32]}[target]
            assert tensor.dtype == ("U8" if target == "mxfp8" else "F32")
            break


def test_awq_is_as_vllm_asks(made):
    quantization = config_of(made("awq:g32"))["quantization_config"]
    assert {key: quantization[key] for key in ("quant_method", "bits", "group_size", "zero_point", "version")} == {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    stored = tensors_of(made("awq:g32"))
    parts = parts_of(stored, "model.layers.1.mlp.experts.7.down_proj.weight")
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        "qweight": (torch.int32, (128, 32)), "qzeros": (torch.int32, (4, 32)), "scales": (torch.float16, (4, 256)),
    }  # fmt: skip
    for name in quantization["modules_to_not_convert"]:  # AWQ's loaders look for each as a part of a longer path
        fused = [key for key in stored if key.endswith("qweight") and name in key]
        assert not fused, name


@pytest.mark.parametrize(("target", "zeros"), [("int4:g32", False), ("int4:g64:asym", True)])
def test_pack_quantized_is_as_vllm_asks(target, zeros, made):
    group = 32 if target == "int4:g32" else 64
    (scheme,) = config_of(made(target))["quantization_config"]["config_groups"].values()
    assert scheme["weights"]["num_bits"] == 4
    assert (scheme["weights"]["group_size"], scheme["weights"]["symmetric"]) == (group, not zeros)
    parts = parts_of(tensors_of(made(target)), "model.layers.1.mlp.experts.7.down_proj.weight")
    shapes = {"weight_packed": (torch.int32, (256, 16)), "weight_scale": (torch.bfloat16, (256, 128 // group)), "weight_shape": (torch.int64, (2,))}
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == shapes | (
        {"weight_zero_point": (torch.int32, (32, 128 // group))} if zeros else {}
    )
    assert parts["weight_shape"].tolist() == [256, 128]


@pytest.mark.parametrize("target", TARGETS)
def test_errors_are_within_bounds_and_everything_else_is_exact(target, source, made):
    result = verify_same(source, made(target))
    assert result.same
    assert len(result.losses) == 3 * 4 + 3 + 2 * 17 * 3
    with open_checkpoint(source) as before, open_checkpoint(made(target)) as after:
        name = "model.layers.2.mlp.experts.5.up_proj.weight"
        loss = next(loss for loss in result.losses if loss.tensor == name)
        assert loss.rmse == pytest.approx(relative_rmse(after[name].read(), before[name].read()), rel=1e-5)
        assert 0.02 < loss.rmse < (0.03 if "fp8" in target else 0.12)
        assert loss.worst == pytest.approx((after[name].read().float() - before[name].read().float()).abs().max().item())
    assert not verify_same(source, made(target), max_rmse=0.01).same


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("workers", [1, 8])
def test_the_bytes_are_the_same_whatever_the_workers(target, workers, source, made, tmp_path):
    convert(source, {target: tmp_path / "again"}, options=Options(workers=workers))
    assert contents(tmp_path / "again") == contents(made(target))


@pytest.mark.parametrize("target", ["fp8", "awq:g32", "int4:g64:asym", "fp8:tensor"])
def test_small_buffers_and_many_files_change_no_tensor(target, source, made, tmp_path, monkeypatch):
    for name in ("CHUNK", "SMALLEST_CHUNK"):
        monkeypatch.setattr(sys.modules["glmconv.convert"], name, 4096)
    convert(source, {target: tmp_path / "again"}, options=Options(file_size=100_000))
    again = tensors_of(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 5
    assert {name: tensor.data for name, tensor in again.items()} == {name: tensor.data for name, tensor in tensors_of(made(target)).items()}


@pytest.mark.parametrize("target", ["fp8", "awq:g32"])
def test_an_interrupted_run_is_finished_with_the_same_bytes(target, source, made, tmp_path):
    options = Options(file_size=300_000, workers=1)
    convert(source, {target: tmp_path / "whole"}, options=options)
    stop, seen = threading.Event(), []

    def progress(count: int) -> None:
        seen.append(count)
        if len(seen) == 9:
            stop.set()

    with pytest.raises(Interrupted):
        convert(source, {target: tmp_path / "there"}, options=options, progress=progress, stop=stop)
    assert not (tmp_path / "there" / MANIFEST).exists()
    done = convert(source, {target: tmp_path / "there"}, options=options)
    assert done.outcomes[0].files_kept > 0
    assert contents(tmp_path / "there") == contents(tmp_path / "whole")
    assert verify(tmp_path / "there").same


def test_several_targets_of_one_run_are_those_of_several_runs(source, made, tmp_path):
    convert(source, {"torch_dist": tmp_path / "td", "fp8": tmp_path / "fp8", "awq:g32": tmp_path / "awq"})
    assert contents(tmp_path / "fp8") == contents(made("fp8"))
    assert contents(tmp_path / "awq") == contents(made("awq:g32"))
    assert verify(source, tmp_path / "td").same
    convert(tmp_path / "td", {"fp8": tmp_path / "again"})
    assert {k: v.data for k, v in tensors_of(tmp_path / "again").items()} == {k: v.data for k, v in tensors_of(made("fp8")).items()}


def test_fp8_goes_to_torch_dist_as_its_dequantized_weights_do(made, tmp_path):
    convert(made("fp8"), {"hf": tmp_path / "plain", "torch_dist": tmp_path / "one"})
    convert(tmp_path / "plain", {"torch_dist": tmp_path / "two"})
    assert "quantization_config" not in config_of(tmp_path / "plain")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert {n: b for n, b in one.items() if n.endswith((".distcp", ".metadata", "common.pt", "config.json"))} == {
        n: b for n, b in two.items() if n.endswith((".distcp", ".metadata", "common.pt", "config.json"))
    }
    assert verify(made("fp8"), tmp_path / "one").same


def test_the_mtp_layer_is_quantized_like_any_other(toy, tmp_path):
    source = toy("glm4.5-355B-A32B", TOY)
    convert(source, {"fp8:channel": tmp_path / "made"})
    stored = tensors_of(tmp_path / "made")
    mtp = {name for name in stored if name.startswith("model.layers.4.")}
    assert "model.layers.4.mlp.experts.3.up_proj.weight_scale" in mtp
    for name in ("eh_proj.weight", "shared_head.head.weight", "embed_tokens.weight", "mlp.gate.weight"):
        assert stored[f"model.layers.4.{name}"].dtype == "BF16"
    convert(tmp_path / "made", {"hf": tmp_path / "dropped"}, options=Options(mtp=False))
    assert not any(name.startswith("model.layers.4.") for name in tensors_of(tmp_path / "dropped"))
    assert verify_same(source, tmp_path / "dropped", mtp=False).losses == []
