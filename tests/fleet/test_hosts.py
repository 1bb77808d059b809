"""Two hosts with a network between them and a folder that both see: `torchrun` as the documents write it, one host lost, one paused."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from glmconv import Options, convert, plan
from tests.cli.processes import ENVIRONMENT, ROOT, records, when
from tests.fleet.hosts import Host, may_have_hosts, two_hosts
from tests.roundtrip.shards import MANIFEST, contents

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
SHARD = 20_000
SECONDS = 180

pytestmark = pytest.mark.skipif(not may_have_hosts(), reason="needs root, iproute2 and network namespaces")


@pytest.fixture
def hosts():
    with two_hosts() as pair:
        yield pair


def torchrun(host: Host, number: int, master: Host, source: Path, there: Path) -> subprocess.Popen[str]:
    """One host's command line, as slime's and miles' documents have it."""
    rendezvous = ["--nnodes=2", f"--node-rank={number}", "--nproc-per-node", "1", "--master-addr", master.address, "--master-port", "12345"]
    task = ["-m", "glmconv", "convert", str(source), str(there), "--to", "torch_dist", "--shard-size", str(SHARD), "--workers", "1"]
    return host.start([TORCHRUN, *rendezvous, "--max-restarts", "1", *task], {**ENVIRONMENT, "OMP_NUM_THREADS": "1"}, str(ROOT))


def ended(jobs: list[subprocess.Popen[str]]) -> list[int]:
    return [job.wait(SECONDS) for job in jobs]


def test_a_host_is_lost_and_another_paused_and_the_bytes_are_those_of_one_process(tiny, hosts, tmp_path):
    first, second = hosts
    there = tmp_path / "there"
    convert(tiny, {"torch_dist": tmp_path / "alone"}, options=Options(file_size=SHARD))
    total = plan(tiny, ["torch_dist"], options=Options(file_size=SHARD)).jobs

    jobs = [torchrun(host, number, first, tiny, there) for number, host in enumerate(hosts)]
    when(jobs[0], lambda: len(records(there)) >= 2)
    second.signal(signal.SIGKILL)  # the whole host, agent and ranks
    done = len(records(there))
    assert 2 <= done < total
    jobs[0].send_signal(signal.SIGTERM)  # what a person would do then
    assert 0 not in ended(jobs)
    assert not (there / MANIFEST).exists()

    done = len(records(there))
    jobs = [torchrun(host, number, first, tiny, there) for number, host in enumerate(hosts)]
    when(jobs[0], lambda: len(records(there)) > done)
    second.signal(signal.SIGSTOP)
    when(jobs[0], lambda: len(records(there)) >= total - 1)  # all but what the paused one has in hand
    assert {psutil.Process(job.pid).status() for job in jobs[1:]} == {psutil.STATUS_STOPPED}
    second.signal(signal.SIGCONT)
    assert ended(jobs) == [0, 0]
    assert contents(there) == contents(tmp_path / "alone")
