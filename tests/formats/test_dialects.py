"""Megatron dialects of GLM-5: written as asked, read by detection, never guessed."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp

from glmconv import Options, convert, open_checkpoint, verify
from tests.conftest import EACH
from tests.roundtrip.shards import contents, release

GLM_5 = "glm5.2-744B-A40B"
KEYS = {
    "slime": ("self_attention.wk.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
    "mcore": ("self_attention.core_attention.indexer.linear_wk.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
    "bridge": ("self_attention.core_attention.indexer.linear_wk.weight", "self_attention.q_layernorm.weight"),
}


@pytest.fixture(scope="module")
def written(toy, tmp_path_factory):
    root = tmp_path_factory.mktemp("dialects")
    for name in (*KEYS, "miles", "auto"):
        convert(toy(GLM_5, EACH), {"torch_dist": root / name}, options=Options(megatron_dialect=name))
    return root


def stored(path):
    """Key -> tensor, by torch's own reader."""
    state = dcp.FileSystemReader(path / "release").read_metadata().state_dict_metadata
    found = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in state.items() if hasattr(entry, "size")}
    dcp.load(found, storage_reader=dcp.FileSystemReader(path / "release"), no_dist=True)
    return found


@pytest.mark.parametrize("name", KEYS)
def test_a_dialect_has_its_keys_and_its_order_of_an_indexer_heads_rows(name, written, toy):
    found = stored(written / name)
    layer = "decoder.layers.0."
    assert all(layer + key in found for key in KEYS[name])
    others = {key for keys in KEYS.values() for key in keys} - set(KEYS[name])
    assert not any(layer + key in found for key in others)
    with open_checkpoint(toy(GLM_5, EACH)) as source:
        wk = source["model.layers.0.self_attn.indexer.wk.weight"].read()
        rope = source.arch.sizes["rope"]
    turned = torch.cat([wk[rope:], wk[:rope]])
    assert torch.equal(found[layer + KEYS[name][0]], wk if name == "bridge" else turned)


@pytest.mark.parametrize("name", KEYS)
def test_a_dialect_is_detected_and_comes_back_byte_for_byte(name, written, toy, tmp_path, glmconv):
    convert(written / name, {"hf": tmp_path / "back"})
    assert release(tmp_path / "back") == release(toy(GLM_5, EACH))
    assert f"read as Megatron dialect {name}" in glmconv("inspect", written / name).out + glmconv("inspect", written / name).err


def test_auto_and_miles_write_what_slime_writes(written):
    wanted = contents(written / "slime")
    assert contents(written / "auto") == contents(written / "miles") == wanted


def test_one_dialect_becomes_another(written, tmp_path):
    convert(written / "slime", {"torch_dist": tmp_path / "bridge"}, options=Options(megatron_dialect="bridge"))
    assert {key: t.tolist() for key, t in stored(tmp_path / "bridge").items()} == {key: t.tolist() for key, t in stored(written / "bridge").items()}
    assert verify(written / "mcore", tmp_path / "bridge").same


@pytest.mark.parametrize("asked", ["slime", "mcore"])
def test_another_dialect_than_the_tensors_tell_is_refused(asked, written, glmconv, tmp_path):
    answer = glmconv("convert", written / "bridge", tmp_path / "out", "--to", "hf", "--source-dialect", asked)
    assert answer.code == 5
    assert not (tmp_path / "out").exists()


def test_what_could_be_two_dialects_is_not_guessed(written, glmconv, tmp_path):
    state = stored(written / "bridge") | {key: t for key, t in stored(written / "mcore").items() if "layer_norm_weight" in key}
    folder = tmp_path / "both" / "iter_0000001"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    shutil.copytree(written / "bridge" / "glmconv_origin", tmp_path / "both" / "glmconv_origin")
    answer = glmconv("convert", tmp_path / "both", tmp_path / "out", "--to", "hf")
    assert answer.code == 5
    assert "could be of several Megatron dialects (mcore, bridge)" in answer.err
    assert "--source-dialect" in answer.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("preset", "asked"), [("glm4-9B-0414", "bridge"), ("glm4-9B-0414", "mcore"), ("glm4.5v-108B-A12B", "slime")])
def test_a_dialect_without_the_architecture_is_exit_6(preset, asked, toy, glmconv, tmp_path):
    answer = glmconv("convert", toy(preset, EACH), tmp_path / "out", "--to", "torch_dist", "--megatron-dialect", asked)
    assert answer.code == 6
    assert f"no Megatron dialect {asked}" in answer.err
    assert not (tmp_path / "out").exists()


def test_a_dialect_without_a_megatron_target_is_a_usage_error(toy, glmconv, tmp_path):
    assert glmconv("convert", toy(GLM_5, EACH), tmp_path / "out", "--to", "hf", "--megatron-dialect", "slime").code == 2
