"""`--not-strict`: what is missing or unknown is left out of an hf folder and named; nothing else becomes possible."""

from __future__ import annotations

import json
import pickle

import pytest
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader

from glmconv import Options, convert, open_checkpoint
from glmconv.errors import SourceError
from tests.conftest import EACH
from tests.roundtrip.shards import MANIFEST, Stored, Surgery, contents, copied, reindexed

PRESET = "glm4.5-355B-A32B"
NORM, STRAY = "model.layers.1.input_layernorm.weight", "model.layers.1.stray.weight"


@pytest.fixture
def partial(toy, tmp_path):
    """A release that lacks one tensor and has one of its own."""
    folder = copied(toy(PRESET, EACH), tmp_path / "partial")
    work = Surgery.at(folder, NORM)
    del work.tensors[NORM]
    work.tensors[STRAY] = Stored("BF16", [2], b"\0\0\0\0")
    work.close()
    reindexed(folder)
    return folder


def tensors(folder):
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


def options_in(folder):
    return json.loads((folder / MANIFEST).read_bytes())["options"]


def test_what_is_missing_or_unknown_is_left_out_and_named(partial, glmconv, tmp_path):
    out = tmp_path / "out"
    assert glmconv("convert", partial, out, "--to", "hf").code == 5
    answer = glmconv("convert", partial, out, "--to", "hf", "--not-strict", "--verify", "full")
    assert answer.code == 0, answer.err
    assert f"{NORM}: is missing, and left out" in answer.err
    assert f"{STRAY}: is unknown to glm4_moe, and left out" in answer.err
    assert "no whole model" in answer.err
    assert (options_in(out)["missing"], options_in(out)["unexpected"]) == ([NORM], [STRAY])
    before, after = tensors(partial), tensors(out)
    assert set(before) - set(after) == {STRAY}
    assert all(after[name].equal(before[name]) for name in after)
    assert (out / "config.json").read_bytes() == (partial / "config.json").read_bytes()
    assert "already done" in glmconv("convert", partial, out, "--to", "hf", "--not-strict").out


def test_what_was_written_so_is_whole_by_its_manifest_and_no_source_without_being_told(partial, glmconv, tmp_path):
    convert(partial, {"hf": tmp_path / "out"}, options=Options(strict=False))
    assert glmconv("verify", tmp_path / "out").code == 0
    assert glmconv("verify", partial, tmp_path / "out").code == 1
    with pytest.raises(SourceError, match="is missing"):
        open_checkpoint(tmp_path / "out")


def test_a_trained_checkpoint_without_a_tensor_is_exported(toy, glmconv, tmp_path):
    source, trained = toy(PRESET, EACH), tmp_path / "trained"
    convert(source, {"torch_dist": trained})
    metadata = FileSystemReader(trained / "release").read_metadata()
    gone = "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    del metadata.state_dict_metadata[gone]
    (index,) = [index for index in metadata.storage_data if index.fqn == gone]
    del metadata.storage_data[index]
    (trained / "release/.metadata").write_bytes(pickle.dumps(metadata))
    assert glmconv("convert", trained, tmp_path / "out", "--to", "hf").code == 5
    answer = glmconv("convert", trained, tmp_path / "out", "--to", "hf", "--not-strict")
    assert answer.code == 0, answer.err
    assert set(tensors(source)) - set(tensors(tmp_path / "out")) == set(options_in(tmp_path / "out")["missing"]) == {NORM}


def test_a_whole_checkpoint_gives_the_same_bytes_strict_or_not(toy, tmp_path):
    for name, strict in (("strict", True), ("loose", False)):
        convert(toy(PRESET, EACH), {"hf": tmp_path / name}, options=Options(strict=strict))
    assert contents(tmp_path / "strict") == contents(tmp_path / "loose")


@pytest.mark.parametrize("to", ["torch_dist", "fp8", "gguf:Q8_0"])
def test_other_targets_hold_whole_models_only(to, partial, glmconv, tmp_path):
    answer = glmconv("convert", partial, "--to", f"{to}={tmp_path}/out.gguf", "--not-strict")
    assert (answer.code, "--not-strict is an hf target's" in answer.err) == (2, True)
    assert not (tmp_path / "out.gguf").exists()


def test_a_wrong_shape_stays_an_error(partial, glmconv, tmp_path):
    work = Surgery.at(partial, "model.norm.weight")
    work.tensors["model.norm.weight"] = Stored("BF16", [2], b"\0\0\0\0")
    work.close()
    answer = glmconv("convert", partial, tmp_path / "out", "--to", "hf", "--not-strict")
    assert (answer.code, "model.norm.weight: is [2]" in answer.err) == (5, True)


def test_weights_of_another_model_altogether_are_refused(partial, glmconv, tmp_path):
    for shard in partial.glob("*.safetensors"):
        shard.unlink()
    Surgery(partial / "model.safetensors", {STRAY: Stored("BF16", [2], b"\0\0\0\0")}).close()
    reindexed(partial)
    answer = glmconv("convert", partial, tmp_path / "out", "--to", "hf", "--not-strict")
    assert (answer.code, "holds no tensor of glm4_moe" in answer.err) == (5, True)


def test_a_pipeline_is_always_strict(partial, glmconv, tmp_path):
    (tmp_path / "p.yaml").write_text(f"source: {partial}\ntargets: {{hf: {{path: {tmp_path}/out, options: {{not-strict: true}}}}}}\n")
    answer = glmconv("run", tmp_path / "p.yaml")
    assert (answer.code, "is no option of a target" in answer.err) == (2, True)
