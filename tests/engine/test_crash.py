"""Power losses and kills at every operation, on a disk that forgets whatever was not synced."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from tests.engine.simulated import SimulatedDisk
from tests.engine.states import SCENES, SEED, SOAK, Scene, Walk, brisk, one_target, say, shortcomings

STATES = 1_000_000 if SOAK else 20_000


@pytest.mark.parametrize("make", SCENES, ids=lambda make: make.__name__)
def test_every_crash_vouches_for_nothing_false_and_resumes(make: Callable[[], Scene], record_property: Callable[[str, object], None]) -> None:
    walk, began = Walk(make(), random.Random(f"{SEED} {make.__name__}")), time.perf_counter()
    with brisk():
        walk.through(STATES // len(SCENES) + 1)
    seconds = time.perf_counter() - began
    for name, value in {"states": walk.states, "reruns": walk.reruns, "states a second": round(walk.states / seconds), "seed": SEED}.items():
        record_property(name, value)
    say(f"{walk.scene.name}: {walk.states:,} states, {walk.reruns:,} reruns, {seconds:.1f} s, GLMCONV_SEED={SEED}, {len(walk.bad)} bad")
    assert not walk.bad, f"GLMCONV_SEED={SEED}\n" + "\n".join(walk.bad)


def test_a_finished_output_is_not_written_again() -> None:
    scene = one_target()
    disk = SimulatedDisk()
    scene.run(disk)
    again = disk.after_kill()
    scene.run(again)
    assert set(again.kinds) <= {"sync_folder"}
    assert not list(shortcomings(scene, again))
