"""The deployment guide's quantization scripts, their absolute folders moved under a temporary one."""

from __future__ import annotations

import json

import glmconv

QUANTIZATION = "src/deployment/quantization"


def test_awq_from_a_trainers_checkpoint(dropin, wide, tmp_path):
    trained, there = tmp_path / "checkpoints/rlhf/final", tmp_path / "awq"
    glmconv.convert(wide, {"torch_dist": trained})
    words = ("--model_path", trained, "--output_path", there, "--bits", 4, "--group_size", 128)
    answer = dropin(f"{QUANTIZATION}/awq_quantize.py", *words)
    assert answer.code == 3  # 96 columns of this small model's experts are not groups of 128
    answer = dropin(f"{QUANTIZATION}/awq_quantize.py", *words[:-1], "auto")
    assert answer.code == 0, answer.err
    assert json.loads((there / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    result = glmconv.verify_same(wide, there)
    assert result.same
    assert result.losses


def test_fp8_and_gguf_run_as_the_guide_calls_them(shell, base_dir, wide):
    (base_dir / "final").symlink_to(wide)
    done = shell(
        "python src/deployment/quantization/fp8_quant.py --model_path $BASE_DIR/final --output_path $BASE_DIR/fp8\n"
        "python src/deployment/quantization/gguf_convert.py --model_path $BASE_DIR/final --output_path $BASE_DIR/gguf --quant q8_0\n"
        "python src/deployment/quantization/gguf_convert.py --model_path $BASE_DIR/final --output_path $BASE_DIR/model.gguf --quant Q8_0"
    )
    assert done.returncode == 0, done.stderr
    assert glmconv.verify_same(wide, base_dir / "fp8").losses
    named, given = base_dir / "gguf/final-Q8_0.gguf", base_dir / "model.gguf"
    assert named.stat().st_size == given.stat().st_size > 1_000_000
