"""What the benches of kernels share: a kernel's rate beside plain torch's and a copy's, taken in turns in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from watch import machine


@dataclass(frozen=True)
class Rate:
    """GB/s of bfloat16, the fastest of several runs."""

    what: str
    kernel: float
    torch: float
    copy: float

    @classmethod
    def of(cls, what: str, weight: torch.Tensor, act: Callable[[], object], plain: float, repeat: int) -> Rate:
        """`act` and a copy of the weight by turns; `plain` is torch's rate."""
        source = weight.view(torch.uint16).numpy()
        target = np.empty_like(source)
        turns = [(measured(weight, act, 1), measured(weight, lambda: np.copyto(target, source), 1)) for _ in range(repeat)]
        return cls(what, max(turn[0] for turn in turns), plain, max(turn[1] for turn in turns))


def weights(rows: int, columns: int) -> torch.Tensor:
    """bfloat16 as a trained layer has them: normal, std 0.02."""
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)


def fastest(act: Callable[[], object], repeat: int, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of the fastest of `repeat` runs after one that warms up (and compiles)."""
    act()
    found = float("inf")
    for _ in range(repeat):
        began = clock()
        act()
        found = min(found, clock() - began)
    return found


def measured(weight: torch.Tensor, act: Callable[[], object], repeat: int) -> float:
    """GB/s."""
    return weight.numel() * 2 / 1e9 / fastest(act, repeat)


def report(weight: torch.Tensor, rates: list[Rate], *, kept: bool) -> int:
    """Print the table; the exit code."""
    rows, columns = weight.shape
    print(f"{machine()}; {rows} x {columns} weights, one core, GB/s of bfloat16")
    print(f"{'':32}{'kernel':>8}{'torch':>8}{'times':>8}{'copy':>8}{'of it':>8}")
    for rate in rates:
        print(f"{rate.what:32}{rate.kernel:8.2f}{rate.torch:8.3f}{rate.kernel / rate.torch:8.1f}{rate.copy:8.2f}{rate.kernel / rate.copy:8.0%}")
    print("as wanted" if kept else "slower than wanted")
    return 0 if kept else 1
