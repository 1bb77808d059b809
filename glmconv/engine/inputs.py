"""The one door through which a source is read: regular files of one folder, by plain names, links not followed, changes noticed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from glmconv.errors import SourceError

OPEN_AT_ONCE = 128
HASHED = 4 << 20  # bytes at a time
NAME_LONGEST = 255  # bytes, as everywhere on Linux
FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK | os.O_CLOEXEC
DOWNLOAD = "Is the download complete?"
CHANGED = "Start again when nothing writes to the source."

# How the Hub's cache links (huggingface_hub, file_download.py and utils/_shared_blobs.py): a snapshot's file to a blob of its repository, and,
# since 2026, that blob to one that all repositories of the cache share.
#   CACHE/models--ORG--NAME/snapshots/COMMIT/FILE -> ../../blobs/ETAG
#   CACHE/models--ORG--NAME/blobs/ETAG            -> ../../blobs/AB/ABCD...   (64 hex digits)
SNAPSHOT = re.compile(r".*/([^/]+)/snapshots/[^/]+\Z", re.DOTALL)
REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.+", re.DOTALL)
BLOB = re.compile(r"blobs/([0-9A-Za-z][0-9A-Za-z._-]{0,127})\Z")
SHARED_BLOB = re.compile(r"\.\./\.\./blobs/(?P<folder>[0-9a-f]{2})/(?P<name>(?P=folder)[0-9a-f]{62})\Z")


def plain_name(name: str) -> bool:
    """One path component of 1 to 255 bytes without separators, control characters, `.` or `..`."""
    if name in ("", ".", "..") or "/" in name or "\\" in name:
        return False
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):  # control characters, and bytes that are no UTF-8
        return False
    return len(name.encode("utf-8")) <= NAME_LONGEST


@dataclass(frozen=True)
class Fingerprint:
    """By what a file is known to be the one that was opened."""

    size: int
    mtime_ns: int
    inode: int


def _fingerprint(found: os.stat_result) -> Fingerprint:
    return Fingerprint(found.st_size, found.st_mtime_ns, found.st_ino)


class InputFolder:
    """A folder of a source, itself perhaps given through a link. Files are opened relative to a descriptor held from the start.

    folders: the only folders inside it of which files may be named, as `folder/file`.
    """

    def __init__(self, root: Path, folders: tuple[str, ...] = ()) -> None:
        self.root = root
        self.folders = folders
        self.files: dict[str, InputFile] = {}
        self._lock = threading.Lock()
        self._fd = -1
        try:
            self._fd = os.open(root, FOLDER_FLAGS)
        except (OSError, ValueError) as problem:
            raise SourceError(f"cannot be opened: {_reason(problem)}.", file=root) from None
        self._descriptors = Descriptors()

    def names(self) -> list[str]:
        """All names in it but those of folders, sorted: links and pipes too, so that `open` says what is wrong with them.

        SourceError if one cannot be a file's name, or if two differ only by case or Unicode form.
        """
        try:
            with os.scandir(self._open_folder()) as entries:
                found = sorted(entry.name for entry in entries if not entry.name.startswith(".nfs") and not entry.is_dir(follow_symlinks=False))
        except OSError as problem:
            raise SourceError(f"cannot be listed: {_reason(problem)}.", file=self.root) from None
        folded: dict[str, str] = {}
        for name in found:
            if not plain_name(name):
                raise SourceError("holds a name with control characters, backslashes or bytes that are no UTF-8.", file=self.root / name)
            other = folded.setdefault(unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold()), name)
            if other != name:
                raise SourceError(f"is spelled {other} too: on some filesystems they are one file.", file=self.root / name, hint="Rename one.")
        return found

    def exists(self, name: str) -> bool:
        """Whether the name is taken, by anything, a link to nothing included. SourceError if that cannot be told."""
        *folder, name = self._components(name)
        try:
            with self._opened(folder) as fd:
                os.lstat(name, dir_fd=fd)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as problem:
            raise SourceError(f"cannot be looked at: {_reason(problem)}.", file=self.root / name) from None
        return True

    def open(self, name: str) -> InputFile:
        """A regular file. SourceError if it is missing, no plain name, a pipe, a device, a folder, or a link unlike the Hub cache's."""
        self._components(name)
        with self._lock:
            if name not in self.files:
                fd, fingerprint = self.open_descriptor(name)
                self.files[name] = InputFile(self, name, fingerprint)
                self._descriptors.add(name, fd)
                self._descriptors.close_surplus()
            return self.files[name]

    def open_descriptor(self, name: str) -> tuple[int, Fingerprint]:
        """A new descriptor of the regular file that now has this name."""
        *folder, last = self._components(name)
        path = self.root / name
        try:
            with self._opened(folder) as folder_fd:
                mode = os.lstat(last, dir_fd=folder_fd).st_mode  # looked at before it is opened: opening a device may do something
                _check_kind(mode, path)
                fd = self._open_link(folder_fd, last, len(folder), path) if stat.S_ISLNK(mode) else os.open(last, FLAGS, dir_fd=folder_fd)
        except FileNotFoundError:
            raise SourceError("is missing.", file=path, hint=DOWNLOAD) from None
        except OSError as problem:
            raise SourceError(f"cannot be opened: {_reason(problem)}.", file=path) from None
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            os.close(fd)
            raise SourceError("is not a file.", file=path)
        return fd, _fingerprint(found)

    def fingerprint_now(self, name: str) -> Fingerprint:
        """Of the regular file that now has this name; it is opened only if there is a folder or a link on the way."""
        if "/" not in name:
            with contextlib.suppress(OSError):
                found = os.lstat(name, dir_fd=self._open_folder())
                if stat.S_ISREG(found.st_mode):
                    return _fingerprint(found)
        fd, fingerprint = self.open_descriptor(name)
        os.close(fd)
        return fingerprint

    @contextlib.contextmanager
    def borrowed(self, file: InputFile) -> Iterator[int]:
        """A descriptor of the file, for this while. SourceError if it had to be opened again and is another file now."""
        with self._lock:
            fd = self._descriptors.take(file.name)
            if fd is None:
                fd, fingerprint = self.open_descriptor(file.name)
                if fingerprint != file.fingerprint:
                    os.close(fd)
                    raise SourceError("changed while it was read.", file=file.path, hint=CHANGED)
                self._descriptors.add(file.name, fd)
                self._descriptors.take(file.name)
        try:
            yield fd
        finally:
            with self._lock:
                self._descriptors.give_back(file.name)

    def check_unchanged(self) -> None:
        """SourceError if a file that was opened here is not the same any more."""
        for file in list(self.files.values()):
            file.check_unchanged()

    def close(self) -> None:
        """Close every descriptor. Nothing may be reading then, and nothing can be read any more."""
        with self._lock:
            if self._fd >= 0:
                self._descriptors.close()
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> InputFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # of a source that was refused halfway, nobody else does

    def _components(self, name: str) -> list[str]:
        parts = name.split("/")
        if not all(map(plain_name, parts)) or len(parts) > 2 or (len(parts) == 2 and parts[0] not in self.folders):
            raise SourceError(f"{name[:300]!r} cannot be the name of a file in it.", file=self.root)
        return parts

    def _open_folder(self) -> int:
        if self._fd < 0:
            raise ValueError(f"{self.root} is closed")
        return self._fd

    @contextlib.contextmanager
    def _opened(self, folder: list[str]) -> Iterator[int]:
        """The descriptor of the folder itself, or of one inside it while it is needed."""
        fd = self._open_folder()
        if not folder:
            yield fd
            return
        with _folder(folder[0], fd) as inner:
            yield inner

    def _open_link(self, folder_fd: int, name: str, depth: int, path: Path) -> int:
        """Follow a link as the Hub's cache makes them, one step at a time, each step checked to be one."""
        up = "../" * (2 + depth)
        target = os.readlink(name, dir_fd=folder_fd)
        blob = BLOB.match(target.removeprefix(up))
        snapshot = SNAPSHOT.match(os.path.realpath(f"/proc/self/fd/{self._fd}"))
        if not target.startswith(up) or blob is None or snapshot is None:
            raise SourceError("is a link; only the links inside the Hub's cache are followed.", file=path, hint="Put the file itself here.")
        with _folder(up + "blobs", folder_fd) as blobs:
            if not stat.S_ISLNK(os.lstat(blob[1], dir_fd=blobs).st_mode):
                return os.open(blob[1], FLAGS, dir_fd=blobs)
            shared = SHARED_BLOB.match(os.readlink(blob[1], dir_fd=blobs))
            if shared is None or not REPOSITORY.fullmatch(snapshot[1]):
                raise SourceError("is a link to a blob that is a link out of the Hub's cache.", file=path)
            with _folder(f"../../blobs/{shared['folder']}", blobs) as store:
                return os.open(shared["name"], FLAGS, dir_fd=store)


@dataclass
class Descriptors:
    """At most OPEN_AT_ONCE descriptors, the longest unused closed first, none while it is being read from. Its owner's lock guards it."""

    fds: OrderedDict[str, int] = field(default_factory=OrderedDict)
    readers: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, fd: int) -> None:
        self.fds[name] = fd

    def take(self, name: str) -> int | None:
        """The descriptor, which stays open until it is given back; None if there is none."""
        fd = self.fds.get(name)
        if fd is not None:
            self.fds.move_to_end(name)
            self.readers[name] = self.readers.get(name, 0) + 1
        return fd

    def give_back(self, name: str) -> None:
        self.readers[name] -= 1
        if not self.readers[name]:
            del self.readers[name]
        self.close_surplus()

    def close_surplus(self) -> None:
        surplus = len(self.fds) - OPEN_AT_ONCE
        if surplus > 0:
            for name in [name for name in self.fds if name not in self.readers][:surplus]:
                os.close(self.fds.pop(name))

    def close(self) -> None:
        for fd in self.fds.values():
            os.close(fd)
        self.fds.clear()


class InputFile:
    """A regular file of a source, read by ranges; any thread may read. It is what `fingerprint` says, or reading it raises SourceError."""

    def __init__(self, folder: InputFolder, name: str, fingerprint: Fingerprint) -> None:
        self.folder = folder
        self.name = name
        self.fingerprint = fingerprint

    @property
    def size(self) -> int:
        return self.fingerprint.size

    @property
    def path(self) -> Path:
        """For messages."""
        return self.folder.root / self.name

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; nothing is allocated for what the file does not have. SourceError if it ends before."""
        self._check_range(offset, size)
        parts: list[bytes] = []
        at, end = offset, offset + size
        with self.folder.borrowed(self) as fd:
            while at < end:
                with self._faults_at(at):
                    parts.append(os.pread(fd, end - at, at))
                at += self._progress(len(parts[-1]), at)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def digest(self, size: int | None = None) -> str:
        """sha256 of the first `size` bytes, or of all. SourceError as of `read`."""
        state, end = hashlib.sha256(), self.size if size is None else size
        for at in range(0, end, HASHED):
            state.update(self.read(at, min(HASHED, end - at)))
        return state.hexdigest()

    def read_into(self, offset: int, out: memoryview) -> None:
        """Fill `out` from `offset` on. SourceError if the file ends before, cannot be read, or was replaced."""
        out = out.cast("B")
        self._check_range(offset, len(out))
        done = 0
        with self.folder.borrowed(self) as fd:
            while done < len(out):
                with self._faults_at(offset + done):
                    got = os.preadv(fd, [out[done:]], offset + done)
                done += self._progress(got, offset + done)

    @contextlib.contextmanager
    def _faults_at(self, offset: int) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise SourceError(f"cannot be read: {_reason(problem)}.", file=self.path, offset=offset, hint="Is the disk faulty?") from None

    def _progress(self, got: int, at: int) -> int:
        if not got:
            raise SourceError("ends early: it was longer when it was opened.", file=self.path, offset=at, hint=CHANGED)
        return got

    def _check_range(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            what = f"ends early: {size:,} bytes from {offset:,} on are needed, it has {self.size:,}."
            raise SourceError(what, file=self.path, hint=DOWNLOAD)

    def check_unchanged(self) -> None:
        """SourceError unless the file of this name is still the one that was opened: size, modification time, inode."""
        if self.folder.fingerprint_now(self.name) != self.fingerprint:
            raise SourceError("changed while it was read.", file=self.path, hint=CHANGED)


@contextlib.contextmanager
def _folder(name: str, inside: int) -> Iterator[int]:
    """A folder's descriptor; a link in its place is an OSError."""
    fd = os.open(name, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=inside)
    try:
        yield fd
    finally:
        os.close(fd)


def _check_kind(mode: int, path: Path) -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device", stat.S_IFSOCK: "a socket"}
    if stat.S_IFMT(mode) in kinds:
        raise SourceError(f"is {kinds[stat.S_IFMT(mode)]}, not a file.", file=path)


def _reason(problem: OSError | ValueError) -> str:
    return problem.strerror or str(problem) if isinstance(problem, OSError) else str(problem)
