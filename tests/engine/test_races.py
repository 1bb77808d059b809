"""Runs that meet in one folder: on a simulated disk an operation at a time in any order, on a real one as threads fall."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from glmconv.engine.journal import MANIFEST, STATE, claim_of, claimed_by
from glmconv.engine.plan import Plan
from glmconv.engine.run import Target, run
from glmconv.errors import DestinationError, GlmconvError, OutputError
from tests.engine.made import CHUNK, MadeSource, made_plan
from tests.engine.simulated import SimulatedDisk
from tests.engine.states import SEED, SIM, SOAK, Scene, damaged, one_target, say, sections, shortcomings, truth_of
from tests.engine.turns import Choose, Ended, race

OUT = SIM / "out"
SOURCE = MadeSource()
ROUNDS = 5_000 if SOAK else 100
FIRST, SECOND = made_plan("first"), made_plan("second", files=4)


def job(plan: Plan, root: Path = OUT, *, overwrite: bool = False) -> Callable[[SimulatedDisk], object]:
    return lambda disk: run([Target(plan, root)], SOURCE, workers=1, chunk_size=CHUNK, disk=disk, overwrite=overwrite)


def in_any_order(seed: object) -> Choose:
    """Long and short stretches of each participant."""
    say(f"GLMCONV_SEED={SEED}")  # shown if the test fails
    rng = random.Random(f"{SEED} {seed}")
    patience = rng.choice((0.0, 0.5, 0.9))
    return lambda at_work, last: last if last in at_work and rng.random() < patience else rng.choice(at_work)


def paused(at: int) -> Choose:
    """The first participant stops before its operation number `at`, all kinds counted, until the others have finished."""
    turns = iter(range(at))
    return lambda at_work, last: 0 if at_work == [0] or (0 in at_work and next(turns, None) is not None) else at_work[-1]


def finished_of(plan: Plan, disk: SimulatedDisk, root: Path = OUT) -> bool:
    return not list(shortcomings(Scene("", (Target(plan, root),), SOURCE, disk), disk))


def fine(ended: Ended) -> bool:
    return ended.error is None


@pytest.mark.parametrize("number", range(ROUNDS))
def test_of_two_different_jobs_in_one_folder_exactly_one_goes_on(number: int) -> None:
    disk = SimulatedDisk()
    ended = race(disk, [job(FIRST), job(SECOND)], in_any_order(number))
    assert sorted(map(fine, ended)) == [False, True], ended
    winner, loser = (FIRST, ended[1]) if fine(ended[0]) else (SECOND, ended[0])
    assert isinstance(loser.error, DestinationError), loser
    assert finished_of(winner, disk)
    assert finished_of(winner, disk.after_power_loss(random.Random(0), "everything lost"))


@pytest.mark.parametrize("number", range(ROUNDS))
def test_four_equal_jobs_in_one_folder_all_succeed(number: int) -> None:
    disk = SimulatedDisk()
    ended = race(disk, [job(FIRST)] * 4, in_any_order(number))
    assert all(map(fine, ended)), ended
    assert finished_of(FIRST, disk.after_power_loss(random.Random(0), "everything lost"))


@pytest.mark.parametrize("number", range(ROUNDS // 2))
def test_equal_jobs_write_the_sections_of_one_file_together(number: int) -> None:
    scene = sections()
    disk = scene.before.after_kill()
    ended = race(disk, [scene.run] * 3, in_any_order(number))
    assert all(map(fine, ended)), ended
    assert not list(shortcomings(scene, disk.after_power_loss(random.Random(0), "everything lost")))


def test_a_job_that_wakes_after_its_equal_has_finished_the_sections_finishes_too() -> None:
    scene = sections()
    for at in pauses(scene.run):
        disk = SimulatedDisk()
        ended = race(disk, [scene.run, scene.run], paused(at))
        assert all(map(fine, ended)), (at, ended)
        assert not list(shortcomings(scene, disk.after_power_loss(random.Random(0), "everything lost"))), at


@pytest.mark.parametrize("number", range(ROUNDS // 4))
def test_equal_jobs_mend_a_damaged_output_together(number: int) -> None:
    scene = damaged()
    disk = scene.before.after_kill()
    ended = race(disk, [scene.run] * 2, in_any_order(number))
    assert all(map(fine, ended)), ended
    assert not list(shortcomings(scene, disk.after_power_loss(random.Random(0), "everything lost")))


def pauses(operations: Callable[[SimulatedDisk], object]) -> Sequence[int]:
    """Every moment at which a run can be stopped, its looks at the disk included."""
    steps = 0

    def count(at_work: Sequence[int], last: int) -> int:
        nonlocal steps
        steps += 1
        return 0

    race(SimulatedDisk(), [operations], count)
    return range(steps)


def test_a_job_that_wakes_after_its_equal_has_finished_finishes_too() -> None:
    for at in pauses(job(FIRST)):
        disk = SimulatedDisk()
        ended = race(disk, [job(FIRST), job(FIRST)], paused(at))
        assert all(map(fine, ended)), (at, ended)
        assert finished_of(FIRST, disk.after_power_loss(random.Random(0), "everything lost")), at


def test_a_job_that_wakes_after_another_took_its_folder_changes_nothing_there() -> None:
    for at in pauses(job(FIRST)):
        disk = SimulatedDisk()
        ended = race(disk, [job(FIRST), job(SECOND, overwrite=True)], paused(at))
        owner = claimed_by(disk, OUT)
        assert owner in (FIRST.id, SECOND.id), at
        if owner == SECOND.id:
            assert fine(ended[1]), (at, ended)
            assert finished_of(SECOND, disk), (at, ended)
        if not (fine(ended[0]) and finished_of(FIRST, disk, SIM / "out.bak-1")):
            error = ended[0 if owner == SECOND.id else 1].error
            assert isinstance(error, (DestinationError, OutputError)), (at, ended)


def planted(path: Path, content: bytes) -> Callable[[SimulatedDisk], object]:
    """Someone who makes a file there, if the name is free."""

    def plant(disk: SimulatedDisk) -> None:
        fd = disk.create(path)
        disk.write(fd, content, 0)
        disk.close(fd)

    return plant


@pytest.mark.parametrize("name", sorted(truth_of(FIRST, SOURCE)))
def test_a_file_that_someone_puts_in_the_way_stays_as_it_is(name: str) -> None:
    met = 0
    for at in pauses(job(FIRST))[::3]:
        disk = SimulatedDisk()
        ended = race(disk, [job(FIRST), planted(OUT / name, b"theirs")], paused(at))
        if fine(ended[1]):
            met += 1
            assert disk.content(OUT / name) == b"theirs", at
            assert isinstance(ended[0].error, DestinationError), (at, ended)
    assert met > 5


def taken_over(disk: SimulatedDisk) -> None:
    """Someone replaces the claim by another plan's and leaves everything else in its place."""
    planted(OUT / "theirs", claim_of(SECOND))(disk)
    disk.rename(OUT / "theirs", OUT / STATE / "plan.json")


def test_a_job_that_lost_its_claim_makes_no_more_names() -> None:
    for at in pauses(job(FIRST)):
        disk, seen = SimulatedDisk(), list[set[str]]()

        def take(door: SimulatedDisk, disk: SimulatedDisk = disk, seen: list[set[str]] = seen) -> None:
            taken_over(door)
            seen.append(final_names(disk))

        ended = race(disk, [job(FIRST), take], paused(at))
        if fine(ended[1]):
            assert len(final_names(disk) - seen[0]) <= 1, (at, ended)  # one may have been past its fence
            assert isinstance(ended[0].error, DestinationError) or MANIFEST in final_names(disk), (at, ended)


def final_names(disk: SimulatedDisk) -> set[str]:
    return {name for name in truth_of(FIRST, SOURCE) if disk.content(OUT / name) is not None}


def on_a_real_disk(plans: Sequence[Plan], root: Path) -> list[GlmconvError | None]:
    """Each plan in a thread of its own, all at once; how each ended."""
    start, ended = threading.Barrier(len(plans)), dict[int, GlmconvError | None]()

    def work(number: int) -> None:
        start.wait()
        try:
            run([Target(plans[number], root)], SOURCE, workers=1, chunk_size=CHUNK)
            ended[number] = None
        except GlmconvError as error:
            ended[number] = error

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(plans))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [ended[number] for number in range(len(plans))]


@pytest.fixture
def _hasty_threads() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(usual)


def content_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file() and STATE not in path.parts}


@pytest.mark.usefixtures("_hasty_threads")
def test_on_a_real_disk_one_of_two_different_jobs_goes_on(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        root = tmp_path / str(number)
        ended = on_a_real_disk([FIRST, SECOND], root)
        assert ended.count(None) == 1, (number, ended)
        assert isinstance(ended[1 - ended.index(None)], DestinationError)
        assert content_of(root) == truth_of((FIRST, SECOND)[ended.index(None)], SOURCE)


@pytest.mark.usefixtures("_hasty_threads")
def test_on_a_real_disk_four_equal_jobs_all_succeed(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        root = tmp_path / str(number)
        assert on_a_real_disk([FIRST] * 4, root) == [None] * 4, number
        assert content_of(root) == truth_of(FIRST, SOURCE)
        assert (root / MANIFEST).is_file()


def test_a_simulated_race_can_be_replayed() -> None:
    def sizes(seed: int) -> list[int]:
        return [ended.changes for ended in race(SimulatedDisk(), [one_target().run, one_target().run], in_any_order(seed))]

    for seed in range(20):
        assert sizes(seed) == sizes(seed)
