"""A batch script for SLURM that runs a pipeline on many nodes: one task a rank, met at the first node."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.engine.ranks import PORTS_OF_JOBS

TEMPLATE = """\
#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={ranks}
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
# Your cluster's own: --account, --partition, --time, --mem, --cpus-per-task. No GPU is needed.
set -euo pipefail

# Rank 0 runs on the first node and keeps the store that shares the work out.
MASTER_ADDR=${{MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}}
MASTER_PORT=${{MASTER_PORT:-$(({begin} + SLURM_JOB_ID % {count}))}}
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
unset http_proxy https_proxy all_proxy HTTP_PROXY HTTPS_PROXY ALL_PROXY
{variables}
# A job that was stopped goes on where it was: submit the same script again.
srun --kill-on-bad-exit=1 {command}
"""


@dataclass(frozen=True)
class Batch:
    """How many nodes and ranks on each; `command` is how glmconv is called there, `settings` what `--set` gave."""

    nodes: int
    ranks: int
    command: Sequence[str]
    settings: Sequence[tuple[str, str]] = ()


def sbatch(pipeline: Path, batch: Batch) -> str:
    """The script's text; settings travel as environment variables, quoted for the shell."""
    name = re.sub(r"[^\w.-]+", "-", f"glmconv-{pipeline.stem}")[:60]
    variables = "".join(f"export {key}={shlex.quote(value)}\n" for key, value in batch.settings)
    begin, count = PORTS_OF_JOBS
    return TEMPLATE.format(
        name=name, nodes=batch.nodes, ranks=batch.ranks, variables=variables, command=shlex.join(batch.command), begin=begin, count=count
    )
