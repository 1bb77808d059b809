"""A disk in memory that forgets what was not synced: the same door as `glmconv.engine.files.Disk`, with power losses and errors at will.

The model is the weakest that POSIX allows and journalling filesystems have been seen to do:

- `sync` makes one file's data durable and says nothing of its names; `sync_folder` makes one folder's names durable and says nothing of the
  files behind them, nor of the folder's own name in its parent;
- a power loss keeps any subset of the un-synced names and, of un-synced data, all, nothing, zeros, or any 512-byte sectors;
- a rename is atomic: both of its halves are there or none;
- a failed `sync` drops the dirty pages and marks them clean: reading still shows them, a second `sync` succeeds, the disk never gets them unless
  they are written again;
- a failed `close` of a written file means that the server refused what was written through it, synced or not, as filesystems that store on
  close do.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from glmconv.engine.files import Disk, FileStatus
from tests.engine.aftermath import Change, Inode, Survivor, Twin, apply, choices

CHANGING = frozenset({"mkdir", "create", "share", "allocate", "write", "sync", "close", "sync_folder", "link", "rename", "unlink"})


class PowerLoss(BaseException):
    """The machine is gone. No `except Exception` may stop it; every later operation raises it again."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong at one operation, or from there on. `late`: the operation is done and then reported as failed, as over a network."""

    kinds: frozenset[str]
    code: int = errno.EIO
    at: int = 0  # counts operations of these kinds
    for_good: bool = False
    late: bool = False
    short: bool = False  # no error: a read or a write moves half of the bytes


class SimulatedDisk(Disk):
    """Counts its operations; the power goes before the changing operation number `crash_at`. Folders "/" and "/sim" are there from the start."""

    def __init__(self) -> None:
        self.changes = 0
        self.crash_at: int | None = None
        self.dead = False
        self.faults: tuple[Fault, ...] = ()
        self.seen: dict[int, int] = {}  # operations that each fault has counted
        self.struck = 0  # faults that happened
        self.kinds: list[str] = []
        self.lock = threading.RLock()
        self.numbers = itertools.count(2)
        self.open_files: dict[int, tuple[Inode, bool]] = {}
        self.descriptors = itertools.count(1000)
        self.written: dict[int, list[tuple[int, int]]] = {}  # by each descriptor
        self.free_bytes = 1 << 40
        self.root = Inode(1, names={})
        self.mkdir(Path("/sim"))
        self.sync_folder(Path("/"))
        self.changes = 0
        self.kinds.clear()

    # -- what happens at an operation ------------------------------------------------------------------------------------------------

    def _step(self, kind: str) -> Fault | None:
        """Count it; PowerLoss when its time has come; the fault that meets it, if that is late or short, else its error."""
        if self.dead:
            raise PowerLoss
        if kind in CHANGING:
            if self.changes == self.crash_at:
                self.dead = True
                raise PowerLoss
            self.changes += 1
            self.kinds.append(kind)
        for number, fault in enumerate(self.faults):
            if kind not in fault.kinds:
                continue
            seen = self.seen[number] = self.seen.get(number, -1) + 1
            if seen == fault.at or (fault.for_good and seen > fault.at):
                self.struck += 1
                if not (fault.late or fault.short):
                    raise OSError(fault.code, os.strerror(fault.code), kind)
                return fault
        return None

    @staticmethod
    def _late(fault: Fault | None) -> None:
        if fault is not None and fault.late:
            raise OSError(fault.code, os.strerror(fault.code), "after it was done")

    # -- names -----------------------------------------------------------------------------------------------------------------------

    def _find(self, path: str) -> Inode:
        """The inode behind an absolute path."""
        inode = self.root
        for part in path.split("/"):
            if part:
                if inode.names is None:
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
                found = inode.names.get(part)
                if found is None:
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
                inode = found
        return inode

    def _folder_of(self, path: Path) -> tuple[Inode, dict[str, Inode], str]:
        text = str(path)
        head, _, name = text.rpartition("/")
        folder = self._find(head)
        if folder.names is None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), text)
        return folder, folder.names, name

    def _free_name(self, path: Path) -> tuple[Inode, dict[str, Inode], str]:
        folder, names, name = self._folder_of(path)
        if name in names:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        return folder, names, name

    def _new(self, names: dict[str, Inode] | None = None) -> Inode:
        return Inode(next(self.numbers), names=names)

    @staticmethod
    def _put(folder: Inode, names: dict[str, Inode], name: str, inode: Inode) -> Change:
        names[name] = inode
        folder.mtime += 1
        change = Change(name, inode)
        folder.pending.append(change)
        return change

    # -- the door --------------------------------------------------------------------------------------------------------------------

    def mkdir(self, path: Path) -> None:
        with self.lock:
            late = self._step("mkdir")
            folder, names, name = self._free_name(path)
            self._put(folder, names, name, self._new({}))
            self._late(late)

    def create(self, path: Path) -> int:
        with self.lock:
            late = self._step("create")
            folder, names, name = self._free_name(path)
            inode = self._new()
            self._put(folder, names, name, inode)
            self._late(late)
            return self._descriptor(inode, writable=True)

    def open_shared(self, path: Path) -> int:
        with self.lock:
            late = self._step("share")
            folder, names, name = self._folder_of(path)
            inode = names.get(name)
            if inode is None:
                inode = self._new()
                self._put(folder, names, name, inode)
            if inode.names is not None:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            self._late(late)
            return self._descriptor(inode, writable=True)

    def allocate(self, fd: int, size: int) -> None:
        with self.lock:
            self._step("allocate")
            inode = self._inode(fd)
            begin = len(inode.data)
            if size > begin:
                inode.data.extend(bytes(size - begin))
                self._dirtied(inode, begin, size)

    def _descriptor(self, inode: Inode, *, writable: bool) -> int:
        fd = next(self.descriptors)
        self.open_files[fd] = (inode, writable)
        return fd

    def _inode(self, fd: int) -> Inode:
        found = self.open_files.get(fd)
        if found is None:
            raise PowerLoss if self.dead else OSError(errno.EBADF, os.strerror(errno.EBADF))
        return found[0]

    def write(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        with self.lock:
            short = self._step("write")
            inode = self._inode(fd)
            if not self.open_files[fd][1]:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            content = bytes(data)
            if short is not None and short.short:
                content = content[: (len(content) + 1) // 2]
            if offset > len(inode.data):
                self._dirtied(inode, len(inode.data), offset)
                inode.data.extend(bytes(offset - len(inode.data)))
            inode.data[offset : offset + len(content)] = content
            self._dirtied(inode, offset, offset + len(content))
            self.written.setdefault(fd, []).append((offset, offset + len(content)))
            inode.mtime += 1
            return len(content)

    @staticmethod
    def _dirtied(inode: Inode, begin: int, end: int) -> None:
        if inode.dirty and inode.dirty[-1][1] == begin:
            begin, _ = inode.dirty.pop()
        inode.dirty.append((begin, end))

    def sync(self, fd: int) -> None:
        with self.lock:
            inode = self._inode(fd) if not self.dead else self.root
            try:
                self._step("sync")
            except OSError:
                inode.dirty.clear()
                raise
            if not self.lies("sync", None):
                inode.durable = inode.reachable()
                inode.dirty.clear()

    def close(self, fd: int) -> None:
        with self.lock:
            inode, writable = self.open_files.pop(fd, (None, False))
            try:
                self._step("close" if writable else "close read")
            except OSError:
                if inode is not None and writable:  # Linux frees the descriptor all the same; what it wrote is lost
                    self._refused(inode, self.written.pop(fd, []))
                raise
            if inode is None:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    @staticmethod
    def _refused(inode: Inode, ranges: list[tuple[int, int]]) -> None:
        for begin, end in ranges:
            inode.data[begin:end] = bytes(end - begin)
            durable = bytearray(inode.durable)
            durable[begin:end] = bytes(max(0, min(end, len(durable)) - begin))
            inode.durable = bytes(durable)

    def sync_folder(self, path: Path) -> None:
        with self.lock:
            self._step("sync_folder")
            folder = self._find(str(path))
            if folder.names is None:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            if self.lies("sync_folder", path):
                return
            for change in folder.pending:
                apply(folder.durable_names, change)
            folder.pending.clear()

    def link(self, source: Path, target: Path) -> None:
        with self.lock:
            late = self._step("link")
            inode = self._find(str(source))
            folder, names, name = self._free_name(target)
            if inode.names is not None:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(source))
            inode.links += 1
            self._put(folder, names, name, inode)
            self._late(late)

    def rename(self, source: Path, target: Path) -> None:
        self._rename(source, target, replace=True)

    def rename_noreplace(self, source: Path, target: Path) -> None:
        self._rename(source, target, replace=False)

    def _rename(self, source: Path, target: Path, *, replace: bool) -> None:
        with self.lock:
            late = self._step("rename")
            old_folder, old_names, old_name = self._folder_of(source)
            folder, names, name = self._folder_of(target)
            inode = self._find(str(source))
            if not replace:
                self._free_name(target)
            replaced = names.get(name)
            if str(target).startswith(f"{source}/"):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(target))
            if replaced is inode:
                return  # POSIX: two names of one file, nothing happens
            if replaced is not None:
                self._check_replaceable(inode, replaced, target)
                replaced.links -= 1
            added = self._put(folder, names, name, inode)
            del old_names[old_name]
            old_folder.mtime += 1
            removed = Change(old_name, None, other_half=added)
            old_folder.pending.append(removed)
            self._late(late)

    @staticmethod
    def _check_replaceable(inode: Inode, replaced: Inode, target: Path) -> None:
        if inode.names is not None and replaced.names is None:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))
        if inode.names is None and replaced.names is not None:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if replaced.names:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(target))

    def unlink(self, path: Path) -> None:
        with self.lock:
            late = self._step("unlink")
            folder, names, name = self._folder_of(path)
            inode = self._find(str(path))
            if inode.names is not None:
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            inode.links -= 1
            del names[name]
            folder.mtime += 1
            folder.pending.append(Change(name, None))
            self._late(late)

    def open(self, path: Path) -> int:
        with self.lock:
            self._step("open")
            inode = self._find(str(path))
            if inode.names is not None:
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            return self._descriptor(inode, writable=False)

    def read_into(self, fd: int, out: memoryview, offset: int) -> int:
        with self.lock:
            short = self._step("read")
            data = self._inode(fd).data
            size = max(0, min(len(out), len(data) - offset))
            if short is not None and short.short:
                size = (size + 1) // 2
            out[:size] = data[offset : offset + size]
            return size

    def status(self, path: Path) -> FileStatus:
        with self.lock:
            self._step("status")
            return self._status_of_inode(self._find(str(path)))

    def status_of(self, fd: int) -> FileStatus:
        with self.lock:
            self._step("status")
            return self._status_of_inode(self._inode(fd))

    @staticmethod
    def _status_of_inode(inode: Inode) -> FileStatus:
        folder = inode.names is not None
        return FileStatus(len(inode.data), 1, inode.number, inode.mtime, inode.links, folder, not folder)

    def names(self, path: Path) -> list[str]:
        with self.lock:
            self._step("names")
            folder = self._find(str(path))
            if folder.names is None:
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
            return sorted(folder.names)

    def free(self, path: Path) -> int:
        return self.free_bytes

    def writable(self, path: Path) -> bool:
        return True

    @staticmethod
    def lies(kind: str, path: Path | None) -> bool:
        """Whether this sync says yes and does nothing: never, but a test may break it."""
        return False

    # -- for the tests: nothing here counts as an operation --------------------------------------------------------------------------

    def content(self, path: Path) -> bytes | None:
        """What a reader sees under a name; None if there is no such file."""
        try:
            inode = self._find(str(path))
        except OSError:
            return None
        return bytes(inode.data) if inode.names is None else None

    def listing(self, path: Path) -> list[str]:
        """The names in a folder; none if there is no such folder."""
        try:
            return sorted(self._find(str(path)).names or ())
        except OSError:
            return []

    def damage(self, path: Path, change: Callable[[bytearray], None]) -> None:
        """Change a file's bytes behind everyone's back, durably."""
        inode = self._find(str(path))
        change(inode.data)
        inode.durable = bytes(inode.data)
        inode.dirty.clear()

    def after_power_loss(self, rng: random.Random, outcome: str) -> SimulatedDisk:
        """The disk as the next boot finds it. `outcome` is one of OUTCOMES; this disk stays as it is, so that others can be drawn from it."""
        keep_data, keep_name = choices(rng, outcome)
        return self._image(Survivor(keep_data, keep_name).of(self.root))

    def after_kill(self) -> SimulatedDisk:
        """The disk as the next process finds it: nothing is lost, and nothing more is durable than before."""
        return self._image(Twin().of(self.root))

    def _image(self, root: Inode) -> SimulatedDisk:
        disk = SimulatedDisk.__new__(SimulatedDisk)
        disk.__dict__.update(self.__dict__)
        disk.changes, disk.crash_at, disk.dead, disk.faults, disk.seen, disk.struck = 0, None, False, (), {}, 0
        disk.kinds, disk.lock, disk.open_files, disk.written, disk.root = [], threading.RLock(), {}, {}, root
        return disk
