"""What starts pipelines: SLURM's batch script, the Makefile, and the download that comes first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glmconv import Options, convert, verify_same
from tests.cli.processes import ENVIRONMENT, ROOT
from tests.fleet.hub import COMMIT, Hub, hub
from tests.roundtrip.shards import contents, copied

BIN = Path(sys.executable).parent
HUB_ID = "zai-org/GLM-4.5"
SRUN = """#!/bin/bash
shift  # --kill-on-bad-exit
for ((rank = 0; rank < 3; rank++)); do
    env -u MASTER_ADDR SLURM_PROCID=$rank SLURM_STEP_NUM_TASKS=3 SLURM_STEP_TASKS_PER_NODE='3' SLURM_STEP_NODELIST=localhost "$@" & pids+=($!)
done
for pid in "${pids[@]}"; do wait "$pid" || exit $?; done
"""


TWO_READINGS = """\
source: ${BASE_DIR}/GLM-4.5
targets:
  hf: {source: '${BASE_DIR}/out', path: '${BASE_DIR}/back'}
  torch_dist: '${BASE_DIR}/out'
options: {shard-size: 50kB}
"""


@pytest.fixture
def base(tiny, tmp_path):
    copied(tiny, tmp_path / "GLM-4.5")
    return tmp_path


def test_the_batch_script_runs_the_pipeline_under_srun(base, glmconv):
    """With stand-ins for SLURM's two commands, which set what SLURM's set; MASTER_ADDR is then taken from the list of nodes."""
    (base / "p.yaml").write_text(TWO_READINGS)
    answer = glmconv("run", base / "p.yaml", "--emit-sbatch", "--nodes", 2, "--ranks-per-node", 8, "--set", f"BASE_DIR={base}")
    assert answer.code == 0
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=8\n" in answer.out
    (base / "job.sh").write_text(answer.out)
    fake = base / "bin"
    fake.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", "#!/bin/sh\necho 127.0.0.1\n")):
        (fake / name).write_text(text)
        (fake / name).chmod(0o755)
    inside = {"PATH": f"{fake}:{BIN}:{os.environ['PATH']}", "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "localhost", "SLURM_NTASKS": "16"}
    job = subprocess.run(["bash", base / "job.sh"], env={**ENVIRONMENT, **inside}, cwd=base, capture_output=True, text=True, timeout=120)
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("torch_dist  convert to torch_dist") == 1  # rank 0 speaks for all
    convert(base / "GLM-4.5", {"torch_dist": base / "alone"}, options=Options(file_size=50_000))
    assert contents(base / "out") == contents(base / "alone")
    assert verify_same(base / "GLM-4.5", base / "back").same


def test_a_setting_is_quoted_in_the_batch_script(base, glmconv):
    (base / "p.yaml").write_text("source: ${X}\ntargets: {hf: /b}\n")
    script = glmconv("run", base / "p.yaml", "--emit-sbatch", "--set", "X='; touch pwned; '").out
    lines = [line for line in script.splitlines() if line.startswith("export X=")]
    said = subprocess.run(["bash", "-c", f'{lines[0]}; printf %s "$X"'], capture_output=True, text=True, check=True, cwd=base)
    assert said.stdout == "'; touch pwned; '"
    assert not (base / "pwned").exists()


def make(*words: object, dry: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["make", "-s", *(["-n"] if dry else []), "-o", ".venv/.installed", f"BIN={BIN}", *map(str, words)]
    clean = {name: value for name, value in ENVIRONMENT.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_makefile_converts_and_verifies(base):
    named = ("MODEL=zai-org/GLM-4.5", f"BASE_DIR={base}")
    assert make("fp8", "verify", *named, dry=True).stdout.count("glmconv run pipelines/release.yaml") == 2
    assert not (base / "GLM-4.5-FP8").exists()
    made = make("fp8", "verify", *named)
    assert made.returncode == 0, made.stderr
    convert(base / "GLM-4.5", {"fp8": base / "alone"})
    assert contents(base / "GLM-4.5-FP8") == contents(base / "alone")
    missing = make("fp8")
    assert (missing.returncode, "MODEL=" in missing.stderr) == (2, True)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_makefile_starts_many_nodes_without_proxies(tmp_path):
    named = ("MODEL=GLM-4.5-355B-A32B", "BASE_DIR=/data", "NODE_RANK=1", "NPROC_PER_NODE=8")
    said = make("torch_dist", *named, "NNODES=2", "MASTER_ADDR=10.0.0.1", "MASTER_PORT=12345", dry=True).stdout
    assert said.startswith("env -u http_proxy -u https_proxy")
    assert "torchrun --nnodes 2 --nproc-per-node 8 --node-rank 1 --master-addr 10.0.0.1 --master-port 12345" in " ".join(said.split())
    (tmp_path / "hostfile").write_text("# our nodes\n10.0.0.7 slots=8\n\n10.0.0.8\n10.0.0.9 slots=8\n")
    said = make("all", *named, f"HOSTFILE={tmp_path / 'hostfile'}", dry=True).stdout
    assert "--nnodes 3 --nproc-per-node 8 --node-rank 1 --master-addr 10.0.0.7 --master-port 12345" in " ".join(said.split())
    assert "torchrun" not in make("download", *named, "NNODES=2", dry=True).stdout


def online(there: Hub, *words: object) -> subprocess.CompletedProcess[str]:
    """glmconv with this Hub for the Hub."""
    settings = {"HF_ENDPOINT": there.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(there.folder.parent / "home"), "no_proxy": "127.0.0.1"}
    command = [sys.executable, "-m", "glmconv", *map(str, words)]
    return subprocess.run(command, env={**ENVIRONMENT, **settings}, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_a_download_is_done_when_its_mark_says_so(base, glmconv):
    target = base / "got"
    (base / "p.yaml").write_text(f"source: {target}\ndownload: {HUB_ID}\ntargets: {{torch_dist: {base}/out}}\n")
    target.mkdir()  # a folder that exists is no download
    with hub(HUB_ID, base / "GLM-4.5") as there:
        got = online(there, "run", base / "p.yaml")
        assert got.returncode == 0, got.stderr
        assert sorted(there.fetched) == sorted(path.name for path in (base / "GLM-4.5").iterdir())
        assert COMMIT in (target / ".glmconv" / "download.json").read_text()
    for name, data in contents(base / "GLM-4.5").items():
        assert (target / name).read_bytes() == data
    assert '"state": "done"' in glmconv("run", base / "p.yaml", "--only", "download", "--json").out  # nobody is asked again
    shard = next(target.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert '"state": "to do"' in glmconv("run", base / "p.yaml", "--only", "download", "--dry-run", "--json").out


def test_ranks_do_not_download_all_at_once(base, glmconv, monkeypatch):
    (base / "p.yaml").write_text(f"source: {base}/none\ndownload: {HUB_ID}\ntargets: {{torch_dist: {base}/out}}\n")
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        monkeypatch.setenv(name, value)
    answer = glmconv("run", base / "p.yaml")
    assert (answer.code, "--only download on one node" in answer.err) == (2, True)


def test_what_the_hub_does_not_have_is_exit_5(base):
    (base / "p.yaml").write_text(f"source: {base}/none\ndownload: zai-org/GLM-4.6\ntargets: {{torch_dist: {base}/out}}\n")
    with hub(HUB_ID, base / "GLM-4.5") as there:
        got = online(there, "run", base / "p.yaml")
    assert (got.returncode, got.stderr.count("error: ")) == (5, 1), got.stderr
