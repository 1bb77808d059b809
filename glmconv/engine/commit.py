"""One output folder as one run sees it: the claim, staged files, the commit under final names. Every step is one of the commit protocol's.

What holds after each: a final name is never overwritten unless this plan's journal says that we wrote it; a record is durable only after
its file is; nothing but this run's own staged files is ever unlinked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from glmconv.engine.files import Disk, FileStatus
from glmconv.engine.journal import Layout, Record, claim_of, claimed_by
from glmconv.engine.manifest import load_manifest
from glmconv.engine.plan import Plan, sha256
from glmconv.errors import DestinationError, OutputError, SourceError

T = TypeVar("T")
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
NO_NOREPLACE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_ALLOCATE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
HASH_CHUNK = 1 << 20


class SyncFailed(Exception):
    """fsync or close said that the data may be lost. The descriptor is worthless now; the file can be written once more."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class Destination:
    """The output folder of one plan, safe to use from several threads. Raises the disk's OSError, or DestinationError if it is not ours."""

    def __init__(self, disk: Disk, root: Path, plan: Plan, run_id: str, log: Callable[[str], None]) -> None:
        self.disk, self.plan, self.run_id, self.log = disk, plan, run_id, log
        self.layout = Layout(root, plan.id)
        self._lock = threading.Lock()
        self._staged: set[Path] = set()
        self._unguarded = False

    def claim(self) -> None:
        """Make the folders and claim OUT for this plan, durably. DestinationError if it is claimed for another."""
        layout = self.layout
        for folder in (layout.staging, layout.journal):
            self._make_folder(folder)
        if claimed_by(self.disk, layout.root) is None:
            staged = self.stage(layout.staged("plan.json", self.run_id), claim_of(self.plan))
            self._place(staged, layout.claim)
            self.drop(staged)
        self.fence()
        self.disk.sync_folder(layout.state)
        self.disk.sync_folder(layout.root)
        self._sync_parents()
        subfolders = {layout.final(name).parent for name in [f.name for f in self.plan.files] + [m.name for m in self.plan.marks]}
        subfolders -= {layout.root, layout.root.parent}
        for folder in sorted(subfolders):  # only once the claim is durable: without it they would be someone else's
            self._make_folder(folder)
        if subfolders:
            self.disk.sync_folder(layout.root)

    def fence(self) -> None:
        """Refuse to go on if OUT is no longer this plan's: a run that was stopped and woken must not disturb a newer output."""
        root = self.layout.root
        try:
            owner = claimed_by(self.disk, root)
        except SourceError as error:
            raise DestinationError(
                f"cannot tell whose output this is: {error.line}", file=root, hint="Choose another folder or pass --overwrite."
            ) from error
        if owner != self.plan.id:
            raise DestinationError("belongs to another conversion now.", file=root, hint="Choose another folder or pass --overwrite.")
        with contextlib.suppress(FileNotFoundError, SourceError):
            if load_manifest(self.disk, root).plan_id != self.plan.id:
                raise DestinationError(
                    "holds the finished output of another conversion.", file=root, hint="Choose another folder or pass --overwrite."
                )

    def staged(self, path: Path, write: Callable[[int], T]) -> T:
        """Let `write(fd)` fill a new staged file and make it durable; once more from the start if the first sync fails."""
        return self._synced(path, lambda: self._staged_once(path, write))

    def in_place(self, name: str, size: int, write: Callable[[int], T]) -> T:
        """Let `write(fd)` fill its part of a staged file of `size` bytes that many runs share, durably; once more if the first sync fails."""
        return self._synced(self.layout.shared(name), lambda: self._in_place_once(name, size, write))

    def _synced(self, path: Path, attempt: Callable[[], T]) -> T:
        try:
            return attempt()
        except SyncFailed as first:
            if first.error.errno in FULL:
                raise first.error from None
            self.log(f"{path}: {first.error.strerror} while it was made durable; writing it once more")
        try:
            return attempt()
        except SyncFailed as second:
            raise OutputError(
                f"cannot be made durable: {second.error.strerror}.", file=path, hint="Check the disk, then run the same command again."
            ) from second.error

    def _in_place_once(self, name: str, size: int, write: Callable[[int], T]) -> T:
        path = self.layout.shared(name)
        fd = self.disk.open_shared(path)
        try:
            there = self.disk.status_of(fd)
            if not there.regular or there.size > size or (there.links > 1 and not self._is(self.layout.final(name), there)):
                raise DestinationError("is in the way of a file of this output.", file=path, hint="Remove it, and run the same command again.")
            if there.size < size:
                self._allocate(fd, size)
            self.disk.sync_folder(path.parent)  # a record must never outlive the name of what it speaks of
            result = write(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self.disk.close(fd)
            raise
        self._sync_and_close(fd)
        return result

    def _allocate(self, fd: int, size: int) -> None:
        try:
            self.disk.allocate(fd, size)
        except OSError as error:
            if error.errno not in NO_ALLOCATE:
                raise

    def stage(self, path: Path, content: bytes) -> Path:
        """A durable staged file with `content`."""
        self.staged(path, lambda fd: write_all(self.disk, fd, content, 0))
        return path

    def commit(self, staged: Path, name: str, digest: str, *, ours: Callable[[], bool]) -> None:
        """Give a durable staged file its final name, durably. A different file there is replaced if `ours()`, else an error."""
        final = self.layout.final(name)
        self.fence()
        if not self._place(staged, final) and not self._already_there(final, digest):
            if not ours():
                raise DestinationError("is there already and is not ours.", file=final, hint="Choose another folder or pass --overwrite.")
            self.log(f"{final}: was damaged since it was written; replacing it")
            self.disk.rename(staged, final)
        self.disk.sync_folder(final.parent)

    def publish(self, record: Record) -> None:
        """Make the record of a committed file durable."""
        staged = self.stage(self.layout.staged_record(record.name, self.run_id), record.content())
        self.disk.rename(staged, self.layout.record(record.name))
        self._forget(staged)
        self.disk.sync_folder(self.layout.journal)

    def retract(self, name: str) -> None:
        """Take a record back, durably, before what it speaks of is written again: a kill must not leave it with bytes that no sync has seen."""
        if self.has_record(name):
            with contextlib.suppress(FileNotFoundError):
                self.disk.unlink(self.layout.record(name))
            self.disk.sync_folder(self.layout.journal)

    def has_record(self, name: str) -> bool:
        return self.exists(self.layout.record(name))

    def put(self, name: str, content: bytes, *, ours: Callable[[], bool]) -> None:
        """A small file under its final name, durably."""
        staged = self.stage(self.layout.staged(name, self.run_id), content)
        self.commit(staged, name, sha256(content), ours=ours)
        self.drop(staged)

    def drop(self, path: Path) -> None:
        """Unlink one of this run's staged files."""
        with contextlib.suppress(FileNotFoundError):
            self.disk.unlink(path)
        self._forget(path)

    def sweep(self) -> None:
        """Unlink whatever this run still has staged; what cannot be unlinked stays for `glmconv clean`."""
        with self._lock:
            left = sorted(self._staged)
        for path in left:
            with contextlib.suppress(OSError):
                self.drop(path)

    def exists(self, path: Path) -> bool:
        try:
            self.disk.status(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def _staged_once(self, path: Path, write: Callable[[int], T]) -> T:
        fd = self.disk.create(path)
        with self._lock:
            self._staged.add(path)
        try:
            try:
                result = write(fd)
            except BaseException:
                with contextlib.suppress(OSError):
                    self.disk.close(fd)
                raise
            self._sync_and_close(fd)
        except BaseException:
            with contextlib.suppress(OSError):
                self.drop(path)
            raise
        return result

    def _sync_and_close(self, fd: int) -> None:
        try:
            self.disk.sync(fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                self.disk.close(fd)
            raise SyncFailed(error) from error
        try:
            self.disk.close(fd)
        except OSError as error:  # NFS says here what it could not store
            raise SyncFailed(error) from error

    def _place(self, staged: Path, final: Path) -> bool:
        """Give a staged file its final name without overwriting. False if something else has the name."""
        mine = self.disk.status(staged)
        try:
            self.disk.link(staged, final)
        except OSError as error:
            if self._is(final, mine):  # over NFS the link may be made and its answer lost
                return True
            if isinstance(error, FileExistsError):
                return False
            if error.errno not in NO_LINKS:
                raise
            return self._place_by_rename(staged, final, mine)
        return True

    def _place_by_rename(self, staged: Path, final: Path, mine: FileStatus) -> bool:
        """The same where there are no hard links."""
        try:
            self.disk.rename_noreplace(staged, final)
        except OSError as error:
            if self._is(final, mine):
                return True
            if isinstance(error, FileExistsError):
                return False
            if error.errno not in NO_NOREPLACE:
                raise
            if self.exists(final):
                return False
            if not self._unguarded:
                self._unguarded = True
                self.log(
                    f"{self.layout.root}: this filesystem can neither link nor rename without overwriting: two jobs at once are not guarded here"
                )
            self.disk.rename(staged, final)
        return True

    def _is(self, path: Path, mine: FileStatus) -> bool:
        with contextlib.suppress(OSError):
            there = self.disk.status(path)
            return (there.device, there.inode) == (mine.device, mine.inode)
        return False

    def _already_there(self, final: Path, digest: str) -> bool:
        """Whether the file under the final name has these bytes; if so, they are durable afterwards."""
        if not self.disk.status(final).regular:
            return False
        fd = self.disk.open(final)
        try:
            if hash_of(self.disk, fd, memoryview(bytearray(HASH_CHUNK))) != digest:
                return False
            self.disk.sync(fd)
        finally:
            self.disk.close(fd)
        return True

    def _forget(self, path: Path) -> None:
        with self._lock:
            self._staged.discard(path)

    def _make_folder(self, path: Path) -> None:
        missing = []
        while not self.exists(path):
            missing.append(path)
            path = path.parent
        if not self.disk.status(path).folder:
            raise DestinationError("is not a folder.", file=path, hint="Choose another destination.")
        for folder in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another run made it
                self.disk.mkdir(folder)

    def _sync_parents(self) -> None:
        """Make OUT's own name durable, and its parents', whoever made them: a killed run may have made some and synced none."""
        root = self.layout.root
        device = self.disk.status(root).device
        for parent in root.parents:
            try:
                if self.disk.status(parent).device != device:
                    return
                self.disk.sync_folder(parent)
            except (FileNotFoundError, PermissionError):
                return


def write_all(disk: Disk, fd: int, data: memoryview | bytes, offset: int) -> int:
    """Write all of `data`, however short the single writes are. Returns the offset behind it."""
    view = memoryview(data)
    while view:
        took = disk.write(fd, view, offset)
        if took <= 0:
            raise OSError(errno.EIO, "the disk took no bytes")
        view, offset = view[took:], offset + took
    return offset


def hash_of(
    disk: Disk, fd: int, buffer: memoryview, check: Callable[[], None] = lambda: None, *, start: int = 0, size: int | None = None,
    more: hashlib._Hash | None = None,
) -> str:  # fmt: skip
    """sha256 of an open file, or of `size` bytes from `start` on (of those that there are), read through `buffer`; `more` takes the bytes too.

    `check` is called before each read and may raise.
    """
    state, at = hashlib.sha256(), start
    while size is None or at < start + size:
        check()
        got = disk.read_into(fd, buffer if size is None else buffer[: min(len(buffer), start + size - at)], at)
        if not got:
            break
        for digest in (state, more) if more else (state,):
            digest.update(buffer[:got])
        at += got
    return state.hexdigest()
