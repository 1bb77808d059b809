"""The suite is worth its time because it fails on each of these protocols, one switch away from ours."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from glmconv.engine import commit, stream
from glmconv.engine.commit import Destination
from glmconv.engine.files import Disk
from glmconv.engine.jobs import Job
from glmconv.engine.journal import MANIFEST, Record
from glmconv.engine.plan import OutputFile
from tests.engine import test_errno, test_races
from tests.engine.made import MadeSource
from tests.engine.simulated import SimulatedDisk
from tests.engine.states import SCENES, SEED, Scene, Walk, brisk, one_target, say, truth_of

Break = Callable[[pytest.MonkeyPatch], None]
Sections = OutputFile.__dict__["sections"].func
scene_of = functools.cache(lambda make: make())  # made while nothing is broken


def crashes(make: Callable[[], Scene]) -> None:
    walk = Walk(scene_of(make), random.Random(f"{SEED} broken"), enough=1).through(250)
    assert not walk.bad, walk.bad[0]


def failing(kind: str) -> None:
    """Faults at every operation of a kind."""
    _, wrong = test_errno.each_operation_fails(scene_of(one_target), kind, enough=1)
    assert not wrong, wrong[0]


def races(test: Callable[[int], None]) -> None:
    for number in range(25):
        test(number)


SUITE: Mapping[str, Callable[[], None]] = {
    **{f"crashes, {make.__name__}": functools.partial(crashes, make) for make in SCENES},
    **{f"{kind} fails": functools.partial(failing, kind) for kind in ("write", "sync", "close", "link")},
    "the source fails": functools.partial(test_errno.test_a_source_that_cannot_be_read_ends_with_its_own_error, 1),
    "two different jobs": functools.partial(races, test_races.test_of_two_different_jobs_in_one_folder_exactly_one_goes_on),
    "four equal jobs": functools.partial(races, test_races.test_four_equal_jobs_in_one_folder_all_succeed),
    "someone's file in the way": lambda: test_races.test_a_file_that_someone_puts_in_the_way_stays_as_it_is("shard-00001"),
    "a lost claim": test_races.test_a_job_that_lost_its_claim_makes_no_more_names,
}


def lying(*kinds: str, where: Callable[[Path], bool] = lambda path: True) -> Break:
    def lies(kind: str, path: Path | None) -> bool:
        return kind in kinds and (path is None or where(path))

    return lambda patch: patch.setattr(SimulatedDisk, "lies", staticmethod(lies))


def above_out(path: Path) -> bool:
    return path in {parent for make in SCENES for target in scene_of(make).targets for parent in target.root.parents}


def marks_backwards(patch: pytest.MonkeyPatch) -> None:
    """`put` is called with the first mark, but writes the last one."""
    put = Destination.put

    def turned(self: Destination, name: str, content: bytes, **more: Any) -> None:
        names = [mark.name for mark in self.plan.marks]
        if name in names:
            mark = self.plan.marks[-1 - names.index(name)]
            name, content = mark.name, mark.content
        put(self, name, content, **more)

    patch.setattr(Destination, "put", turned)


def manifest_before_last_file(patch: pytest.MonkeyPatch) -> None:
    """The manifest, right in every byte, is durable before the plan's last file has its name; the rest is as it should be."""
    real_commit = Destination.commit

    def commit_after(self: Destination, staged: Path, name: str, digest: str, **more: Any) -> None:
        if name == self.plan.files[-1].name:
            self.put(MANIFEST, truth_of(self.plan, MadeSource())[MANIFEST], ours=lambda: True)
        real_commit(self, staged, name, digest, **more)

    patch.setattr(Destination, "commit", commit_after)


def last_file_first(patch: pytest.MonkeyPatch) -> None:
    """A file that is to be named last is named as soon as it is written."""
    patch.setattr(OutputFile, "sections", property(lambda self: Sections(self) if self.cuts else ()))


def record_before_link(patch: pytest.MonkeyPatch) -> None:
    """With a resume that looks at sizes only; full hashes heal it."""
    real_commit, real_publish, waiting = Destination.commit, Destination.publish, dict[tuple[Destination, str], Callable[[], None]]()

    def late_commit(self: Destination, staged: Path, name: str, digest: str, **more: Any) -> None:
        call = functools.partial(real_commit, self, staged, name, digest, **more)
        if name in {file.name for file in self.plan.files}:
            waiting[self, name] = call
        else:
            call()

    def early_publish(self: Destination, record: Record) -> None:
        real_publish(self, record)
        if late := waiting.pop((self, record.name), None):
            late()

    patch.setattr(Destination, "commit", late_commit)
    patch.setattr(Destination, "publish", early_publish)
    sizes_only(patch)


def sizes_only(patch: pytest.MonkeyPatch) -> None:
    is_done = Job.is_done
    patch.setattr(Job, "is_done", lambda self, buffer, check, **more: is_done(self, buffer, check, hashed=False))


def sizes_only_without_fsync(patch: pytest.MonkeyPatch) -> None:
    lying("sync")(patch)
    sizes_only(patch)


def claim_by_rename(patch: pytest.MonkeyPatch) -> None:
    place = Destination._place

    def renaming(self: Destination, staged: Path, final: Path) -> bool:
        if final != self.layout.claim:
            return place(self, staged, final)
        self.disk.rename(staged, final)
        return True

    patch.setattr(Destination, "_place", renaming)


def commit_by_rename(patch: pytest.MonkeyPatch) -> None:
    def renaming(self: Destination, staged: Path, name: str, digest: str, **more: Any) -> None:
        final = self.layout.final(name)
        self.disk.rename(staged, final)
        self.disk.sync_folder(final.parent)

    patch.setattr(Destination, "commit", renaming)


def commit_without_a_fence(patch: pytest.MonkeyPatch) -> None:
    real_commit = Destination.commit

    def unfenced(self: Destination, *arguments: Any, **more: Any) -> None:
        with pytest.MonkeyPatch.context() as during:
            during.setattr(self, "fence", lambda: None)
            real_commit(self, *arguments, **more)

    patch.setattr(Destination, "commit", unfenced)


def sync_again(patch: pytest.MonkeyPatch) -> None:
    def twice(self: Destination, fd: int) -> None:
        try:
            self.disk.sync(fd)
        except OSError:
            self.disk.sync(fd)
        self.disk.close(fd)

    patch.setattr(Destination, "_sync_and_close", twice)


def close_ignored(patch: pytest.MonkeyPatch) -> None:
    def careless(self: Destination, fd: int) -> None:
        self.disk.sync(fd)
        with contextlib.suppress(OSError):
            self.disk.close(fd)

    patch.setattr(Destination, "_sync_and_close", careless)


def swept_clean(patch: pytest.MonkeyPatch) -> None:
    def sweep(self: Destination) -> None:
        for name in self.disk.names(self.layout.staging):
            self.disk.unlink(self.layout.staging / name)

    patch.setattr(Destination, "sweep", sweep)


def error_swallowed(patch: pytest.MonkeyPatch) -> None:
    write = Job.write

    def quiet(self: Job, *arguments: Any) -> None:
        with contextlib.suppress(Exception):
            write(self, *arguments)

    patch.setattr(Job, "write", quiet)


def short_is_whole(patch: pytest.MonkeyPatch) -> None:
    def once(disk: Disk, fd: int, data: memoryview | bytes, offset: int) -> int:
        disk.write(fd, data, offset)
        return offset + len(data)

    for module in (commit, stream):
        patch.setattr(module, "write_all", once)


VARIANTS: Mapping[str, tuple[Break, str]] = {  # how it is broken, and the test that is tried first
    "1 no fsync at all": (lying("sync", "sync_folder"), "crashes, one_target"),
    "2 no fsync of files": (lying("sync"), "crashes, one_target"),
    "3 no fsync of folders": (lying("sync_folder"), "crashes, one_target"),
    "4 no fsync of the parent of OUT": (lying("sync_folder", where=above_out), "crashes, new_folders"),
    "5 manifest before the last file": (manifest_before_last_file, "crashes, one_target"),
    "6 last mark first": (marks_backwards, "crashes, one_target"),
    "6b a file named last named first": (last_file_first, "crashes, sections"),
    "7 record before link, resume by size": (record_before_link, "crashes, one_target"),
    "8 resume by size alone, no fsync of files": (sizes_only_without_fsync, "crashes, one_target"),
    "9 claim by rename": (claim_by_rename, "a lost claim"),
    "10 commit by rename without a fence": (commit_by_rename, "someone's file in the way"),
    "10b commit by link without a fence": (commit_without_a_fence, "a lost claim"),
    "11 fsync retried after EIO": (sync_again, "sync fails"),
    "12 error of a worker swallowed": (error_swallowed, "the source fails"),
    "13 staged files of other runs swept": (swept_clean, "four equal jobs"),
    "14 short write taken for whole": (short_is_whole, "write fails"),
    "15 error of close ignored": (close_ignored, "close fails"),
}


def caught_by(suite: Mapping[str, Callable[[], None]]) -> tuple[str, str]:
    """The first test that fails and what it says; two empty strings if none does."""
    with brisk():
        for name, test in suite.items():
            try:
                test()
            except (Exception, pytest.fail.Exception) as error:
                return name, f"{type(error).__name__}: {error}".splitlines()[0]
    return "", ""


def test_nothing_is_caught_where_nothing_is_broken() -> None:
    assert caught_by(SUITE) == ("", "")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_suite_catches_it(variant: str, monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]) -> None:
    for make in SCENES:  # scenes and truths are made while nothing is broken
        for target in scene_of(make).targets:
            truth_of(target.plan, scene_of(make).source)
    break_it, first = VARIANTS[variant]
    break_it(monkeypatch)
    test, why = caught_by({first: SUITE[first], **SUITE})
    record_property("caught by", test)
    say(f"{variant}: caught by {test!r}: {why[:200]}")
    assert test, f"nothing catches {variant}"
