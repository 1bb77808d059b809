"""The command lines of slime's and miles' documents, as they stand there."""

from __future__ import annotations

import json
import runpy
import socket
from dataclasses import replace
from pathlib import Path

import pytest

import glmconv
from glmconv.archs import presets
from tests.compat.conftest import COMPAT, SMALL
from tests.roundtrip.shards import contents

IMPORT = "tools/convert_hf_to_torch_dist.py"
EXPORT = "tools/convert_torch_dist_to_hf.py"
# scripts/models/glm4.5-355B-A32B.sh of both projects: 33 lines
GLM_4_5 = {
    "--disable-bias-linear", "--qk-layernorm", "--group-query-attention", "--num-attention-heads 96", "--num-query-groups 8", "--kv-channels 128",
    "--num-layers 92", "--hidden-size 5120", "--ffn-hidden-size 12288", "--add-qkv-bias", "--normalization RMSNorm", "--position-embedding-type rope",
    "--rotary-percent 0.5", "--swiglu", "--untie-embeddings-and-output-weights", "--vocab-size 151552", "--rotary-base 1000000",
    "--moe-ffn-hidden-size 1536", "--moe-shared-expert-intermediate-size 1536", "--moe-router-pre-softmax", "--moe-router-score-function sigmoid",
    "--moe-router-enable-expert-bias", "--moe-router-bias-update-rate 0", "--moe-router-load-balancing-type seq_aux_loss",
    "--moe-token-dispatcher-type alltoall", "--moe-router-topk 8", "--moe-router-topk-scaling-factor 2.5", '--moe-layer-freq "[0]*3+[1]*89"',
    "--num-experts 160", "--moe-grouped-gemm", "--moe-router-dtype fp32", "--moe-permute-fusion", "--moe-aux-loss-coeff 0",
}  # fmt: skip


def same(a: Path, b: Path) -> bool:
    return glmconv.verify_same(a, b).same


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def config(folder: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads((folder / "config.json").read_text())
    return value


def test_the_model_args_scripts_are_what_the_tables_say():
    written = runpy.run_path(str(COMPAT / "scripts/models/write.py"))["scripts"]()
    there = {path.name: path.read_text() for path in (COMPAT / "scripts/models").glob("*.sh")}
    assert there == written, "run `make docs`"
    assert {"glm4-9B.sh", "glm4-32B.sh", "glm4.5-355B-A32B.sh", "glm4.5-106B-A12B.sh", "glm4.7-30B-A3B.sh", "glm5-744B-A40B.sh"} <= set(there)


def test_model_args_of_glm_4_5_are_those_of_slime():
    lines = (COMPAT / "scripts/models/glm4.5-355B-A32B.sh").read_text().splitlines()
    assert {line.strip() for line in lines if line.startswith("    ")} == GLM_4_5


@pytest.mark.parametrize("preset", [preset.name for spec, preset in presets() if "slime" in spec.dialects])
def test_model_args_of_a_preset_agree_with_its_own_config(preset, toy):
    checkpoint = glmconv.open_checkpoint(toy(preset, SMALL))
    words = " ".join(glmconv.megatron_flags(checkpoint.config, checkpoint.arch)).split()
    assert glmconv.read_flags(words).describes_a_model
    assert glmconv.disagreements(checkpoint, words) == []


def test_miles_imports_under_torchrun(shell, base_dir):
    done = shell(
        "source scripts/models/glm4.5-355B-A32B.sh\n"
        "PYTHONPATH=/root/Megatron-LM torchrun --nproc-per-node 2 --master-port $PORT"
        " tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]}"
        " --hf-checkpoint $BASE_DIR/GLM-4.5-355B-A32B --save $BASE_DIR/GLM-4.5-355B-A32B_torch_dist",
        PORT=free_port(),
    )
    assert done.returncode == 0, done.stderr
    there = base_dir / "GLM-4.5-355B-A32B_torch_dist"
    assert (there / "latest_checkpointed_iteration.txt").read_text() == "release"
    assert (there / "release/.metadata").is_file()
    assert same(base_dir / "GLM-4.5-355B-A32B", there)
    assert done.stderr.count("= glmconv convert") == 1  # rank 0 speaks for all


def test_slime_imports_on_two_nodes(shell, base_dir):
    line = (
        "PYTHONPATH=/root/Megatron-LM/ torchrun --nproc-per-node 1 --master-addr ${MASTER_ADDR} --master-port $PORT --nnodes=2"
        " --node-rank ${NODE_RANK} tools/convert_hf_to_torch_dist.py ${MODEL_ARGS[@]}"
        " --hf-checkpoint $BASE_DIR/GLM-4.7-355B-A32B/ --save $BASE_DIR/GLM-4.7-355B-A32B_torch_dist/"
    )
    model = "cp scripts/models/glm4.7-355B-A32B.sh scripts/models/glm4.5-355B-A32B.sh; source scripts/models/glm4.5-355B-A32B.sh"  # same sizes
    both = f"{model}\n(NODE_RANK=1; {line}) & NODE_RANK=0; {line}; wait $!"
    done = shell(both, MASTER_ADDR="127.0.0.1", PORT=free_port())
    assert done.returncode == 0, done.stderr
    assert same(base_dir / "GLM-4.7-355B-A32B", base_dir / "GLM-4.7-355B-A32B_torch_dist")


def test_mtp_is_kept_unless_its_number_is_given_as_none(dropin, base_dir):
    source = base_dir / "GLM-4.7-355B-A32B"
    kept = dropin(IMPORT, "--hf-checkpoint", source, "--save", base_dir / "kept")
    assert "the MTP layer is kept, though --mtp-num-layers 1 is not given" in kept.err
    given = dropin(IMPORT, "--hf-checkpoint", source, "--save", base_dir / "given", "--mtp-num-layers", 1)
    assert "MTP" not in given.err
    assert contents(base_dir / "kept") == contents(base_dir / "given")
    left = dropin(IMPORT, "--hf-checkpoint", source, "--save", base_dir / "left", "--mtp-num-layers", 0)
    assert "warning: --mtp-num-layers 0" in left.err
    assert glmconv.open_checkpoint(base_dir / "left").config["num_nextn_predict_layers"] == 0


def test_arguments_of_another_model_are_refused_by_name_and_nothing_is_written(dropin, base_dir):
    words = (COMPAT / "scripts/models/glm4.5-355B-A32B.sh").read_text().replace('"', "").partition("MODEL_ARGS=(")[2].rstrip(")\n").split()
    answer = dropin(IMPORT, *words, "--hf-checkpoint", base_dir / "GLM-4.5-355B-A32B", "--save", base_dir / "there")
    assert answer.code == 2
    assert "error: --num-layers 92: config.json says 4" in answer.err
    assert "error: --moe-layer-freq [0]*3+[1]*89: config.json says [0]*3+[1]*1" in answer.err
    assert not (base_dir / "there").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rotary-base", "10000"), "warning: --rotary-base 10000: config.json says 1000000"),
        (("--moe-router-topk-scaling-factor", "1.0"), "warning: --moe-router-topk-scaling-factor 1.0: config.json says 2.5"),
        (("--padded-vocab-size", "9999"), "warning: --padded-vocab-size 9999"),
        (("--custom-model-provider-path", "a.py"), "note: --custom-model-provider-path is not needed"),
        (("--spec", "slime_plugins.models.glm5.glm5", "get_glm5_spec", "--allgather-cp", "--decoder-last-pipeline-num-layers", "18"), "= glmconv"),
        (("--tensor-model-parallel-size", "8", "--make-vocab-size-divisible-by", "128", "--optimizer-cpu-offload"), "note: 3 arguments of Megatron"),
        (("--megatron-to-hf-mode", "bridge"), "= glmconv"),
    ],
)
def test_any_argument_of_megatron_is_accepted_and_said_what_became_of_it(words, said, dropin, base_dir):
    answer = dropin(IMPORT, *words, "--hf-checkpoint", base_dir / "GLM-4.5-355B-A32B", "--save", base_dir / "there")
    assert answer.code == 0, answer.err
    assert said in answer.err


def test_bridge_mode_is_refused_where_trainers_order_rows_differently(dropin, toy, tmp_path):
    answer = dropin(IMPORT, "--megatron-to-hf-mode", "bridge", "--hf-checkpoint", toy("glm5-744B-A40B", SMALL), "--save", tmp_path / "there")
    assert answer.code == 6
    assert "--megatron-dialect" in answer.err


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (EXPORT, ()),
        (EXPORT, ("-f", "-a", "--chunk-size", "200000", "--model-name", "glm4moe")),
        ("tools/convert_torch_dist_to_hf_parallel.py", ("--load-max-workers", "2", "--save-max-workers", "16")),
        ("tools/convert_torch_dist_to_hf_ray.py", ("--max-file-bytes", "200000", "--concurrency", "4", "--task-group-bytes", "1", "--no-progress",
                                                   "--progress-interval-seconds", "5")),
    ],
)  # fmt: skip
def test_exports_give_the_release_back(script, words, dropin, base_dir):
    source, mcore = base_dir / "GLM-4.5-355B-A32B", base_dir / "GLM-4.5-355B-A32B_torch_dist"
    glmconv.convert(source, {"torch_dist": mcore})
    answer = dropin(script, "--input-dir", mcore / "release", "--output-dir", base_dir / "back", "--origin-hf-dir", source, *words)
    assert answer.code == 0, answer.err
    assert same(source, base_dir / "back")
    if "200000" not in words:
        assert {path.name: path.read_bytes() for path in (base_dir / "back").glob("*.safetensors")} == {
            path.name: path.read_bytes() for path in source.glob("*.safetensors")
        }


def test_an_export_without_mtp_takes_it_from_the_release_if_asked_to(dropin, base_dir):
    source = base_dir / "GLM-4.7-355B-A32B"
    assert dropin(IMPORT, "--hf-checkpoint", source, "--save", base_dir / "mcore", "--mtp-num-layers", 0).code == 0
    words = ("--input-dir", base_dir / "mcore", "--origin-hf-dir", source)
    assert dropin(EXPORT, *words, "--output-dir", base_dir / "without").code == 0
    assert config(base_dir / "without")["num_nextn_predict_layers"] == 0
    assert dropin(EXPORT, *words, "--output-dir", base_dir / "with", "-a").code == 0
    assert same(source, base_dir / "with")


def test_an_export_in_the_way_is_moved_aside_by_force_and_nothing_is_deleted(dropin, base_dir):
    source, mcore, out = base_dir / "GLM-4.5-355B-A32B", base_dir / "mcore", base_dir / "out"
    glmconv.convert(source, {"torch_dist": mcore})
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert dropin(EXPORT, "--input-dir", mcore, "--output-dir", out).code == 4
    assert dropin(EXPORT, "--input-dir", mcore, "--output-dir", out, "--force").code == 0
    assert (base_dir / "out.bak-1/thesis.tex").read_text() == "years of work"


def test_exports_refuse_what_would_make_no_checkpoint(dropin, base_dir):
    source, mcore = base_dir / "GLM-4.5-355B-A32B", base_dir / "mcore"
    glmconv.convert(source, {"torch_dist": mcore})
    assert dropin(EXPORT, "--input-dir", mcore, "--output-dir", base_dir / "out", "--vocab-size", 7).code == 2
    ray = "tools/convert_torch_dist_to_hf_ray.py"
    assert dropin(ray, "--input-dir", mcore, "--output-dir", base_dir / "out", "--source-key-regex", "layers.1").code == 6
    assert dropin(ray, "--input-dir", mcore, "--output-dir", base_dir / "out", "--dry-run-plan").code == 0
    assert not (base_dir / "out").exists()


def test_convert_to_hf_writes_what_a_run_would_load_and_compares_it(dropin, base_dir, toy):
    source, mcore = base_dir / "GLM-4.5-355B-A32B", base_dir / "mcore"
    glmconv.convert(source, {"torch_dist": mcore})
    words = ("--load", mcore, "--hf-checkpoint", source, "--num-layers", 4, "--tensor-model-parallel-size", 8)
    answer = dropin("tools/convert_to_hf.py", *words, "--output-dir", base_dir / "out", "--check-same")
    assert answer.code == 0, answer.err
    assert "the same weights" in answer.out
    assert same(source, base_dir / "out")
    assert dropin("tools/convert_to_hf.py", *words).code == 2
    other = ("--load", mcore, "--hf-checkpoint", toy("glm4.5-355B-A32B", replace(SMALL, seed=1)), "--check-same")
    assert dropin("tools/convert_to_hf.py", *other).code == 1


def test_the_documents_fp8_line_runs_from_bf16_and_from_the_official_fp8(shell, base_dir, wide, wide_fp8):
    for source in (wide, wide_fp8):
        (base_dir / "GLM-4.7-355B-A32B").unlink()
        (base_dir / "GLM-4.7-355B-A32B").symlink_to(source)
        done = shell(
            "python tools/convert_hf_to_fp8.py --model-dir $BASE_DIR/GLM-4.7-355B-A32B/ --save-dir $BASE_DIR/GLM-4.7-355B-A32B-FP8/"
            " --strategy block --block-size 128 128 --max-workers 4"
        )
        assert done.returncode == 0, done.stderr
        there = base_dir / "GLM-4.7-355B-A32B-FP8"
        quantization = config(there)["quantization_config"]
        assert isinstance(quantization, dict)
        assert quantization["weight_block_size"] == [128, 128]
        assert quantization["fmt"] == "e4m3"
        result = glmconv.verify_same(source, there)
        assert result.same
        assert result.losses
        there.rename(base_dir / f"done-{source.name}")


@pytest.mark.parametrize(
    ("words", "to"),
    [
        ((), "fp8"),
        (("--strategy", "block", "--scale-fmt", "ue8m0"), "fp8:ue8m0"),
        (("--block-size", "64", "64"), "fp8:64x64"),
        (("--strategy", "channel", "--block-size", "128", "128"), "fp8:channel"),
        (("--strategy", "tensor"), "fp8:tensor"),
    ],
)  # fmt: skip
def test_fp8_options_are_glmconvs_targets(words, to, dropin, wide, tmp_path):
    answer = dropin("tools/convert_hf_to_fp8.py", "--model-dir", wide, "--save-dir", tmp_path / "there", *words)
    assert answer.code == 0, answer.err
    assert f"--to {to}\n" in answer.err


def test_power_of_two_scales_of_rows_are_refused(dropin, wide, tmp_path):
    words = ("--strategy", "channel", "--scale-fmt", "ue8m0")
    assert dropin("tools/convert_hf_to_fp8.py", "--model-dir", wide, "--save-dir", tmp_path / "there", *words).code == 2


def test_fp8_is_cast_back_to_bf16(dropin, wide, wide_fp8, tmp_path):
    words = ("--input-fp8-hf-path", wide_fp8, "--output-bf16-hf-path", tmp_path / "there")
    assert dropin("tools/fp8_cast_bf16.py", *words).code == 0
    assert "quantization_config" not in config(tmp_path / "there")
    assert same(wide_fp8, tmp_path / "there")


def test_int4_quantizes_the_routed_experts_only_as_the_peers_do_by_default(dropin, wide, tmp_path):
    words = ("--model-dir", wide, "--save-dir", tmp_path / "there", "--group-size", 32, "--max-workers", 4)
    answer = dropin("tools/convert_hf_to_int4_direct.py", *words)
    assert answer.code == 0, answer.err
    result = glmconv.verify_same(wide, tmp_path / "there")
    assert result.same
    assert result.losses
    assert all(".mlp.experts." in loss.tensor for loss in result.losses)


def test_int4_takes_ignore_rules_by_beginning_and_by_pattern(dropin, wide, tmp_path):
    rules = ("model.layers.0.", "re:.*experts.*", "lm_head")
    answer = dropin("tools/convert_hf_to_int4_direct.py", "--model-dir", wide, "--save-dir", tmp_path / "there", "--ignore-rules", *rules)
    assert answer.code == 0, answer.err
    names = {loss.tensor for loss in glmconv.verify_same(wide, tmp_path / "there").losses}
    assert "model.layers.1.self_attn.q_proj.weight" in names
    assert not [name for name in names if "experts" in name or name.startswith("model.layers.0.")]


def test_int4_that_calibrates_is_refused_and_says_what_does_not(dropin, wide, tmp_path):
    words = ("--input-dir", wide, "--output-dir", tmp_path / "there", "--data-dir", "d", "--quant-type", "W4A16", "--num-calibration-samples", 256,
             "--max-sequence-length", 2048, "--dampening-frac", 0.1, "--trust-remote-code", "--quant-group-size", 32)  # fmt: skip
    answer = dropin("tools/convert_hf_to_int4.py", *words)
    assert answer.code == 6
    assert "convert_hf_to_int4_direct.py" in answer.err
    assert not (tmp_path / "there").exists()


def test_mxfp8_leaves_layers_at_both_ends_as_they_are(dropin, wide, tmp_path):
    words = ("--model-dir", wide, "--save-dir", tmp_path / "there", "--device", "cuda", "--num-layers-at-start-in-bf16", 1,
             "--num-layers-at-end-in-bf16", 1, "--extra-high-precision-layers-hf", "layers.1.self_attn.o_proj")  # fmt: skip
    answer = dropin("tools/convert_hf_to_mxfp8.py", *words)
    assert answer.code == 0, answer.err
    names = {loss.tensor for loss in glmconv.verify_same(wide, tmp_path / "there").losses}
    assert "model.layers.1.mlp.down_proj.weight" in names
    assert not [name for name in names if name.startswith(("model.layers.0.", "model.layers.3."))]
    assert "model.layers.1.self_attn.o_proj.weight" not in names


@pytest.mark.parametrize("script", sorted(str(path.relative_to(COMPAT)) for path in (COMPAT / "tools").glob("*_*.py")))
def test_every_tool_has_a_help_of_its_own(script, capfd):
    from tests.compat.conftest import loaded

    with pytest.raises(SystemExit) as left:
        loaded(COMPAT / script).main(["--help"])
    assert left.value.code == 0
    assert "Drop-in for " in capfd.readouterr().out
