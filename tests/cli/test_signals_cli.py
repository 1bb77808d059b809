"""A real conversion interrupted or killed on its way: its exit code, what it leaves, and that the same command finishes with the same bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from fractions import Fraction
from pathlib import Path

import pytest

from glmconv.toy.build import ToyOptions
from tests.cli.processes import ENVIRONMENT, GLMCONV, ROOT, records, when
from tests.roundtrip.shards import MANIFEST, contents

BIG = ToyOptions(layers=4, experts=16, scale=Fraction(1, 5), file_size=5_000_000)
PRESET = "glm4.6-355B-A32B"
MARKS = ("config.json", "model.safetensors.index.json", "release/.metadata", "release/common.pt", "latest_checkpointed_iteration.txt", MANIFEST)


@pytest.fixture(scope="module")
def source(toy):
    """Some hundred megabytes in dozens of files."""
    return toy(PRESET, BIG)


def command(source: Path, there: Path, to: str) -> list[str]:
    return ["convert", str(source), str(there), "--to", to, "--shard-size", "5MB", "--workers", "2"]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """`whole(to)`: the bytes of a conversion that nobody disturbs."""
    made: dict[str, dict[str, bytes]] = {}

    def find(to: str) -> dict[str, bytes]:
        if to not in made:
            there = tmp_path_factory.mktemp("whole") / to
            subprocess.run([*GLMCONV, *command(source, there, to)], env=ENVIRONMENT, cwd=ROOT, check=True, capture_output=True)
            made[to] = contents(there)
        return made[to]

    return find


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*GLMCONV, *arguments], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def stopped(child: subprocess.Popen[str], signum: int) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a child that gets a signal now; it has 30 seconds on a busy machine, 10 are promised."""
    child.send_signal(signum)
    out, err = child.communicate(timeout=30)
    return child.returncode, out, err


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)], ids=["SIGINT", "SIGTERM", "SIGKILL"]
)
@pytest.mark.parametrize(("to", "after"), [("torch_dist", 1), ("torch_dist", 20), ("hf", 7)])
def test_an_interrupted_conversion_is_finished_by_the_same_command(to, after, signum, code, source, whole, tmp_path, glmconv):
    there = tmp_path / "there"
    child = start(*command(source, there, to))
    when(child, lambda: len(records(there)) >= after)
    answer, out, err = stopped(child, signum)
    assert (answer, out) == (code, "")
    if signum != signal.SIGKILL:
        assert len(err.splitlines()) == 1
        assert err.startswith("error: interrupted")
    assert not any((there / mark).exists() for mark in MARKS)
    assert glmconv("inspect", there).code == 5
    kept = {path: path.stat().st_ino for path in there.rglob("*.safetensors")} | {path: path.stat().st_ino for path in there.rglob("*.distcp")}
    assert len(kept) >= after
    again = glmconv(*command(source, there, to), "--json")
    assert again.code == 0
    (target,) = json.loads(again.out)["targets"]
    assert target["files_kept"] >= after
    assert target["files_written"] > 0
    assert {path: path.stat().st_ino for path in kept} == kept
    assert contents(there) == whole(to)


def test_a_conversion_is_finished_after_any_number_of_interruptions(source, whole, tmp_path):
    there = tmp_path / "there"
    for after, signum in ((1, signal.SIGKILL), (5, signal.SIGINT), (10, signal.SIGKILL), (15, signal.SIGTERM)):
        child = start(*command(source, there, "torch_dist"))
        when(child, lambda after=after: len(records(there)) >= after)
        assert stopped(child, signum)[0] != 0
    assert start(*command(source, there, "torch_dist")).wait(60) == 0
    assert contents(there) == whole("torch_dist")


def test_an_interrupted_toy_is_finished_by_the_same_command(source, tmp_path, glmconv):
    there = tmp_path / "there"
    sizes = ("--layers", "4", "--experts", "16", "--scale", "1/5", "--shard-size", "5MB")
    child = start("toy", PRESET, "-o", str(there), *sizes)
    when(child, lambda: len(records(there)) >= 3)
    assert stopped(child, signal.SIGTERM)[0] == 143
    assert glmconv("toy", PRESET, "-o", there, *sizes).code == 0
    assert contents(there) == contents(source)


@pytest.mark.parametrize("arguments", [1, 2])
def test_an_interrupted_verify_says_neither_yes_nor_no(arguments, source):
    child = start("verify", *[str(source)] * arguments)

    def reads() -> bool:
        """Whether it is at the weights: it has read more than its own code."""
        found = dict(line.split(": ") for line in Path(f"/proc/{child.pid}/io").read_text().splitlines())
        return int(found["rchar"]) > 80_000_000

    when(child, reads)
    code, out, err = stopped(child, signal.SIGINT)
    assert (code, out) == (130, "")
    assert err.startswith("error: interrupted")


@pytest.mark.parametrize("command", [("convert", "zai-org/GLM-4.5", "there", "--to", "hf"), ("verify", "zai-org/GLM-4.5", "zai-org/GLM-4.6")])
def test_a_download_ends_at_the_first_ctrl_c(command, glmconv, monkeypatch, tmp_path):
    def download(*_: object, **__: object) -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        raise AssertionError("the download went on")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        answer = glmconv(*command)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (answer.code, answer.out, len(answer.errors)) == (130, "", 1)
