"""Who takes which job: a counter. It only shares work out; the filesystem alone decides what is done, so work done twice is harmless."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol, TypeVar

from glmconv.engine.plan import sha256
from glmconv.engine.ranks import meeting, ranks_here, store_of, this_rank
from glmconv.errors import OutputError, SourceError

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
__all__ = ["JobQueue", "LocalQueue", "StoreQueue", "open_queue", "ranks_here", "this_rank"]
BEAT_SECONDS = 1.0


class JobQueue(Protocol):
    def next(self) -> int | None:
        """The next job's number, None when there is none left. May be called from any thread."""


class LocalQueue:
    """The queue of one process."""

    def __init__(self, count: int) -> None:
        self._numbers = iter(range(count))
        self._lock = threading.Lock()

    def next(self) -> int | None:
        with self._lock:
            return next(self._numbers, None)


class StoreQueue:
    """The queue of many ranks: a counter on a TCPStore. No process group is needed.

    Beside it lie hints that save work: which jobs some rank has found or made complete, and a heartbeat, so that one long job is not taken
    for a dead rank. `hosted` tells that the store lives in this process, which therefore leaves last.

    A rank that torchrun has started again finds the store as its earlier life left it. It first takes what was taken and never reported; of
    several ranks in their same life only one takes each such job. A count of restarts would not do: torchrun's agents do not agree on it.
    """

    def __init__(self, store: TCPStore, plan_ids: Sequence[str], count: int, *, rank: int, ranks: int, key: str = "", hosted: bool = False) -> None:
        self.rank, self.ranks, self._count, self._hosted = rank, ranks, count, hosted
        self._store = store
        self._key = f"glmconv/{key}/"
        self._lock = threading.Lock()
        self._beaten = time.monotonic()
        mine = ",".join(plan_ids) or "-"
        agreed = self._ask(lambda: self._store.compare_set(self._key + "plans", "", mine)).decode("ascii", "replace")
        if agreed != mine:
            raise SourceError(f"rank {rank} sees another source than the other ranks.", hint="Give every node the same files and options.")
        life = self._ask(lambda: self._store.add(f"{self._key}lives/{rank}", 1))
        self._left_behind = self._taken_before(life) if life > 1 else iter(())
        self._one_looks = threading.Lock()

    def next(self) -> int | None:
        with self._one_looks:
            again = next(self._left_behind, None)
        if again is not None:
            return again
        number = self._ask(lambda: self._store.add(self._key + "next", 1)) - 1
        return number if number < self._count else None

    def _taken_before(self, life: int) -> Iterator[int]:
        """The jobs that were taken before this life began and are not reported; a job that a living rank is at is done twice, which does no harm."""
        taken = self._ask(lambda: self._store.add(self._key + "next", 0))
        for number in range(min(taken, self._count)):
            if not self.reported(number) and self._ask(lambda number=number: self._store.add(f"{self._key}again/{life}/{number}", 1)) == 1:  # type: ignore[misc]
                yield number

    def report(self, job: int) -> None:
        """Say that this job's file is complete."""
        self._ask(lambda: self._store.set(f"{self._key}done/{job}", "1"))

    def reported(self, *jobs: int) -> bool:
        """Whether some rank of this run has found or made each of these jobs' files complete."""
        return self._ask(lambda: self._store.check([f"{self._key}done/{job}" for job in jobs]))

    def beat(self) -> None:
        """Say that this rank is at work; at most once a second something is sent."""
        now = time.monotonic()
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self._ask(lambda: self._store.add(self._key + "beat", 1))

    def pulse(self) -> int:
        """Grows as long as some rank is at work."""
        return self._ask(lambda: self._store.add(self._key + "beat", 0))

    def leave(self, stall: float, poll: float, stop: threading.Event) -> None:
        """Say goodbye; the rank that hosts the store waits for the others', at most `stall` seconds after the last sign of life."""
        left = self._ask(lambda: self._store.add(self._key + "left", 1))
        last, since = (left, -1), time.monotonic()
        while self._hosted and left < self.ranks and time.monotonic() - since < stall and not stop.is_set():
            stop.wait(poll)
            left = self._ask(lambda: self._store.add(self._key + "left", 0))
            if (left, self.pulse()) != last:
                last, since = (left, self.pulse()), time.monotonic()

    def _ask(self, question: Callable[[], T]) -> T:
        try:
            with self._lock:  # one socket, one question at a time
                return question()
        except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
            raise OutputError(
                f"rank {self.rank} has lost the job's store: {error}".splitlines()[0], hint="What is done is kept; run the same command again."
            ) from error


def open_queue(
    plan_ids: Sequence[str], count: int, *, name: str = "", environment: Mapping[str, str] | None = None, timeout: float = 300
) -> LocalQueue | StoreQueue:
    """The queue that the environment asks for: torchrun's or SLURM's ranks share one, anything else works alone.

    `name` tells commands of one torchrun job apart (their destinations do), so that one may follow another.
    """
    env = os.environ if environment is None else environment
    place = meeting(env)
    if place is None:
        return LocalQueue(count)
    key = sha256(name.encode())[:16]
    return StoreQueue(store_of(place, timeout), plan_ids, count, rank=place.rank, ranks=place.ranks, key=key, hosted=place.hosted)
