"""Several runs on one simulated disk, one operation at a time, in an order that a seed decides: races that can be replayed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tests.engine.simulated import Fault, SimulatedDisk

Choose = Callable[[Sequence[int], int], int]  # (who is still at work, whose turn it was) -> whose turn it is


class Turns:
    """Lets one participant at a time go on; it gives its turn back before each of its operations."""

    def __init__(self, count: int, choose: Choose) -> None:
        self.at_work = list(range(count))
        self.choose = choose
        self.now = -1  # nobody's, until all have arrived: who comes first must decide nothing
        self.missing = set(self.at_work)
        self.changed = threading.Condition()

    def wait(self, me: int) -> None:
        with self.changed:
            if self.now == me or self.arrives(me):
                self.now = self.choose(self.at_work, max(self.now, 0))
                self.changed.notify_all()
            if not self.changed.wait_for(lambda: self.now == me, timeout=60):
                raise AssertionError(f"participant {me} never had its turn")

    def arrives(self, me: int) -> bool:
        """Whether this one is the last to arrive."""
        first = me in self.missing
        self.missing.discard(me)
        return first and not self.missing

    def leave(self, me: int) -> None:
        with self.changed:
            self.at_work.remove(me)
            last = self.arrives(me)
            if self.at_work and (self.now == me or last):
                self.now = self.choose(self.at_work, me)
            self.changed.notify_all()


class Participant(SimulatedDisk):
    """One run's door to a disk that it shares; counts its own operations only."""

    def __init__(self, disk: SimulatedDisk, turns: Turns, me: int) -> None:
        self.__dict__.update(disk.__dict__)
        self.lock = threading.RLock()  # its own threads; the turns keep the others out
        self.kinds = []
        self.changes = 0
        self.turns, self.me = turns, me

    def _step(self, kind: str) -> Fault | None:
        self.turns.wait(self.me)
        return super()._step(kind)


@dataclass(frozen=True)
class Ended:
    """How a participant ended: without an error, or with this one."""

    error: BaseException | None
    changes: int


def race(disk: SimulatedDisk, runs: Sequence[Callable[[SimulatedDisk], object]], choose: Choose) -> list[Ended]:
    """Run all of `runs` on `disk`, an operation at a time as `choose` says."""
    turns = Turns(len(runs), choose)
    ended: dict[int, Ended] = {}

    def participate(me: int) -> None:
        mine = Participant(disk, turns, me)
        error: BaseException | None = None
        try:
            runs[me](mine)
        except BaseException as raised:
            error = raised
        finally:
            ended[me] = Ended(error, mine.changes)
            turns.leave(me)

    threads = [threading.Thread(target=participate, args=(me,), daemon=True) for me in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(ended) == len(runs), "a run hangs"
    return [ended[me] for me in range(len(runs))]
