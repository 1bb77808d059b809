"""docs/coming-from: every command of every page runs, one after another, on toys under the pages' folders, in a temporary place."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import glmconv as package
from tests.compat.conftest import COMPAT, ROOT, SMALL, WIDE
from tests.compat.sharded import saved_in_shards
from tests.conftest import Answer
from tests.roundtrip.shards import copied

PAGES = sorted((ROOT / "docs/coming-from").glob("*.md"))
RELEASES = {
    "GLM-4.7-355B-A32B": ("glm4.7-355B-A32B", WIDE),
    "GLM-4.5-355B-A32B": ("glm4.5-355B-A32B", SMALL),
    "GLM-4.5-106B-A12B": ("glm4.5-106B-A12B", SMALL),
    "GLM-5": ("glm5-744B-A40B", SMALL),
}  # fmt: skip

OUTPUTS = {  # page -> (a source, an output of its commands with the same weights)
    "README": [("GLM-4.7-355B-A32B", "GLM-4.7-fp8"), ("GLM-4.7-355B-A32B", "GLM-4.7-awq")],
    "slime": [("GLM-4.7-355B-A32B", "GLM-4.7-355B-A32B_torch_dist"), ("GLM-4.7-355B-A32B", "GLM-4.7-355B-A32B-FP8"),
              ("GLM-4.7-355B-A32B", "exported"), ("GLM-4.7-355B-A32B", "again"), ("GLM-4.7-355B-A32B-FP8", "cast"),
              ("GLM-4.7-355B-A32B", "int4"), ("GLM-4.7-355B-A32B", "loaded")],
    "miles": [("GLM-4.5-355B-A32B", "GLM-4.5-355B-A32B_torch_dist"), ("GLM-4.7-355B-A32B", "GLM-4.7-355B-A32B-MXFP8"),
              ("GLM-4.5-355B-A32B", "exported")],
    "megatron-bridge": [("GLM-4.5-106B-A12B", "models/glm45-air-106b"), ("GLM-4.5-106B-A12B", "glm45-air-hf-export"),
                        ("GLM-4.5-355B-A32B", "glm45-hf-export")],
    "automodel": [("GLM-5", "consolidated"), ("merged", "merged-mcore")],
}  # fmt: skip


def lines(page: Path) -> list[str]:
    blocks = re.findall(r"^```\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture
def base(toy, tmp_path, monkeypatch) -> Path:
    """$BASE_DIR with releases (also in the Hub's cache), a training step of AutoModel's, one of Bridge's and an adapter."""
    for name, (preset, options) in RELEASES.items():
        (tmp_path / name).symlink_to(toy(preset, options))
    for hub, name in (("GLM-4.5", "GLM-4.5-355B-A32B"), ("GLM-4.5-Air", "GLM-4.5-106B-A12B")):
        repository = tmp_path / f"hub/models--zai-org--{hub}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("0" * 40)
        copied(tmp_path / name, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    trained = package.Options(iteration=1000)
    package.convert(tmp_path / "GLM-4.5-106B-A12B", {"torch_dist": tmp_path / "results/glm45_air/checkpoints"}, options=trained)
    saved_in_shards(tmp_path / "GLM-5", tmp_path / "checkpoints/epoch_0_step_19/model")
    name = "base_model.model.model.layers.0.self_attn.o_proj"
    with package.open_checkpoint(tmp_path / "GLM-4.5-355B-A32B") as checkpoint:
        rows, columns = checkpoint["model.layers.0.self_attn.o_proj.weight"].shape
    (tmp_path / "adapter").mkdir()
    factors = {f"{name}.lora_A.weight": torch.ones(2, columns), f"{name}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, tmp_path / "adapter/adapter_model.safetensors")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    return tmp_path


def words_of(line: str, base: Path) -> list[str]:
    """A line's words, variables replaced; MODEL_ARGS are the toy's whose folder the line names, as the scripts' are the release's."""
    moved = re.sub(r" /(models|results)/", rf" {base}/\1/", line.replace("$BASE_DIR", str(base)))
    words = shlex.split(moved)
    if "${MODEL_ARGS[@]}" in words:
        with package.open_checkpoint(words[words.index("--hf-checkpoint") + 1]) as checkpoint:
            args = " ".join(package.megatron_flags(checkpoint.config, checkpoint.arch)).split()
        at = words.index("${MODEL_ARGS[@]}")
        words[at : at + 1] = args
    return words


def run(line: str, base: Path, dropin, glmconv) -> Answer:
    """One line of a page in this process: as the shell would, but that torchrun has one rank."""
    words = words_of(line, base)
    if words[0] == "cd":
        assert (ROOT / words[1]).samefile(COMPAT)
        return Answer(0, "", "")
    if words[0] == "source":
        assert "MODEL_ARGS=(" in (COMPAT / words[1]).read_text()
        return Answer(0, "", "")
    if words[0] == "glmconv":
        return glmconv(*words[1:])
    at = next(n for n, word in enumerate(words) if word.endswith((".py", ".sh")))
    assert words[at - 1] == "python" or "torchrun" in words or words[at].endswith(".sh"), line
    return dropin(words[at].replace("convert.sh", "convert.py"), *words[at + 1 :])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_a_page_runs_and_gives_the_weights(page, base, dropin, glmconv):
    ran = [(line, run(line, base, dropin, glmconv)) for line in lines(page)]
    assert len(ran) >= 3
    for line, answer in ran:
        assert answer.code == 0, f"{line}: {answer.err}"
    for release, output in OUTPUTS.get(page.stem, ()):
        assert package.verify_same(base / release, base / output).same, output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_script_and_page_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:tools|scripts|examples|src)/[\w./-]*\.(?:py|sh))`", text)
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    not_yet = {"tools/convert_hf_to_nvfp4.py"}
    assert [path for path in named if not (COMPAT / path).exists() and path not in not_yet] == []
    assert [path for path in linked if not (page.parent / path).exists()] == []
