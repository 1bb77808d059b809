"""NeMo AutoModel's command lines, on shards that torch's own writer saved."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import glmconv
from glmconv.errors import SourceError
from tests.compat.conftest import SMALL
from tests.compat.sharded import saved_in_shards

CONSOLIDATE = "tools/offline_hf_consolidation.py"


@pytest.fixture(scope="module")
def step(toy, tmp_path_factory) -> Path:
    """checkpoints/epoch_0_step_19 of a training run on three ranks."""
    there = tmp_path_factory.mktemp("checkpoints") / "epoch_0_step_19"
    saved_in_shards(toy("glm5-744B-A40B", SMALL), there / "model")
    return there


def test_shards_are_consolidated_into_the_releases_files(step, shell, toy, base_dir):
    (base_dir / "GLM-5").symlink_to(toy("glm5-744B-A40B", SMALL))
    (base_dir / "checkpoints").symlink_to(step.parent)
    done = shell(
        "python tools/offline_hf_consolidation.py -m $BASE_DIR/GLM-5 -i $BASE_DIR/checkpoints/epoch_0_step_19/model -o $BASE_DIR/consolidated"
        " --num-threads 5 --backend auto"
    )
    assert done.returncode == 0, done.stderr
    there = base_dir / "consolidated"
    assert glmconv.verify_same(base_dir / "GLM-5", there).same
    assert sorted(path.name for path in there.glob("*.safetensors")) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    assert {"tokenizer.json", "generation_config.json"} <= {path.name for path in there.iterdir()}
    assert not (there / "fqn_to_file_index_mapping.json").exists()


def test_without_its_metadata_the_release_is_asked(step, dropin, toy, tmp_path):
    source = toy("glm5-744B-A40B", SMALL)
    (tmp_path / "model").mkdir()
    for path in (step / "model").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "model")
    words = ("--model-name", source, "--input-dir", tmp_path / "model", "--output-dir", tmp_path / "out", "--cast-dtype", "bf16")
    answer = dropin(CONSOLIDATE, *words, "--diffusers-compatible")
    assert answer.code == 0, answer.err
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("*.safetensors")} == {
        path.name: path.read_bytes() for path in source.glob("*.safetensors")
    }
    with pytest.raises(SourceError, match=r"\.hf_metadata/config.json"):
        glmconv.open_checkpoint(tmp_path / "model")
    assert dropin(CONSOLIDATE, *words[:-1], "fp16").code == 6


def test_d21_a_lost_shard_is_an_error_and_not_a_warning(step, tmp_path):
    shutil.copytree(step, tmp_path / "step")
    next((tmp_path / "step/model").glob("shard-00002-*.safetensors")).unlink()
    with pytest.raises(SourceError, match=r"not covered exactly once|needs"):
        glmconv.open_checkpoint(tmp_path / "step")


@pytest.mark.parametrize("sharding", [None, '{"lm_head.weight": {"saved_offsets": [0]}}', '{"lm_head.weight": {"saved_offsets": ["0", 0]}}', "{}"])
def test_offsets_that_make_no_sense_are_refused(sharding, step, tmp_path):
    shutil.copytree(step, tmp_path / "step")
    shard = min((tmp_path / "step/model").glob("*.safetensors"))
    metadata = {"format": "pt", **({} if sharding is None else {"DCP_SHARDING_INFO": sharding})}
    save_file({"lm_head.weight": load_file(shard).popitem()[1]}, shard, metadata=metadata)
    with pytest.raises(SourceError):
        glmconv.open_checkpoint(tmp_path / "step")


def test_sharded_safetensors_are_no_target(glmconv, step, tmp_path):
    answer = glmconv("convert", step, tmp_path / "out", "--to", "dcp_safetensors")
    assert answer.code == 2
    assert "dcp_safetensors" not in answer.err.partition("Targets:")[2]


def test_a_lora_is_merged_by_the_documents_short_flags(dropin, base_dir, tmp_path):
    source = base_dir / "GLM-4.5-355B-A32B"
    name = "model.layers.0.self_attn.q_proj"
    with glmconv.open_checkpoint(source) as checkpoint:
        rows, columns = checkpoint[f"{name}.weight"].shape
    (tmp_path / "adapter").mkdir()
    factors = {f"base_model.model.{name}.lora_A.weight": torch.ones(2, columns), f"base_model.model.{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    words = ("-m", source, "-a", tmp_path / "adapter", "-o", tmp_path / "out", "--device", "cpu")
    assert dropin("tools/merge_lora.py", *words, "--dtype", "bfloat16", "--trust-remote-code", "--no-save-tokenizer").code == 0
    with glmconv.open_checkpoint(source) as before, glmconv.open_checkpoint(tmp_path / "out") as after:
        expected = (before[f"{name}.weight"].read().float() + 2).bfloat16()
        assert torch.equal(after[f"{name}.weight"].read(), expected)
    assert dropin("tools/merge_lora.py", *words, "--qlora").code == 6
    assert dropin("tools/merge_lora.py", *words, "--dtype", "float16").code == 6
