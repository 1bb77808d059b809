"""Ranks that see a shared folder late: what another node has made is not found by the first lookups, as a client's cache of names has it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from torch.distributed import TCPStore

from glmconv.check.verify import verify_output
from glmconv.engine.files import Disk, FileStatus
from glmconv.engine.journal import MANIFEST
from glmconv.engine.plan import parts_of
from glmconv.engine.queue import StoreQueue
from glmconv.engine.run import Target, run
from tests.engine.made import CHUNK, MadeSource, made_plan, sectioned_plan
from tests.roundtrip.shards import contents

SECONDS = 60.0
RANKS = 3
T = TypeVar("T")


@dataclass
class Server:
    """Who made which name; every client knows its own at once. One lookup or making at a time: a name that was seen is not lost again."""

    makers: dict[Path, int] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock)


class LateDisk(Disk):
    """One node's view. Making a name asks the server, so it fails where the name is taken, and is known from then on; looking for one believes the
    cache `lag` times.
    """

    def __init__(self, server: Server, node: int, lag: int) -> None:
        self.server, self.node, self.lag = server, node, lag
        self.looked: Counter[Path] = Counter()
        self.missed = 0

    def _look(self, path: Path) -> None:
        maker = self.server.makers.get(path, self.node)
        if maker != self.node and self.looked[path] < self.lag:
            self.looked[path] += 1
            self.missed += 1
            raise FileNotFoundError(2, "not seen yet", str(path))

    def _make(self, path: Path, make: Callable[[], T]) -> T:
        with self.server.lock:
            try:
                made = make()
            except FileExistsError:
                self.looked[path] = self.lag
                raise
            self.server.makers[path] = self.node
            self.looked[path] = self.lag
            return made

    def mkdir(self, path: Path) -> None:
        self._make(path, lambda: Disk.mkdir(self, path))

    def create(self, path: Path) -> int:
        return self._make(path, lambda: Disk.create(self, path))

    def link(self, source: Path, target: Path) -> None:
        self._make(target, lambda: Disk.link(self, source, target))

    def rename(self, source: Path, target: Path) -> None:
        self._make(target, lambda: Disk.rename(self, source, target))

    def open(self, path: Path) -> int:
        with self.server.lock:
            self._look(path)
            return self._known(path, super().open(path))

    def status(self, path: Path) -> FileStatus:
        with self.server.lock:
            self._look(path)
            return self._known(path, super().status(path))

    def _known(self, path: Path, found: T) -> T:
        self.looked[path] = self.lag
        return found

    def names(self, path: Path) -> list[str]:
        with self.server.lock:
            return [name for name in super().names(path) if self._seen(path / name)]

    def _seen(self, path: Path) -> bool:
        try:
            self._look(path)
        except FileNotFoundError:
            return False
        return True


@pytest.mark.parametrize(("plan", "lag"), [(made_plan("late", files=4), 1), (made_plan("late", files=4), 3), (sectioned_plan("late"), 1)])
def test_ranks_that_see_the_folder_late_finish_with_the_bytes_of_one(plan, lag, tmp_path):
    run([Target(plan, tmp_path / "alone" / "made.gguf.glmconv")], MadeSource(), workers=1, chunk_size=CHUNK)
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    server, there = Server(), tmp_path / "together" / "made.gguf.glmconv"
    disks = [LateDisk(server, rank, lag) for rank in range(RANKS)]
    errors: list[BaseException] = []

    def rank(number: int) -> None:
        mine = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        queue = StoreQueue(mine, [plan.id], len(parts_of(plan.files)), rank=number, ranks=RANKS)
        try:
            run([Target(plan, there)], MadeSource(), workers=1, chunk_size=CHUNK, disk=disks[number], queue=queue)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(RANKS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert errors == []
    assert sum(disk.missed for disk in disks) > 0
    assert (there / MANIFEST).exists()
    assert verify_output(there).same
    whole = {name: data for name, data in contents(tmp_path / "together").items() if "/.glmconv/" not in name}
    assert whole == {name: data for name, data in contents(tmp_path / "alone").items() if "/.glmconv/" not in name}
