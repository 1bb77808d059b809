"""Ranks of torchrun share one conversion: the bytes of one process, whatever their number, and though one of them dies."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from glmconv import Options, convert
from glmconv.toy.build import ToyOptions
from tests.cli.processes import ENVIRONMENT, ROOT, records, when
from tests.roundtrip.shards import MANIFEST, contents

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
BIG = ToyOptions(layers=4, experts=16, scale=Fraction(1, 5), file_size=5_000_000)
SHARD = 5_000_000
SECONDS = 150


@pytest.fixture(scope="module")
def source(toy):
    return toy("glm4.6-355B-A32B", BIG)


@pytest.fixture(scope="module")
def alone(source, tmp_path_factory):
    """The bytes that one process writes."""
    there = tmp_path_factory.mktemp("alone") / "there"
    convert(source, {"torch_dist": there}, options=Options(file_size=SHARD))
    return contents(there)


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def ranks(number: int, source: Path, there: Path, *options: str) -> subprocess.Popen[str]:
    """torchrun with so many ranks on this machine, on a port that no other test has."""
    here = ["--nnodes", "1", "--nproc-per-node", str(number), "--master-port", str(free_port()), *options]
    task = ["-m", "glmconv", "convert", str(source), str(there), "--to", "torch_dist", "--shard-size", "5MB", "--workers", "1", "--json"]
    environment = {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([TORCHRUN, *here, *task], env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_rank(number: int, torchrun: subprocess.Popen[str]) -> None:
    """SIGKILL to one rank."""
    (rank,) = [child for child in psutil.Process(torchrun.pid).children() if child.environ().get("RANK") == str(number)]
    rank.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("number", [2, 4])
def test_ranks_write_the_bytes_of_one_process(number, source, alone, tmp_path):
    job = ranks(number, source, tmp_path / "there")
    out, err = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, err
    assert contents(tmp_path / "there") == alone
    assert json.loads(out)["targets"][0]["path"] == str(tmp_path / "there")
    assert "Traceback" not in err


def test_a_rank_that_is_killed_is_restarted_and_the_bytes_are_the_same(source, alone, tmp_path):
    there = tmp_path / "there"
    job = ranks(2, source, there, "--max-restarts", "1")
    when(job, lambda: len(records(there)) >= 2)
    kill_rank(1, job)
    assert not (there / MANIFEST).exists()
    _, err = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, err
    assert "SIGKILL" in err or "exitcode: -9" in err
    assert contents(there) == alone


def test_what_a_killed_job_leaves_is_finished_by_one_process(source, alone, tmp_path, glmconv):
    there = tmp_path / "there"
    job = ranks(4, source, there)
    when(job, lambda: len(records(there)) >= 2)
    kill_rank(0, job)
    _, err = job.communicate(timeout=SECONDS)
    assert job.returncode == 1, err
    assert not (there / MANIFEST).exists()
    assert glmconv("convert", source, there, "--to", "torch_dist", "--shard-size", "5MB").code == 0
    assert contents(there) == alone


def test_a_torchrun_job_that_is_stopped_is_finished_by_another(source, alone, tmp_path):
    there = tmp_path / "there"
    job = ranks(2, source, there)
    when(job, lambda: len(records(there)) >= 2)
    job.send_signal(signal.SIGTERM)
    job.communicate(timeout=SECONDS)
    assert job.returncode != 0
    assert not (there / MANIFEST).exists()
    again = ranks(2, source, there)
    _, err = again.communicate(timeout=SECONDS)
    assert again.returncode == 0, err
    assert contents(there) == alone


def test_every_rank_exits_with_the_code_of_what_is_wrong(source, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.tex").write_text("years of work")
    job = ranks(2, source, tmp_path / "there")
    out, err = job.communicate(timeout=SECONDS)
    assert job.returncode == 1  # torchrun's own
    assert out == ""
    assert "exitcode  : 4" in err
    assert err.count("error: ") >= 1
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["thesis.tex"]
