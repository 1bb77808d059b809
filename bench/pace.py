"""How fast a function goes through bytes on one core: the fastest of a few turns, beside others in the same run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

TURNS = 5


def paces(functions: Mapping[str, Callable[[], object]], size: int) -> dict[str, float]:
    """GB/s of each function for `size` bytes; they take turns, each once unmeasured before."""
    best = dict.fromkeys(functions, float("inf"))
    for function in functions.values():
        function()
    for _ in range(TURNS):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            best[name] = min(best[name], time.perf_counter() - began)
    return {name: size / seconds / 1e9 for name, seconds in best.items()}


def show(title: str, found: Mapping[str, float], against: str) -> None:
    """One line each: GB/s of bfloat16, and how many times the named one."""
    print(f"{title:34}{'GB/s':>8}{'x ' + against:>16}")
    for name, pace in found.items():
        print(f"  {name:32}{pace:8.2f}{pace / found[against]:16.1f}")
