"""Which of how many processes this one is, and where they meet: as torchrun or SLURM's srun say it in the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from glmconv.errors import OutputError, UsageError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

PORT = 29511
PORTS_OF_JOBS = (20_000, 10_000)  # from which on, and how many: two SLURM jobs on one node must not meet at one port


@dataclass(frozen=True)
class Meeting:
    """This process among the others of its job. `agent`: torchrun's own process holds the store, not rank 0."""

    host: str
    port: int
    rank: int
    ranks: int
    agent: bool

    @property
    def hosted(self) -> bool:
        """Whether the store lives in this process."""
        return self.rank == 0 and not self.agent


def meeting(environment: Mapping[str, str] | None = None) -> Meeting | None:
    """Where this process meets the others; None if it works alone. UsageError if the environment names no number where one belongs.

    torchrun sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT. srun sets SLURM_PROCID and SLURM_STEP_NUM_TASKS; there MASTER_ADDR may be
    left out: it is then the first node of the step, where srun puts rank 0, and MASTER_PORT follows from the job's number.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env:
        ranks, rank, host = number(env, "WORLD_SIZE", 1), number(env, "RANK", 0), env.get("MASTER_ADDR", "")
    else:
        of_step = number(env, "SLURM_STEP_NUM_TASKS", 0)  # set by srun alone: a batch script by itself is no rank
        ranks, rank = of_step or number(env, "SLURM_NTASKS", 1), number(env, "SLURM_PROCID", 0)
        host = env.get("MASTER_ADDR", "") or (first_node(env) if of_step else "")
    if ranks <= 1 or not host:
        return None
    begin, count = PORTS_OF_JOBS
    port = begin + number(env, "SLURM_JOB_ID", 0) % count if "RANK" not in env and "SLURM_JOB_ID" in env else PORT
    agent = env.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() in ("1", "true")
    return Meeting(host, number(env, "MASTER_PORT", port), rank, ranks, agent)


def first_node(env: Mapping[str, str]) -> str:
    """The first host of SLURM's list (`gpu[03-06,9],cpu1` is gpu03 ...), else the address that srun was started at; empty if neither is set."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    found = re.match(r"([A-Za-z0-9._-]+)(?:\[(\d+)[^\]]*\]([A-Za-z0-9._-]*))?(?:,|$)", nodes)
    if nodes and found is None:
        raise UsageError(f"the first of SLURM's nodes cannot be told from {nodes[:100]!r}.", hint="Set MASTER_ADDR to the node of rank 0.")
    return "".join(part or "" for part in found.groups()) if found else env.get("SLURM_LAUNCH_NODE_IPADDR", "")


_stores: dict[tuple[str, int, int], TCPStore] = {}


def store_of(place: Meeting, timeout: float = 300) -> TCPStore:
    """The job's store; the same one whenever this process asks again, for a rank that hosts it must not close it between two pieces of work.

    OutputError if it cannot be reached within `timeout` seconds.
    """
    key = (place.host, place.port, place.rank)
    if key not in _stores:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:
            wait = timedelta(seconds=timeout)
            _stores[key] = TCPStore(place.host, place.port, is_master=place.hosted, wait_for_workers=False, timeout=wait)
        except (RuntimeError, OSError) as error:
            raise OutputError(
                f"rank {place.rank} cannot reach the job's store at {place.host}:{place.port}.",
                hint="Check MASTER_ADDR and MASTER_PORT on every node.",
            ) from error
    return _stores[key]


def this_rank() -> int:
    """This process's number among torchrun's or SLURM's ranks; 0 when it works alone. UsageError if the environment names no number."""
    return number(os.environ, "RANK" if "RANK" in os.environ else "SLURM_PROCID", 0)


def ranks_here(environment: Mapping[str, str] | None = None) -> int:
    """How many ranks share this machine: torchrun's LOCAL_WORLD_SIZE, or the first of srun's `8(x2),4`."""
    env = os.environ if environment is None else environment
    if "LOCAL_WORLD_SIZE" in env:
        return max(1, number(env, "LOCAL_WORLD_SIZE", 1))
    first = re.match(r"\d{1,6}", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return max(1, int(first[0])) if first else 1


def number(env: Mapping[str, str], key: str, default: int) -> int:
    text = env.get(key, str(default))
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise UsageError(f"{key}={text} in the environment is not a number.")
    return int(text)
