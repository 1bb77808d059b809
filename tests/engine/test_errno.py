"""Every operation fails in every way that a disk knows, once and for good: no success without its bytes, and a rerun makes up for it."""

from __future__ import annotations

import errno
import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from glmconv.errors import ExitCode, GlmconvError, SourceError
from tests.engine.made import MadeSource
from tests.engine.simulated import Fault, SimulatedDisk
from tests.engine.states import SEED, SOAK, Scene, brisk, damaged, flaws, one_target, overwrite, say, sections, shortcomings, two_targets

FULL = (errno.ENOSPC, errno.EDQUOT)
ANY = (errno.EIO, errno.ESTALE)
CODES = {
    "mkdir": (*FULL, *ANY, errno.EROFS),
    "create": (*FULL, *ANY, errno.EROFS),
    "share": (*FULL, *ANY, errno.EROFS),
    "allocate": (*FULL, *ANY, errno.EOPNOTSUPP),
    "write": (*FULL, *ANY, errno.EROFS),
    "sync": (*FULL, *ANY),
    "close": (*FULL, *ANY),
    "sync_folder": ANY,
    "link": (*FULL, *ANY, errno.EROFS),
    "rename": (*FULL, *ANY, errno.EROFS),
    "unlink": (*ANY, errno.EROFS),
    "open": ANY,
    "read": ANY,
    "close read": ANY,
    "status": ANY,
    "names": ANY,
}
LATE = ("mkdir", "create", "share", "link", "rename", "unlink")  # what a server may have done although its answer was lost
ALLOWED = {ExitCode.OUTPUT, ExitCode.DESTINATION}


def one_kind(kind: str) -> Iterator[tuple[Fault, bool]]:
    """Each fault of one kind of operation, to be moved along the run; and whether the run must succeed all the same."""
    kinds = frozenset({kind})
    for code, for_good in itertools.product(CODES[kind], (False, True)):
        yield Fault(kinds, code, for_good=for_good), False
    if kind in LATE:
        yield Fault(kinds, errno.EIO, late=True), False
    if kind in ("write", "read"):
        yield Fault(kinds, short=True), True
        yield Fault(kinds, short=True, for_good=True), True


def misbehaviour(scene: Scene, faults: tuple[Fault, ...], *, must_succeed: bool) -> tuple[int, list[str]]:
    """Run with these faults, then without. How many faults struck, and what was wrong."""
    disk = scene.before.after_kill()
    disk.faults = faults
    bad = []
    try:
        scene.run(disk)
    except GlmconvError as error:
        if error.code not in ALLOWED or must_succeed:
            bad.append(f"exit {int(error.code)}: {error}")
        if error.code == ExitCode.DESTINATION and set(names_in(scene, disk)) != set(names_in(scene, scene.before)):
            bad.append(f"exit 4, but names were made: {error}")
    except Exception as error:
        bad.append(f"not one of our errors: {type(error).__name__}: {error}")
    else:
        bad += [f"success, but {flaw}" for flaw in shortcomings(scene, disk)]
        bad += [f"success, power lost, and {flaw}" for flaw in shortcomings(scene, disk.after_power_loss(random.Random(0), "everything lost"))]
    for next_boot in (disk.after_kill(), disk.after_power_loss(random.Random(0), "names kept, data lost")):
        bad += [f"afterwards {flaw}" for flaw in flaws(scene, next_boot)]
        try:
            scene.run(next_boot)
        except Exception as error:
            bad.append(f"the rerun failed, {type(error).__name__}: {error}")
        else:
            bad += [f"after the rerun {flaw}" for flaw in shortcomings(scene, next_boot)]
    return disk.struck, bad


def names_in(scene: Scene, disk: SimulatedDisk) -> Iterator[str]:
    for target in scene.targets:
        yield from (name for name in disk.listing(target.root) if name != ".glmconv" and name != "folder")
        yield from disk.listing(target.root / "folder")


def moved(fault: Fault, at: int) -> Fault:
    return Fault(fault.kinds, fault.code, at, fault.for_good, fault.late, fault.short)


@pytest.mark.parametrize("make", [one_target, damaged, overwrite, sections], ids=lambda scene: scene.__name__)
@pytest.mark.parametrize("kind", CODES)
def test_every_operation_may_fail_and_nothing_is_lost(make: Callable[[], Scene], kind: str, record_property: Callable[[str, object], None]) -> None:
    with brisk():
        cases, wrong = each_operation_fails(make(), kind)
    record_property("cases", cases)
    say(f"{make.__name__}, {kind}: {cases} cases, {len(wrong)} wrong")
    assert cases > 0 or kind not in ("write", "sync", "link") + (("share", "allocate") if make is sections else ())
    assert not wrong, "\n".join(wrong[:20])


def each_operation_fails(scene: Scene, kind: str, enough: int = 20) -> tuple[int, list[str]]:
    """Every fault of one kind at every operation of a run, until `enough` went wrong: how many there were, and what went wrong."""
    cases, wrong = 0, list[str]()
    for fault, must_succeed in one_kind(kind):
        for at in itertools.count():
            placed = moved(fault, at)
            struck, bad = misbehaviour(scene, (placed,), must_succeed=must_succeed)
            if not struck:
                break
            cases += 1
            wrong += [f"{placed}: {flaw}" for flaw in bad]
            if len(wrong) >= enough:
                return cases, wrong
    return cases, wrong


@pytest.mark.parametrize("workers", [1, 2])
def test_a_source_that_cannot_be_read_ends_with_its_own_error(workers: int) -> None:
    source = MadeSource()
    source.flaw = "b"
    whole = two_targets()
    scene = Scene("flaw", whole.targets, source, SimulatedDisk(), workers=workers)
    disk = scene.before.after_kill()
    with pytest.raises(SourceError, match="b: cannot be read"):
        scene.run(disk)
    source.flaw = ""
    scene.run(disk)
    assert not list(shortcomings(scene, disk))


def test_two_faults_in_one_run_lose_nothing() -> None:
    rng = random.Random(f"{SEED} pairs")
    scenes, wrong = [one_target(), damaged(), overwrite(), sections()], []
    choices = [pair for kind in CODES for pair in one_kind(kind)]
    with brisk():
        for _ in range(50_000 if SOAK else 300):
            pair = tuple(moved(fault, rng.randrange(30)) for fault, _ in rng.sample(choices, 2))
            scene = rng.choice(scenes)
            wrong += [f"{scene.name}, {pair}: {flaw}" for flaw in misbehaviour(scene, pair, must_succeed=False)[1]]
    assert not wrong, f"GLMCONV_SEED={SEED}\n" + "\n".join(wrong[:20])
