"""Two ranks in one process on a real store: what one may believe of the other."""

from __future__ import annotations

import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from glmconv.check.verify import verify_output
from glmconv.engine.files import Disk
from glmconv.engine.journal import MANIFEST, Layout
from glmconv.engine.queue import StoreQueue
from glmconv.engine.run import Target, run
from glmconv.errors import SourceError
from tests.engine.made import CHUNK, MadeSource, made_plan

PLAN = made_plan("ranks", files=4)
SECONDS = 60.0


class HeldDisk(Disk):
    """The real disk; before it replaces a file it says so and waits until it is let go."""

    def __init__(self) -> None:
        self.reached, self.go = threading.Event(), threading.Event()

    def rename(self, source: Path, target: Path) -> None:
        if target.name.startswith("shard"):
            self.reached.set()
            assert self.go.wait(SECONDS)
        super().rename(source, target)


@pytest.fixture
def store():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))


def queue(store: TCPStore, rank: int, plan_id: str = PLAN.id) -> StoreQueue:
    mine = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
    return StoreQueue(mine, [plan_id], len(PLAN.files), rank=rank, ranks=2)


def test_the_manifest_waits_for_a_file_that_another_rank_is_mending(store, tmp_path):
    there = tmp_path / "there"
    run([Target(PLAN, there)], MadeSource(), workers=1, chunk_size=CHUNK)
    (there / MANIFEST).unlink()  # as if killed just before; every record is there, but one file was damaged since
    with (there / "shard-00001").open("r+b") as file:
        file.write(b"X")
    disk = HeldDisk()
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        try:
            run([Target(PLAN, there)], MadeSource(), workers=1, chunk_size=CHUNK, disk=disk, queue=queue(store, number))
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=rank, args=(number,)) for number in (1, 0)]
    threads[0].start()
    assert disk.reached.wait(SECONDS)  # rank 1 mends; rank 0, which writes the manifest, finds nothing left to do
    threads[1].start()
    time.sleep(1.0)  # five times as long as a rank waits between two looks
    assert not (there / MANIFEST).exists()
    disk.go.set()
    for thread in threads:
        thread.join(SECONDS)
    assert errors == []
    assert verify_output(there).same
    assert not list(Layout(there, PLAN.id).staging.iterdir())


def test_a_rank_that_plans_something_else_is_told_so(store):
    queue(store, 0)
    with pytest.raises(SourceError, match="another source"):
        queue(store, 1, "0" * 64)


def test_a_rank_that_is_started_again_takes_what_its_earlier_life_left(store):
    first, second = queue(store, 0), queue(store, 1)
    taken = [second.next(), first.next(), second.next()]
    assert taken == [0, 1, 2]
    first.report(1)
    second.report(0)
    again = queue(store, 1)  # the same rank, in a new process; job 2 was in its hands
    assert [again.next(), again.next(), again.next()] == [2, 3, None]


def test_of_the_ranks_that_are_started_again_only_one_takes_a_job_that_was_left(store):
    before = [queue(store, rank) for rank in (0, 1)]
    assert [before[0].next(), before[1].next()] == [0, 1]
    after = [queue(store, rank) for rank in (0, 1)]
    assert [after[0].next(), after[1].next(), after[0].next(), after[1].next()] == [0, 1, 2, 3]
    third = queue(store, 1)  # a third life: nothing was reported yet, so all of it is left again
    assert [third.next() for _ in range(5)] == [0, 1, 2, 3, None]
