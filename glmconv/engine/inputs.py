"""The one door through which a source is read: regular files of one folder, by plain names, links not followed, changes noticed."""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
import unicodedata
from collections import OrderedDict
from pathlib import Path

from glmconv.errors import SourceError

OPEN_AT_ONCE = 128
BLOB = re.compile(r"^\.\./\.\./blobs/[0-9A-Za-z._-]{1,128}$")
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def plain_name(name: str) -> bool:
    """One path component of 1 to 255 bytes without separators, control characters, `.` or `..`."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or len(os.fsencode(name)) > 255:
        return False
    return all(ord(c) >= 32 and ord(c) != 127 for c in name) and not any("\ud800" <= c <= "\udfff" for c in name)


class InputFolder:
    """A folder of a source. Files are opened relative to a descriptor held from the start, so that nobody can put another folder in its place."""

    def __init__(self, root: Path) -> None:
        self.root = root
        try:
            self._fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as problem:
            raise SourceError(f"cannot be opened: {problem.strerror}.", file=root) from None
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, int] = OrderedDict()
        self._busy: dict[int, int] = {}
        self.files: dict[str, InputFile] = {}

    def names(self) -> list[str]:
        """The names of the regular files in it (and of the Hub cache's links to them), sorted. SourceError if two differ only by case or Unicode form."""
        try:
            found = sorted(entry.name for entry in os.scandir(self._fd) if self._is_file(entry))
        except OSError as problem:
            raise SourceError(f"cannot be listed: {problem.strerror}.", file=self.root) from None
        folded: dict[str, str] = {}
        for name in found:
            other = folded.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
            if other != name:
                raise SourceError(f"{name!r} and {other!r} are the same name on some filesystems.", file=self.root, hint="Rename one of them.")
        return found

    def _is_file(self, entry: os.DirEntry[str]) -> bool:
        if entry.name.startswith(".nfs"):
            return False
        return entry.is_file(follow_symlinks=False) or (entry.is_symlink() and not entry.is_dir()) or not (entry.is_dir() or entry.is_symlink())

    def exists(self, name: str) -> bool:
        """Whether the name is taken, by anything."""
        if not plain_name(name):
            return False
        try:
            os.lstat(name, dir_fd=self._fd)
        except OSError:
            return False
        return True

    def open(self, name: str) -> InputFile:
        """A regular file by its name. SourceError if it is missing, no plain name, a link that leaves the Hub's cache, a pipe or a device."""
        if not plain_name(name):
            raise SourceError(f"{name!r} is no plain file name.", file=self.root)
        with self._lock:
            if name in self.files:
                return self.files[name]
            fd = self._open(name)
            self._descriptors[name] = fd
            self._busy[fd] = 1
            found = self.files[name] = InputFile(self, name, os.fstat(fd))
            self._release(name, fd)
            return found

    def _open(self, name: str) -> int:
        try:
            fd = os.open(name, FLAGS, dir_fd=self._fd)
        except OSError as problem:
            if problem.errno == errno.ELOOP:
                fd = self._open_link(name)
            elif problem.errno == errno.ENOENT:
                raise SourceError("is missing.", file=self.root / name, hint="Is the download complete?") from None
            else:
                raise SourceError(f"cannot be opened: {problem.strerror}.", file=self.root / name) from None
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise SourceError("is no regular file.", file=self.root / name)
        return fd

    def _open_link(self, name: str) -> int:
        """The Hub's cache links snapshots/COMMIT/FILE to ../../blobs/HASH of the same repository; no other link is followed."""
        target = os.readlink(name, dir_fd=self._fd)
        parents = Path(os.path.realpath(f"/proc/self/fd/{self._fd}"))
        if not BLOB.match(target) or parents.parent.name != "snapshots":
            raise SourceError("is a symbolic link; links are followed only inside the Hub's cache.", file=self.root / name, hint="Put the file itself here.")
        try:
            return os.open(target, FLAGS, dir_fd=self._fd)
        except OSError as problem:
            raise SourceError(f"links to a blob that cannot be opened: {problem.strerror}.", file=self.root / name) from None

    def borrow(self, name: str) -> int:
        """A descriptor of the file, to be given back with `give_back`; the least used ones are closed beyond OPEN_AT_ONCE."""
        with self._lock:
            fd = self._descriptors.get(name)
            if fd is None:
                fd = self._open(name)
                self._descriptors[name] = fd
            self._descriptors.move_to_end(name)
            self._busy[fd] = self._busy.get(fd, 0) + 1
            return fd

    def give_back(self, name: str, fd: int) -> None:
        with self._lock:
            self._release(name, fd)

    def _release(self, name: str, fd: int) -> None:
        self._busy[fd] -= 1
        if len(self._descriptors) > OPEN_AT_ONCE:
            for other, idle in list(self._descriptors.items()):
                if not self._busy.get(idle):
                    del self._descriptors[other]
                    self._busy.pop(idle, None)
                    os.close(idle)
                    break

    def check_unchanged(self) -> None:
        """SourceError if any file that was opened is no longer the same: size, modification time, inode."""
        for file in list(self.files.values()):
            file.check_unchanged()

    def status(self, name: str) -> os.stat_result:
        try:
            found = os.lstat(name, dir_fd=self._fd)
            return os.stat(name, dir_fd=self._fd) if stat.S_ISLNK(found.st_mode) else found
        except OSError:
            raise SourceError("is gone; it was there when the run began.", file=self.root / name) from None

    def close(self) -> None:
        with self._lock:
            for fd in self._descriptors.values():
                os.close(fd)
            self._descriptors.clear()
            self._busy.clear()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1


class InputFile:
    """A regular file of a source, read by ranges with `pread`; any thread may read."""

    def __init__(self, folder: InputFolder, name: str, found: os.stat_result) -> None:
        self.folder = folder
        self.name = name
        self.size = found.st_size
        self.identity = _identity(found)

    @property
    def path(self) -> Path:
        return self.folder.root / self.name

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`. SourceError if the file ends before."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise SourceError(f"ends at byte {self.size:,}; {size:,} more are needed from {offset:,}.", file=self.path, hint="Is it cut off? Download it again.")
        out = bytearray(size)
        self.read_into(offset, memoryview(out))
        return bytes(out)

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on. SourceError if the file ends before or cannot be read."""
        fd = self.folder.borrow(self.name)
        try:
            done = 0
            while done < len(out):
                got = os.preadv(fd, [out[done:]], offset + done)
                if got == 0:
                    raise SourceError(f"ends after {offset + done:,} bytes; more were there when it was opened.", file=self.path, hint="Download it again.")
                done += got
        except OSError as problem:
            raise SourceError(f"cannot be read: {problem.strerror}.", file=self.path, offset=offset, hint="Is the disk faulty?") from None
        finally:
            self.folder.give_back(self.name, fd)

    def check_unchanged(self) -> None:
        if _identity(self.folder.status(self.name)) != self.identity:
            raise SourceError("changed while it was read.", file=self.path, hint="Start again when nothing writes to the source.")


def _identity(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
