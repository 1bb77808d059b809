"""Defects of other converters that lose or change weights, each under its number: what happens here instead."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmconv import Options, convert, open_checkpoint, verify_same
from glmconv.errors import SourceError
from tests.compat.conftest import SMALL, WIDE
from tests.roundtrip.shards import contents, copied

AIR, GLM_4_6, GLM_5 = "glm4.5-106B-A12B", "glm4.6-355B-A32B", "glm5-744B-A40B"
LATENT = replace(WIDE, layers=4, scale=Fraction(1, 8))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def edited(folder: Path, change: dict[str, torch.Tensor]) -> None:
    """Other values for tensors of a release."""
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if tensors.keys() & change.keys():
            save_file(tensors | {name: value for name, value in change.items() if name in tensors}, shard, metadata={"format": "pt"})


def written(folder: Path, field: str = "quantization_config") -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / "config.json").read_text())[field]
    return value


@pytest.fixture(scope="module")
def zeros(wide, tmp_path_factory) -> Path:
    """A release with a weight whose first block of 128 x 128 is all zero."""
    folder = copied(wide, tmp_path_factory.mktemp("zeros") / "hf")
    name = "model.layers.0.mlp.down_proj.weight"
    weight = stored(folder)[name].clone()
    weight[:128, :128] = 0
    edited(folder, {name: weight})
    return folder


@pytest.fixture(scope="module")
def blocks(zeros, tmp_path_factory) -> Path:
    there = tmp_path_factory.mktemp("blocks") / "fp8"
    convert(zeros, {"fp8": there})
    return there


@pytest.fixture(scope="module")
def mcore(toy, tmp_path_factory) -> Path:
    """GLM-4.5 in torch_dist, small files. Nobody writes into it."""
    there = tmp_path_factory.mktemp("mcore") / "mcore"
    convert(toy("glm4.5-355B-A32B", SMALL), {"torch_dist": there}, options=Options(file_size=200_000))
    return there


def test_d1_a_tensor_that_cannot_be_converted_ends_the_run_by_its_name(mcore, tmp_path):
    broken = copied(mcore, tmp_path / "mcore")
    file = broken / "release/__0_1.distcp"
    data = bytearray(file.read_bytes())
    at = data.index(b"PK\x05\x06")  # the first tensor's zip directory
    data[at : at + 4] = b"\0\0\0\0"
    file.write_bytes(data)
    with pytest.raises(SourceError, match="__0_1"):
        convert(broken, {"hf": tmp_path / "hf"})
    assert not (tmp_path / "hf/config.json").exists()


def test_d2_a_file_that_cannot_be_read_ends_the_run_by_its_name(mcore, tmp_path):
    broken = copied(mcore, tmp_path / "mcore")
    file = broken / "release/__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SourceError, match=r"__0_0\.distcp"):
        convert(broken, {"hf": tmp_path / "hf"})


def test_d3_shards_are_the_same_bytes_in_every_run(mcore, tmp_path):
    for name, workers in (("one", 1), ("many", 8)):
        convert(mcore, {"hf": tmp_path / name}, options=Options(workers=workers, file_size=200_000))
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_d4_pairs_of_latent_attention_arrive_whole_from_many_threads(toy, tmp_path):
    source = toy(GLM_5, SMALL)
    convert(source, {"torch_dist": tmp_path / "mcore"}, options=Options(workers=16))
    convert(tmp_path / "mcore", {"hf": tmp_path / "hf"}, options=Options(workers=16))
    assert stored(tmp_path / "hf").keys() == stored(source).keys()
    assert verify_same(source, tmp_path / "hf").same


def test_d5_d17_the_mtp_layer_is_kept_unless_it_is_dropped_on_request(toy, tmp_path):
    for preset in ("glm4.5-355B-A32B", GLM_5):
        convert(toy(preset, SMALL), {"torch_dist": tmp_path / preset})
        with open_checkpoint(tmp_path / preset) as checkpoint:
            assert [name for name, _ in checkpoint if name.startswith("model.layers.4.")]


def test_d6_a_source_with_a_scale_for_each_row_is_scaled(wide_fp8):
    parts, name = stored(wide_fp8), "model.layers.1.self_attn.o_proj"
    wanted = (parts[f"{name}.weight"].float() * parts[f"{name}.weight_scale"]).bfloat16()
    with open_checkpoint(wide_fp8) as checkpoint:
        assert torch.equal(checkpoint[f"{name}.weight"].read(), wanted)


def by_hand(folder: Path, name: str, block: int) -> torch.Tensor:
    parts = stored(folder)
    codes, scales = parts[f"{name}.weight"].float(), parts[f"{name}.weight_scale_inv"]
    assert scales.dtype == torch.float32
    grid = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[: codes.shape[0], : codes.shape[1]]
    return (codes * grid).bfloat16()


def test_d7_blocks_are_dequantized_in_float32_and_rounded_once(blocks):
    name = "model.layers.1.mlp.down_proj"
    with open_checkpoint(blocks) as checkpoint:
        assert torch.equal(checkpoint[f"{name}.weight"].read(), by_hand(blocks, name, 128))


def test_d8_blocks_have_the_size_that_the_config_says(wide, tmp_path):
    name = "model.layers.1.self_attn.o_proj"
    convert(wide, {"fp8:64x64": tmp_path / "fp8"})
    with open_checkpoint(tmp_path / "fp8") as checkpoint:
        assert torch.equal(checkpoint[f"{name}.weight"].read(), by_hand(tmp_path / "fp8", name, 64))


def test_d9_bf16_of_an_fp8_origin_says_nothing_of_quantization(wide_fp8, dropin, tmp_path):
    convert(wide_fp8, {"torch_dist": tmp_path / "mcore"})
    words = ("--input-dir", tmp_path / "mcore", "--output-dir", tmp_path / "out", "--origin-hf-dir", wide_fp8, "-a")
    assert dropin("tools/convert_torch_dist_to_hf.py", *words).code == 0
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert not [name for name in stored(tmp_path / "out") if "scale" in name]


def test_d10_an_all_zero_block_gives_no_nan(blocks):
    name = "model.layers.0.mlp.down_proj"
    parts = stored(blocks)
    assert parts[f"{name}.weight_scale_inv"][0, 0] > 0
    assert not parts[f"{name}.weight"].float().isnan().any()
    with open_checkpoint(blocks) as checkpoint:
        assert torch.equal(checkpoint[f"{name}.weight"].read()[:128, :128], torch.zeros(128, 128, dtype=torch.bfloat16))


def test_d11_scales_that_are_said_to_be_powers_of_two_are(wide, tmp_path):
    convert(wide, {"fp8:ue8m0": tmp_path / "fp8"})
    scales = [tensor for name, tensor in stored(tmp_path / "fp8").items() if name.endswith("scale_inv")]
    assert written(tmp_path / "fp8")["scale_fmt"] == "ue8m0"
    assert scales
    assert all((torch.frexp(scale).mantissa == 0.5).all() for scale in scales)


def test_d12_heads_of_the_mtp_layer_stay_as_they_are(toy, tmp_path):
    convert(toy("glm4.5-355B-A32B", WIDE), {"fp8": tmp_path / "fp8"})
    parts = stored(tmp_path / "fp8")
    for name in ("lm_head", "model.layers.4.shared_head.head", "model.layers.4.eh_proj", "model.layers.4.mlp.gate"):
        assert parts[f"{name}.weight"].dtype == torch.bfloat16, name
    assert parts["model.layers.0.mlp.down_proj.weight"].dtype == torch.float8_e4m3fn


def test_d13_an_fp8_release_is_a_source_for_fp8(wide_fp8, dropin, tmp_path):
    answer = dropin("tools/convert_hf_to_fp8.py", "--model-dir", wide_fp8, "--save-dir", tmp_path / "fp8")
    assert answer.code == 0, answer.err
    assert "quantized anew" in answer.err


def test_d14_scales_of_rows_have_their_own_name_and_blocks_need_no_size(wide, dropin, tmp_path):
    tool = "tools/convert_hf_to_fp8.py"
    assert dropin(tool, "--model-dir", wide, "--save-dir", tmp_path / "rows", "--strategy", "channel", "--block-size", 128, 128).code == 0
    names = stored(tmp_path / "rows")
    assert [name for name in names if name.endswith(".weight_scale")]
    assert not [name for name in names if name.endswith("_inv")]
    assert dropin(tool, "--model-dir", wide, "--save-dir", tmp_path / "blocks").code == 0
    assert [name for name in stored(tmp_path / "blocks") if name.endswith(".weight_scale_inv")]


@pytest.fixture
def without_a_shard(toy, tmp_path) -> Path:
    folder = copied(toy(GLM_4_6, SMALL), tmp_path / "hf")
    (folder / "model.safetensors.index.json").unlink()  # nothing says that there were more
    next(iter(sorted(folder.glob("model-*.safetensors")))).unlink()
    return folder


def test_d15_d20_a_lost_shard_is_an_error_even_without_an_index(without_a_shard, tmp_path):
    with pytest.raises(SourceError, match="is missing"):
        convert(without_a_shard, {"torch_dist": tmp_path / "mcore"})
    assert not (tmp_path / "mcore").exists()


def test_d16_d25_the_index_names_every_tensor_where_it_is_the_mtp_layers_too(toy, tmp_path):
    convert(toy(GLM_4_6, SMALL), {"hf": tmp_path / "hf"})
    index = json.loads((tmp_path / "hf/model.safetensors.index.json").read_text())["weight_map"]
    assert index == {name: shard.name for shard in (tmp_path / "hf").glob("*.safetensors") for name in load_file(shard)}
    assert index["model.layers.4.eh_proj.weight"] == "mtp.safetensors"


def test_d18_copies_in_the_mtp_layer_come_back_and_names_are_hugging_faces(mcore, toy, tmp_path):
    convert(mcore, {"hf": tmp_path / "hf"})
    names = stored(tmp_path / "hf").keys()
    assert {"model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight"} <= names
    assert names == stored(toy("glm4.5-355B-A32B", SMALL)).keys()
    assert not [name for name in names if "linear_fc" in name]


@pytest.mark.parametrize("to", ["hf", "fp8"])
def test_d19_a_zeroed_weight_fails_verify(to, wide, tmp_path, glmconv):
    convert(wide, {to: tmp_path / "out"})
    name = "model.layers.1.self_attn.o_proj.weight"
    edited(tmp_path / "out", {name: torch.zeros_like(stored(tmp_path / "out")[name])})
    answer = glmconv("verify", wide, tmp_path / "out")
    assert answer.code == 1
    assert name in answer.out


def test_d22_every_fp8_weight_has_its_scales(blocks):
    parts = stored(blocks)
    codes = [name for name, tensor in parts.items() if tensor.dtype == torch.float8_e4m3fn]
    assert codes
    assert all(f"{name}_scale_inv" in parts for name in codes)


@pytest.mark.parametrize("to", ["fp8:channel", "awq:g32", "int4:g32", "mxfp8"])
def test_d23_quantized_releases_keep_the_mtp_layer(to, wide, tmp_path):
    convert(wide, {to: tmp_path / "out"})
    assert json.loads((tmp_path / "out/config.json").read_text())["num_nextn_predict_layers"] == 1
    with open_checkpoint(wide) as before, open_checkpoint(tmp_path / "out") as after:
        assert set(before.tensors) == set(after.tensors)


def test_d24_no_tensor_of_glm_5_3_flash_is_renamed_or_fused(toy, tmp_path):
    source = toy("glm5.3-flash-321B", SMALL)
    convert(source, {"hf": tmp_path / "hf"})
    assert stored(tmp_path / "hf").keys() == stored(source).keys()


def test_d26_a_release_without_its_mtp_layer_says_so(toy, tmp_path):
    convert(toy(AIR, SMALL), {"hf": tmp_path / "hf", "gguf:F16": tmp_path / "model.gguf"}, options=Options(mtp=False))
    assert json.loads((tmp_path / "hf/config.json").read_text())["num_nextn_predict_layers"] == 0
    gguf = pytest.importorskip("gguf")
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["glm4moe.block_count"].contents() == 4
    nextn = fields.get("glm4moe.nextn_predict_layers")
    assert nextn is None or nextn.contents() == 0


def test_d27_the_routers_bias_is_not_rounded(toy, tmp_path):
    folder = copied(toy(AIR, SMALL), tmp_path / "hf")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = torch.tensor([34.5, 34.6434, 34.3571, 34.5001], dtype=torch.float32)
    edited(folder, {name: bias})
    convert(folder, {"torch_dist": tmp_path / "mcore"})
    convert(tmp_path / "mcore", {"hf": tmp_path / "back"})
    assert torch.equal(stored(tmp_path / "back")[name], bias)


def test_d28_a_config_that_names_the_indexer_wrongly_is_not_believed(toy, tmp_path):
    convert(toy(GLM_5, LATENT), {"fp8": tmp_path / "fp8"})
    shutil.copytree(tmp_path / "fp8", tmp_path / "official", ignore=shutil.ignore_patterns(".glmconv", "glmconv_*"))
    config = json.loads((tmp_path / "official/config.json").read_text())
    listed = config["quantization_config"]["modules_to_not_convert"]
    config["quantization_config"]["modules_to_not_convert"] = [n.replace("indexer.weights_proj", "indexers_proj") for n in listed]
    assert config["quantization_config"]["modules_to_not_convert"] != listed
    (tmp_path / "official/config.json").write_text(json.dumps(config))
    assert verify_same(tmp_path / "fp8", tmp_path / "official").same
