"""The one door through which glmconv changes a disk, so that tests can put a simulated one behind it and crash it at every step.

Every method does one system call (or one retried loop of it) and raises the plain `OSError` of that call; what an error means is
decided by the callers. Paths are absolute. No `mmap`, no `io_uring`: their faults are signals, and their crashes cannot be replayed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

RENAME_NOREPLACE = 1
AT_FDCWD = -100


@dataclass(frozen=True)
class FileStatus:
    """What `fstat` says of a regular file or a folder: enough to recognise it again."""

    size: int
    device: int
    inode: int
    mtime_ns: int
    links: int
    folder: bool
    regular: bool


class Disk:
    """The real disk. Descriptors are plain integers; a simulated disk hands out its own."""

    def mkdir(self, path: Path) -> None:
        """Make one folder. FileExistsError if the name is taken."""
        os.mkdir(path)

    def create(self, path: Path) -> int:
        """A new file, opened for writing and reading; FileExistsError if the name is taken, whatever it is. Mode 0666 less the umask."""
        return os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def open_shared(self, path: Path) -> int:
        """The file for writing and reading, made if it is not there, kept as it is if it is. A symlink is an OSError (ELOOP)."""
        return os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)

    def allocate(self, fd: int, size: int) -> None:
        """Reserve the file's `size` bytes, those that are there unchanged: OSError(ENOSPC) now and not hours later.

        Not `posix_fallocate`, which writes zeros where the filesystem has no such thing, perhaps over what another node has just written.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "fallocate64"):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if libc.fallocate64(fd, 0, ctypes.c_int64(0), ctypes.c_int64(size)):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def write(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        """One `pwrite`; returns how many bytes it took, which may be fewer than given."""
        return os.pwrite(fd, data, offset)

    def sync(self, fd: int) -> None:
        """Make the file's data durable. After an error the data is gone from the cache: never sync the same descriptor again, rewrite the file."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def sync_folder(self, path: Path) -> None:
        """Make the folder's names durable."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def link(self, source: Path, target: Path) -> None:
        """Give the file a second name. FileExistsError if the name is taken: a link never overwrites."""
        os.link(source, target, follow_symlinks=False)

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing what was there."""
        os.rename(source, target)

    def rename_noreplace(self, source: Path, target: Path) -> None:
        """Rename without overwriting, for filesystems that have no hard links. OSError(ENOSYS or EINVAL) where the system cannot."""
        libc = ctypes.CDLL(None, use_errno=True)
        if not hasattr(libc, "renameat2"):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(target))
        if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(target))

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def open(self, path: Path) -> int:
        """Open a file of the output for reading; a symlink or anything but a regular file is an OSError (ELOOP, EINVAL)."""
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return fd

    def read_into(self, fd: int, out: memoryview, offset: int) -> int:
        """One `pread` into `out`; 0 at the end of the file."""
        return os.preadv(fd, [out], offset)

    def status(self, path: Path) -> FileStatus:
        """Of the name itself, links not followed. FileNotFoundError if there is none."""
        return self._status(os.lstat(path))

    def status_of(self, fd: int) -> FileStatus:
        return self._status(os.fstat(fd))

    def names(self, path: Path) -> list[str]:
        """The names in a folder, sorted."""
        return sorted(os.listdir(path))

    def free(self, path: Path) -> int:
        """Bytes that may still be written below `path`."""
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize

    def writable(self, path: Path) -> bool:
        """Whether names can be made in the folder, as far as permissions and read-only mounts tell."""
        with contextlib.suppress(OSError):
            return os.access(path, os.W_OK | os.X_OK) and not os.statvfs(path).f_flag & os.ST_RDONLY
        return False

    @staticmethod
    def _status(found: os.stat_result) -> FileStatus:
        return FileStatus(
            found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_nlink, stat.S_ISDIR(found.st_mode), stat.S_ISREG(found.st_mode)
        )
