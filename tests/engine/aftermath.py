"""What a simulated disk holds, and what a power loss or a kill leaves of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

SECTOR = 512
OUTCOMES = (
    "everything lost",
    "names kept, data lost",
    "data kept, names lost",
    "names kept, zeros",
    "names kept, torn",
    *("any of it",) * 3,
)


@dataclass(eq=False, slots=True)
class Inode:
    """A file or (with `names`) a folder: what the kernel shows, and what a power loss leaves."""

    number: int
    names: dict[str, Inode] | None = None
    durable_names: dict[str, Inode] = field(default_factory=dict)
    pending: list[Change] = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    dirty: list[tuple[int, int]] = field(default_factory=list)  # written since the last sync; one that fails leaves these clean, and not durable
    mtime: int = 0
    links: int = 1

    def reachable(self) -> bytes:
        """What the disk would hold if all that is dirty were written now."""
        if self.dirty == [(0, len(self.data))]:
            return bytes(self.data)
        content = bytearray(self.durable)
        for begin, end in self.dirty:
            if len(content) < end:
                content.extend(bytes(end - len(content)))
            content[begin:end] = self.data[begin:end]
        return bytes(content)


@dataclass(eq=False, slots=True)
class Change:
    """One name of a folder that changed since the folder was synced: it now means `inode`, or nothing. A rename's halves know each other."""

    name: str
    inode: Inode | None
    other_half: Change | None = None
    done: bool = False


def apply(names: dict[str, Inode], change: Change) -> None:
    """Carry out a change of a name; of a removal that is half of a rename, only if the other half has happened."""
    if change.inode is not None:
        names[change.name] = change.inode
        change.done = True
    elif change.other_half is None or change.other_half.done:
        names.pop(change.name, None)


KeepData = Callable[[Inode], bytes]
KeepName = Callable[[Change], bool]


def choices(rng: random.Random, outcome: str) -> tuple[KeepData, KeepName]:
    """What is left of un-synced data and whether an un-synced name is kept, for one of OUTCOMES."""

    def any_data(inode: Inode) -> bytes:
        return rng.choice((all_data, no_data, zeros, torn, torn))(inode)

    def torn(inode: Inode) -> bytes:
        """Each sector as it was or as it is; the length up to the last sector that was taken, or the whole."""
        new = inode.reachable()
        content = bytearray(inode.durable.ljust(len(new), b"\0"))
        for at in range(0, len(new), SECTOR):
            if rng.random() < 0.5:
                content[at : at + SECTOR] = new[at : at + SECTOR]
        cut = rng.randrange(0, len(new) + 1, SECTOR) if rng.random() < 0.5 else len(new)
        return bytes(content[: max(cut, len(inode.durable))])

    match outcome:
        case "everything lost":
            return no_data, lambda change: False
        case "names kept, data lost":
            return no_data, lambda change: True
        case "data kept, names lost":
            return all_data, lambda change: False
        case "names kept, zeros":
            return zeros, lambda change: True
        case "names kept, torn":
            return torn, lambda change: True
        case "any of it":
            kept = rng.choice((0.1, 0.5, 0.9))
            return any_data, lambda change: rng.random() < kept
    raise ValueError(outcome)


def all_data(inode: Inode) -> bytes:
    return inode.reachable()


def no_data(inode: Inode) -> bytes:
    return inode.durable


def zeros(inode: Inode) -> bytes:
    """The new length without the new bytes."""
    return inode.durable.ljust(len(inode.data), b"\0")[: max(len(inode.data), len(inode.durable))]


class Survivor:
    """Copies what a power loss leaves of a disk. Each choice is made once, so that a file with two names has one content."""

    def __init__(self, keep_data: KeepData, keep_name: KeepName) -> None:
        self.keep_data, self.keep_name = keep_data, keep_name
        self.copies: dict[Inode, Inode] = {}
        self.kept: dict[Change, bool] = {}

    def of(self, inode: Inode) -> Inode:
        copy = self.copies.get(inode)
        if copy is not None:
            copy.links += 1
            return copy
        if inode.names is None:
            content = self.keep_data(inode) if inode.durable != inode.data else inode.durable
            copy = self.copies[inode] = Inode(inode.number, data=bytearray(content), durable=content, mtime=inode.mtime)
            return copy
        names = dict(inode.durable_names)
        for change in inode.pending:
            if self.keeps(change):
                names.pop(change.name, None)
                if change.inode is not None:
                    names[change.name] = change.inode
        copy = self.copies[inode] = Inode(inode.number, names={}, mtime=inode.mtime)
        copy.names = {name: self.of(child) for name, child in names.items()}
        copy.durable_names = dict(copy.names)
        return copy

    def keeps(self, change: Change) -> bool:
        """A rename's second half goes with its first."""
        half = change.other_half
        decider = half if half is not None and not half.done else change
        if decider not in self.kept:
            self.kept[decider] = self.keep_name(decider)
        return self.kept[decider]


class Twin:
    """Copies a disk with all that is not durable yet."""

    def __init__(self) -> None:
        self.copies: dict[Inode, Inode] = {}
        self.changes: dict[Change, Change] = {}

    def of(self, inode: Inode) -> Inode:
        copy = self.copies.get(inode)
        if copy is not None:
            return copy
        copy = Inode(inode.number, None, {}, [], bytearray(inode.data), inode.durable, list(inode.dirty), inode.mtime, inode.links)
        self.copies[inode] = copy
        if inode.names is not None:
            copy.names = {name: self.of(child) for name, child in inode.names.items()}
            copy.durable_names = {name: self.of(child) for name, child in inode.durable_names.items()}
            copy.pending = [self.change(change) for change in inode.pending]
        return copy

    def change(self, change: Change) -> Change:
        copy = self.changes.get(change)
        if copy is None:
            half = self.change(change.other_half) if change.other_half else None
            copy = self.changes[change] = Change(change.name, self.of(change.inode) if change.inode else None, half, change.done)
        return copy
