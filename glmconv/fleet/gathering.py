"""What ranks tell each other once, over the job's store: each says something, rank 0 hears all."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from glmconv.engine.plan import canonical_json
from glmconv.engine.ranks import meeting, store_of
from glmconv.errors import OutputError
from glmconv.strict_json import parse

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

T = TypeVar("T")
LIMIT = 1 << 20
ROUNDS = 3


class Gathering:
    """The ranks of one job at one piece of work; `key` tells it from others. A process without a store works alone and hears itself.

    OutputError if a rank does not come within `timeout` seconds.
    """

    def __init__(self, key: str, rank: int = 0, ranks: int = 1, store: TCPStore | None = None, timeout: float = 120) -> None:
        self.rank, self.ranks, self._store, self._timeout = rank, ranks, store, timeout
        self._key = f"glmconv/{key}/"

    @classmethod
    def of_job(cls, key: str, timeout: float) -> Gathering:
        """That of torchrun's or SLURM's ranks, as the environment has it."""
        place = meeting()
        return cls(key, place.rank, place.ranks, store_of(place, timeout), timeout) if place else cls(key, timeout=timeout)

    def together(self, name: str) -> None:
        """Return when every rank has come here, within milliseconds of each other."""
        if self._store is None:
            return
        key = self._key + name
        if self._ask(lambda store: int(store.add(key, 1))) == self.ranks:
            self._ask(lambda store: store.set(key + "/go", "1"))
        self._wait(key + "/go")

    def shared(self, name: str, value: str) -> str:
        """Rank 0's value, for all."""
        if self._store is None:
            return value
        if self.rank == 0:
            self._ask(lambda store: store.set(self._key + name, value))
        self._wait(self._key + name)
        return str(self._ask(lambda store: store.get(self._key + name)).decode("ascii", "replace"))

    def heard(self, name: str, value: dict[str, object]) -> list[dict[str, object]]:
        """What every rank said, in the order of their numbers; every rank hears it."""
        if self._store is None:
            return [value]
        self._ask(lambda store: store.set(f"{self._key}{name}/{self.rank}", canonical_json(value)))
        found = []
        for rank in range(self.ranks):
            key = f"{self._key}{name}/{rank}"
            self._wait(key)
            said = parse(self._ask(lambda store, key=key: store.get(key)), file=f"rank {rank}", limit=LIMIT)
            found.append(said if isinstance(said, dict) else {})
        return found

    def clock(self) -> float:
        """By how many seconds this rank's clock is ahead of rank 0's: the least of a few readings, each a few milliseconds wrong at most."""
        differences = []
        for number in range(ROUNDS if self._store else 0):
            self.together(f"clock/{number}")
            now = time.time()
            base = float(self.shared(f"clock/{number}/base", repr(now)))
            differences.append(now - base)
            self.together(f"clock/{number}/read")
        return min(differences, key=abs, default=0.0)

    def leave(self) -> None:
        """The last thing to do: a rank that hosts the store waits for the others."""
        if self._store is not None:
            self.together("leave")
            if self._ask(lambda store: int(store.add(self._key + "left", 1))) != self.ranks and self.rank == 0:
                deadline = time.monotonic() + 5
                while self._ask(lambda store: int(store.add(self._key + "left", 0))) < self.ranks and time.monotonic() < deadline:
                    time.sleep(0.01)

    def _wait(self, key: str) -> None:
        self._ask(lambda store: store.wait([key], timedelta(seconds=self._timeout)))

    def _ask(self, question: Callable[..., T]) -> T:
        try:
            return question(self._store)
        except (RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
            raise OutputError(
                f"rank {self.rank} waits for the other ranks in vain.", hint="Are all of them started, with the same command?"
            ) from error
