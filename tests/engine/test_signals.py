"""Real processes on a real disk, killed and stopped: the same run again finishes with the same bytes."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from glmconv.engine.journal import STATE
from tests.engine.children import PLAN, Nursery, work
from tests.engine.made import MadeSource
from tests.engine.states import SEED, SOAK, say, truth_of

KILLS = 10_000 if SOAK else 300
STOPS = 10_000 if SOAK else 80
TRUTH = truth_of(PLAN, MadeSource())


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery.open() as opened:
        yield opened


def content_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and STATE not in path.parts}


def operations(nursery: Nursery, root: Path) -> int:
    """Operations of a run, found by doubling and halving: it is killed at the last one, and not behind it."""
    low, high = 0, 1024
    while high - low > 1:
        middle = (low + high) // 2
        killed = nursery.run(root / f"count-{middle}", signum=signal.SIGKILL, at=middle).startswith("killed")
        low, high = (middle, high) if killed else (low, middle)
    return high


def test_a_run_killed_at_any_operation_finishes_when_run_again(nursery: Nursery, tmp_path: Path) -> None:
    rng, total, killed = random.Random(f"{SEED} kills"), operations(nursery, tmp_path), 0
    for number in range(KILLS // 2):
        root = tmp_path / str(number)
        for at in (number % total, *(rng.randrange(total) for _ in range(rng.randrange(3)))):
            killed += nursery.run(root, signum=signal.SIGKILL, at=at) == "killed 9"
        work(root)
        assert content_of(root) == TRUTH, (SEED, number)
    say(f"{killed} kills at {total} operations")
    assert killed >= KILLS // 2


def test_a_run_killed_at_any_moment_finishes_when_run_again(nursery: Nursery, tmp_path: Path) -> None:
    rng = random.Random(f"{SEED} moments")
    assert nursery.run(tmp_path / "first") == "exit 0"
    began = time.perf_counter()
    assert nursery.run(tmp_path / "whole") == "exit 0"
    whole, ends = time.perf_counter() - began, []
    for number in range(KILLS // 2):
        root = tmp_path / str(number)
        ends.append(nursery.run(root, seconds=max(1e-6, rng.random() * whole)))
        work(root)
        assert content_of(root) == TRUTH, (SEED, number)
    say(f"{len(ends) - ends.count('exit 0')} kills within {whole:.3f} s, {ends.count('exit 0')} came too late")
    assert set(ends) <= {"exit 0", f"killed {signal.SIGALRM.value}"}
    assert ends.count("exit 0") < len(ends)


def test_a_stopped_run_wakes_after_another_has_finished_and_changes_nothing(nursery: Nursery, tmp_path: Path) -> None:
    total = operations(nursery, tmp_path)
    for number in range(STOPS):
        root = tmp_path / str(number)
        assert nursery.run(root, signum=signal.SIGSTOP, at=number % total) == "stopped"
        work(root)
        assert content_of(root) == TRUTH, number
        assert nursery.go_on() == "exit 0", number
        assert content_of(root) == TRUTH, number
