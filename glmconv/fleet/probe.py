"""What a shared folder does, seen from every rank: names made once, links, renames, fsync; and how late the others see what one has made.

Everything is made in one folder of its own, by the calls that the commit protocol rests on, and exactly that is removed again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from glmconv.engine.files import Disk
from glmconv.fleet.gathering import Gathering

PREFIX = ".glmconv-probe-"
DATA = b"glmconv doctor was here"
NEEDED = ("create", "exclusive", "write", "fsync", "fsync_folder", "rename")  # without these nothing can be promised
LATE_SECONDS = 75.0  # NFS keeps what it knows of a folder for up to 60 s
POLL_SECONDS = 0.01


@dataclass
class Seen:
    """What one rank saw. `works`: operation -> empty, or what went wrong; `late`: seconds until the last other rank's file was there."""

    rank: int
    host: str
    works: dict[str, str] = field(default_factory=dict)
    won: list[str] = field(default_factory=list)  # the names that every rank tried to make, and this one made
    late: float | None = 0.0
    fsync_ms: float = 0.0
    free: int = 0


class ProbeDisk(Disk):
    """The engine's door to the disk, with the one call more that takes an empty folder away."""

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)


def probe(folder: Path, ranks: Gathering, number: int, token: str, disk: ProbeDisk | None = None, patience: float = LATE_SECONDS) -> list[Seen]:
    """Every rank's view of `folder`. `token` is the same on all ranks and new each time; `number` tells the folders of one call apart."""
    disk, place = disk or ProbeDisk(), folder / f"{PREFIX}{token}"
    seen, made = Seen(ranks.rank, os.uname().nodename), list[Path]()
    try:
        ours = attempt(seen, "mkdir", lambda: make_folder(disk, place, seen))
        if ours:
            made += own_names(disk, place, seen)
            made += contested(disk, place, seen, lambda: ranks.together(f"{number}/contest"))
        else:
            ranks.together(f"{number}/contest")
        makers = ranks.heard(f"{number}/made", {"rank": ranks.rank, "made": bool(ours and not seen.works.get("rename", "not tried"))})
        if ours:
            seen.late = last_seen(disk, place, {f"rank-{maker['rank']}.c" for maker in makers if maker["made"]}, patience)
            with contextlib.suppress(OSError):
                seen.free = disk.free(folder)
        ranks.together(f"{number}/looked")
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                disk.unlink(path)
    heard = ranks.heard(f"{number}/seen", asdict(seen))
    if "mkdir" in seen.won:  # the others' files are gone by now: each was removed before its rank spoke
        with contextlib.suppress(OSError):
            disk.rmdir(place)
    return [Seen(**said) for said in heard]  # type: ignore[arg-type]


def attempt(seen: Seen, name: str, call: Callable[[], object]) -> bool:
    """Whether it went well; what went wrong is written down."""
    try:
        call()
        seen.works.setdefault(name, "")
    except OSError as error:
        seen.works[name] = errno.errorcode.get(error.errno or 0, "") + f" ({error.strerror or error})"
    return not seen.works[name]


def make_folder(disk: ProbeDisk, place: Path, seen: Seen) -> None:
    with contextlib.suppress(FileExistsError):
        disk.mkdir(place)
        seen.won.append("mkdir")


def own_names(disk: ProbeDisk, place: Path, seen: Seen) -> Iterator[Path]:
    """A file of this rank's own: made, refused a second time, written, synced, linked, renamed. Yields what is there and is to be removed."""
    first, second, third = (place / f"rank-{seen.rank}.{letter}" for letter in "abc")
    fds: list[int] = []
    if not attempt(seen, "create", lambda: fds.append(disk.create(first))):
        return
    yield first
    attempt(seen, "exclusive", lambda: refused(lambda: disk.close(disk.create(first))))
    attempt(seen, "write", lambda: disk.write(fds[0], DATA, 0))
    began = time.monotonic()
    attempt(seen, "fsync", lambda: disk.sync(fds[0]))
    seen.fsync_ms = round((time.monotonic() - began) * 1000, 3)
    attempt(seen, "close", lambda: disk.close(fds[0]))
    attempt(seen, "fsync_folder", lambda: disk.sync_folder(place))
    if attempt(seen, "link", lambda: disk.link(first, second)):
        yield second
        attempt(seen, "link_refused", lambda: refused(lambda: disk.link(first, second)))
        attempt(seen, "rename", lambda: disk.rename(second, third))
        yield third
        attempt(seen, "rename_noreplace", lambda: refused(lambda: disk.rename_noreplace(third, first)))
    else:
        attempt(seen, "rename", lambda: disk.rename(first, third))
        yield third


def refused(call: Callable[[], object]) -> None:
    """OSError unless the call says that the name is taken."""
    try:
        call()
    except FileExistsError:
        return
    raise OSError(errno.EIO, "the name was taken, and it was made all the same")


def contested(disk: ProbeDisk, place: Path, seen: Seen, together: Callable[[], None]) -> Iterator[Path]:
    """Names that every rank tries to make at the same moment: exactly one may."""
    source, created, linked = place / f"rank-{seen.rank}.c", place / "created", place / "linked"
    together()
    with contextlib.suppress(OSError):
        disk.close(disk.create(created))
        seen.won.append("create")
        yield created
    with contextlib.suppress(OSError):
        disk.link(source, linked)
        seen.won.append("link")
        yield linked


def last_seen(disk: ProbeDisk, place: Path, missing: set[str], patience: float) -> float | None:
    """Seconds until each of these files, the ranks' own, could be opened and was listed; None if one could not within `patience`."""
    began = time.monotonic()
    while missing:
        missing = {name for name in missing if not visible(disk, place, name)}
        waited = time.monotonic() - began
        if missing and waited > patience:
            return None
        if missing:
            time.sleep(POLL_SECONDS)
    return round(time.monotonic() - began, 3)


def visible(disk: ProbeDisk, place: Path, name: str) -> bool:
    try:
        disk.close(disk.open(place / name))
        return name in disk.names(place)
    except OSError:
        return False
