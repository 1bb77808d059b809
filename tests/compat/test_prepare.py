"""miles' prepare-glm4.5-air.sh, with a Hub on this machine."""

from __future__ import annotations

import re

import glmconv
from tests.fleet.hub import hub
from tests.roundtrip.shards import contents, copied

SCRIPT = "bash examples/infra_features/p2p_weight_transfer/prepare-glm4.5-air.sh"
HUB_ID = "zai-org/GLM-4.5-Air"


def test_air_is_downloaded_then_converted_and_neither_is_done_twice(shell, base_dir, tmp_path):
    release, models, out = tmp_path / "release", tmp_path / "models", tmp_path / "ckpt" / "GLM-4.5-Air_torch_dist"
    copied(base_dir / "GLM-4.5-106B-A12B", release)
    with hub(HUB_ID, release) as there:
        where = {
            "HF_ENDPOINT": there.url, "HF_HUB_OFFLINE": 0, "HF_HOME": tmp_path / "home", "no_proxy": "127.0.0.1",
            "MODEL_DIR": models, "CKPT_SAVE_DIR": out.parent,
        }  # fmt: skip
        got = shell(f"{SCRIPT} --download-only", **where)
        assert got.returncode == 0, got.stderr
        assert {name: (models / "GLM-4.5-Air" / name).read_bytes() for name in contents(release)} == contents(release)
        assert not out.parent.exists()
        fetched = list(there.fetched)
        for _ in range(2):
            made = shell(SCRIPT, **where)
            assert made.returncode == 0, made.stderr
        assert there.fetched == fetched
    assert "hf download --repo-type dataset zhuzilin/dapo-math-17k --local-dir /root/datasets/dapo-math-17k" in made.stderr
    assert re.search(r"^torch_dist .* done ", made.stdout, re.MULTILINE)
    glmconv.convert(release, {"torch_dist": tmp_path / "alone"})
    assert contents(out) == contents(tmp_path / "alone")


def test_the_folders_are_miles_own_where_nothing_else_is_said(dropin, monkeypatch):
    """An empty variable is none, as in the shell."""
    monkeypatch.setenv("CKPT_SAVE_DIR", "")
    monkeypatch.delenv("MODEL_DIR", raising=False)
    script = "examples/infra_features/p2p_weight_transfer/prepare_glm4_5_air.py"
    monkeypatch.setattr("glmconv.cli.execute", lambda words: 0)
    said = dropin(script, "--download-only").err.splitlines()[-1]
    assert said.endswith("prepare-glm4.5-air.yaml --set MODEL_DIR=/root/models --set CKPT_SAVE_DIR=/root --only download")
