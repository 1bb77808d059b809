"""A worker's memory, and the bytes on their way through it into one file: hashed while they are hot in the cache, written once."""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from collections.abc import Callable

from glmconv.engine.commit import write_all
from glmconv.engine.files import Disk
from glmconv.engine.plan import Piece

PAGE = 4096


class Buffer:
    """One worker's memory: page-aligned, reused for every job. It grows only for a row that is larger than itself."""

    def __init__(self, size: int) -> None:
        self.view = aligned(size)
        self._second: memoryview | None = None
        self._lent: list[memoryview] = []
        self._next = 0

    def grow(self, size: int) -> None:
        self.view = aligned(size)

    def second(self, size: int) -> memoryview:
        """`size` bytes beside the buffer, for rows that are only compared."""
        if self._second is None or len(self._second) < size:
            self._second = aligned(max(size, len(self.view)))
        return self._second[:size]

    def lend(self, size: int) -> memoryview:
        """`size` bytes for a part that is held back, apart from all that was lent since the last `call_in`."""
        if self._next == len(self._lent):
            self._lent.append(aligned(size))
        elif len(self._lent[self._next]) < size:
            self._lent[self._next] = aligned(size)
        self._next += 1
        return self._lent[self._next - 1][:size]

    def call_in(self) -> None:
        """What was lent may be lent again."""
        self._next = 0


def aligned(size: int) -> memoryview:
    """`size` bytes, rounded up to pages, that begin at a page."""
    size = max(PAGE, -(-size // PAGE) * PAGE)
    memory = bytearray(size + PAGE)
    skip = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE
    return memoryview(memory)[skip : skip + size]


class Stream:
    """Bytes on their way into one staged file, from `start` on: gathered in the buffer, so that thousands of small pieces are one write."""

    def __init__(self, disk: Disk, fd: int, buffer: Buffer, wrote: Callable[[int], None], start: int = 0) -> None:
        self._disk, self._fd, self._buffer, self._wrote = disk, fd, buffer, wrote
        self._file = hashlib.sha256()
        self._piece: hashlib._Hash | None = None
        self._crc: int | None = None
        self._filled = self._absorbed = 0
        self._offset = start

    @property
    def at(self) -> int:
        """The offset in the file behind the bytes so far, the buffered ones included."""
        return self._offset + self._filled

    def begin(self, piece: Piece) -> None:
        """What follows is the piece's payload."""
        self._absorbed = self._filled
        self._piece = hashlib.sha256() if piece.digested else None
        self._crc = 0 if piece.frame else None

    def end(self) -> tuple[str, int]:
        """The payload's sha256 ("" if not asked for) and CRC-32 (0 if not asked for)."""
        self._absorb()
        result = (self._piece.hexdigest() if self._piece else "", self._crc or 0)
        self._piece = self._crc = None
        return result

    def put(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        while view:
            space = self.space(1)
            count = min(len(space), len(view))
            space[:count] = view[:count]
            self.took(count)
            view = view[count:]

    def space(self, unit: int) -> memoryview:
        """Free room in the buffer, at least `unit` bytes."""
        if len(self._buffer.view) - self._filled < unit:
            self.flush()
            if len(self._buffer.view) < unit:
                self._buffer.grow(unit)
        return self._buffer.view[self._filled :]

    def took(self, count: int) -> None:
        """`count` bytes of the last `space` are filled."""
        self._filled += count

    def flush(self) -> None:
        self._absorb()
        data = self._buffer.view[: self._filled]
        self._file.update(data)
        self._offset = write_all(self._disk, self._fd, data, self._offset)
        self._wrote(self._filled)
        self._filled = self._absorbed = 0

    def finish(self) -> str:
        """Write the rest; the sha256 of all bytes."""
        self.flush()
        return self._file.hexdigest()

    def _absorb(self) -> None:
        fresh = self._buffer.view[self._absorbed : self._filled]
        if self._piece:
            self._piece.update(fresh)
        if self._crc is not None:
            self._crc = zlib.crc32(fresh, self._crc)
        self._absorbed = self._filled
