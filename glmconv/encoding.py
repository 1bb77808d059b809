"""What an encoder is, between the codecs that offer one and the engine that drives it: rows in, the stored parts of one tensor out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol


class Encoding(Protocol):
    """An encoder at work on one tensor. Each method that is given rows returns the flat index of the first NaN or Inf among them, or -1."""

    def look(self, rows: memoryview) -> int: ...
    def encode(self, start: int, rows: memoryview, out: memoryview) -> int:
        """Rows from `start` on; the streamed part of them goes into `out`."""

    def part(self, number: int) -> memoryview:
        """A held part, once every row was encoded."""


class Encoder(Protocol):
    """Makes the stored parts of one tensor out of its canonical rows."""

    @property
    def id(self) -> str:
        """All that decides the bytes it makes."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The canonical tensor's."""

    @property
    def unit(self) -> int:
        """Rows are given in multiples of it, but for the last."""

    @property
    def row_bytes(self) -> int:
        """Bytes of part 0 that each row makes, if part 0 goes out as it is made; 0 if it is held like the other parts."""

    @property
    def looks(self) -> bool:
        """Whether all rows must be looked at once before the first is encoded."""

    @property
    def strict(self) -> bool:
        """Whether NaN or Inf is an error."""

    def begin(self, lend: Callable[[int], memoryview]) -> Encoding:
        """`lend` gives reused memory of so many bytes, of any content, that is good until the next `begin`."""
