"""The command lines of Megatron-Bridge's documents, their absolute folders moved under a temporary one."""

from __future__ import annotations

import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from megatron.core.transformer.transformer_config import MLATransformerConfig

import glmconv
from glmconv.toy.build import ToyOptions
from tests.compat.conftest import SMALL
from tests.roundtrip.shards import contents

OLD = "examples/conversion/convert_checkpoints.py"
NEW = "scripts/conversion/convert.py"
PROVIDERS_OWN = {  # what Bridge's GPTModelProvider has beyond Megatron-Core's configuration
    "_target_", "vocab_size", "should_pad_vocab", "make_vocab_size_divisible_by", "seq_length", "position_embedding_type", "rotary_base",
    "rotary_percent", "share_embeddings_and_output_weights", "transformer_layer_spec", "hf_model_id",
}  # fmt: skip
MCORE = ToyOptions(layers=4, experts=4, scale=SMALL.scale)


@pytest.fixture
def hub(base_dir: Path, tmp_path: Path) -> Path:
    """$HF_HOME: a Hub's cache with the releases that the documents name."""
    for name, folder in (("GLM-4.5-Air", "GLM-4.5-106B-A12B"), ("GLM-4.5", "GLM-4.5-355B-A32B")):
        model = tmp_path / f"cache/hub/models--zai-org--{name}"
        (model / "refs").mkdir(parents=True)
        (model / "refs/main").write_text("0" * 40)
        shutil.copytree(base_dir / folder, model / "snapshots" / ("0" * 40), symlinks=False, ignore=shutil.ignore_patterns(".glmconv", "glmconv_*"))
    return tmp_path / "cache"


def test_the_documents_import_and_export_run_with_hub_ids(shell, hub, base_dir):
    done = shell(
        "python examples/conversion/convert_checkpoints.py import --hf-model zai-org/GLM-4.5-Air --megatron-path $ROOT/models/glm45-air-106b\n"
        "mkdir -p $ROOT/results/glm45_air/checkpoints\n"
        "cp -r $ROOT/models/glm45-air-106b/iter_0000000 $ROOT/results/glm45_air/checkpoints/iter_0001000\n"  # a trained one
        "python examples/conversion/convert_checkpoints.py export --hf-model zai-org/GLM-4.5-Air"
        " --megatron-path $ROOT/results/glm45_air/checkpoints/iter_00001000 --hf-path ./glm45-air-hf-export",
        HF_HOME=hub, HF_HUB_OFFLINE=1, ROOT=base_dir,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (base_dir / "models/glm45-air-106b/iter_0000000/run_config.yaml").is_file()
    assert glmconv.verify_same(base_dir / "GLM-4.5-106B-A12B", base_dir.parent / "work/glm45-air-hf-export").same


def test_the_355b_line_and_the_successors_lines_run(shell, hub, base_dir):
    done = shell(
        "python examples/conversion/convert_checkpoints.py import --hf-model zai-org/GLM-4.5 --megatron-path $ROOT/models/glm45-355b"
        " --torch-dtype bfloat16 --device-map auto --trust-remote-code\n"
        "scripts/conversion/convert.sh export --executor local --device cpu --hf-model zai-org/GLM-4.5 --megatron-path $ROOT/models/glm45-355b"
        " --hf-path $ROOT/back --no-progress --not-strict -tp 1 -pp 1 -ep 1 -etp 1 --distributed-save --save-every-n-ranks 2\n"
        "scripts/conversion/convert.sh import --executor local --device cpu --hf-model zai-org/GLM-4.5 --megatron-path $ROOT/again"
        " --low-memory-save --overwrite --torch-dtype bfloat16",
        HF_HOME=hub, HF_HUB_OFFLINE=1, ROOT=base_dir,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: --device-map is not needed" in done.stderr
    assert "--not-strict" in next(line for line in done.stderr.splitlines() if line.startswith("= glmconv convert") and "--to hf" in line)
    assert "not strict: " not in done.stderr
    assert glmconv.verify_same(base_dir / "GLM-4.5-355B-A32B", base_dir / "back").same
    assert contents(base_dir / "models/glm45-355b") == contents(base_dir / "again")


@pytest.mark.parametrize("given", ["", "iter_0000000", "iter_0", "iter_00000000000"[:14]])
def test_an_iteration_is_found_by_its_number(given, dropin, base_dir, tmp_path):
    source = base_dir / "GLM-4.5-355B-A32B"
    assert dropin(OLD, "import", "--hf-model", source, "--megatron-path", tmp_path / "there").code == 0
    words = ("export", "--hf-model", source, "--megatron-path", tmp_path / "there" / given, "--hf-path", tmp_path / "back")
    assert dropin(OLD, *words).code == 0
    assert glmconv.verify_same(source, tmp_path / "back").same


def test_an_iteration_that_is_not_there_is_not_guessed(dropin, base_dir, tmp_path):
    source = base_dir / "GLM-4.5-355B-A32B"
    assert dropin(OLD, "import", "--hf-model", source, "--megatron-path", tmp_path / "there").code == 0
    words = ("export", "--hf-model", source, "--megatron-path", tmp_path / "there/iter_0000001", "--hf-path", tmp_path / "back")
    assert dropin(OLD, *words).code == 5


@pytest.mark.parametrize(("preset", "provider"), [("glm4.5-355B-A32B", "GPTModelProvider"), ("glm4.7-flash-30B-A3B", "MLAModelProvider")])
def test_run_config_describes_the_model_to_bridge(preset, provider, dropin, toy, tmp_path):
    source = toy(preset, MCORE)
    assert dropin(OLD, "import", "--hf-model", source, "--megatron-path", tmp_path / "there").code == 0
    model = yaml.safe_load((tmp_path / "there/iter_0000000/run_config.yaml").read_text())["model"]
    checkpoint = glmconv.open_checkpoint(source)
    assert model["_target_"].endswith(f".{provider}")
    assert model["num_layers"] == 4
    assert model["num_moe_experts"] == 4
    assert model["moe_layer_freq"] == [int(layer in checkpoint.arch.layers["sparse"]) for layer in range(4)]
    assert model["bf16"] is True
    targets = [value["_target_"] for value in (model, *model.values()) if isinstance(value, dict)]
    assert all(target.startswith(("megatron.", "torch.")) for target in targets)
    known = {field.name for field in fields(MLATransformerConfig)} | PROVIDERS_OWN
    assert set(model) - known == set()
    assert glmconv.verify_same(source, tmp_path / "there").same


def test_a_checkpoint_for_bridge_without_a_known_description_says_so(dropin, toy, tmp_path):
    answer = dropin(OLD, "import", "--hf-model", toy("glm5-744B-A40B", MCORE), "--megatron-path", tmp_path / "there")
    assert answer.code == 0, answer.err
    assert "no run_config.yaml is written" in answer.err
    assert not (tmp_path / "there/iter_0000000/run_config.yaml").exists()


def test_a_cast_is_refused_and_so_is_a_revision(dropin, base_dir, tmp_path):
    words = ("--hf-model", base_dir / "GLM-4.5-355B-A32B", "--megatron-path", tmp_path / "there")
    assert dropin(OLD, "import", *words, "--torch-dtype", "float32").code == 6
    assert dropin(NEW, "import", *words, "--hf-revision", "v1").code == 6
    assert not (tmp_path / "there").exists()


def test_a_round_trip_is_compared_bit_by_bit_and_leaves_nothing(dropin, base_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    source = base_dir / "GLM-4.5-355B-A32B"
    before = {path.name for path in tmp_path.iterdir()}
    answer = dropin(NEW, "roundtrip", "--device", "gpu", "--gpus-per-node", 8, "--hf-model-id", source, "--ep", 8, "--skip-save")
    assert answer.code == 0, answer.err
    assert "the same weights" in answer.out
    assert {path.name for path in tmp_path.iterdir()} == before
    kept = ("--megatron-save-path", tmp_path / "mcore", "--output-dir", tmp_path / "out")
    assert dropin(NEW, "roundtrip", "--hf-model", source, *kept).code == 0
    assert glmconv.verify_same(source, tmp_path / "out" / source.name).same
    assert dropin(NEW, "roundtrip", "--hf-model", source, "--megatron-load-path", tmp_path / "mcore").code == 0


def test_slurm_options_make_a_job_script_and_nothing_is_submitted(dropin, base_dir, tmp_path):
    words = ("import", "--executor", "slurm", "--nodes", 2, "--gpus-per-node", 8, "--account", "a", "--partition", "p", "--time", "01:00:00",
             "--exclusive", "--container-image", "i", "--mount", "/data", "--env", "HF_TOKEN", "--srun-arg=--mpi=none", "--detach", "--hf-model",
             base_dir / "GLM-4.5-355B-A32B", "--megatron-path", tmp_path / "there")  # fmt: skip
    answer = dropin(NEW, *words)
    assert answer.code == 6
    assert "nothing was submitted" in answer.err
    assert dropin(NEW, *words, "--emit-sbatch").code == 0
    assert dropin(NEW, *words, "--dry-run").code == 0
    for line in ("#SBATCH --nodes=2", "#SBATCH --ntasks-per-node=8", "#SBATCH --partition=p", "#SBATCH --exclusive", "srun --mpi=none python "):
        assert line in answer.out
    assert "--executor" not in answer.out
    assert not (tmp_path / "there").exists()


def test_dry_runs_write_nothing(dropin, base_dir, tmp_path):
    words = ("--hf-model", base_dir / "GLM-4.5-355B-A32B", "--dry-run")
    assert dropin(NEW, "import", *words, "--megatron-path", tmp_path / "there").code == 0
    assert dropin(NEW, "roundtrip", *words, "--megatron-save-path", tmp_path / "there").code == 0
    assert not (tmp_path / "there").exists()
