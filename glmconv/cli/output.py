"""What a command prints: data to stdout, progress and messages to stderr, and nothing that fails when neither can be written."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from typing import TextIO

from glmconv.engine.queue import this_rank
from glmconv.errors import OutputError


def human(size: float) -> str:
    """Bytes in decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, and never let a full disk or a closed pipe change the exit code."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=stream or sys.stderr, flush=True)


@dataclass(frozen=True)
class Output:
    """How a command speaks. `progress` is one of auto, bar, plain, none."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    progress: str = "auto"

    def data(self, text: str) -> None:
        """The command's answer. OutputError if there is no room for it; a reader that has seen enough is no error."""
        try:
            with contextlib.suppress(BrokenPipeError):
                print(text, flush=True)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}.", file="stdout") from error

    def json_data(self, value: object) -> None:
        plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
        self.data(json.dumps(finite(plain), indent=2, default=str, allow_nan=False))

    def note(self, text: str) -> None:
        if not self.quiet:
            say(text)

    def detail(self, text: str) -> None:
        if self.verbose:
            say(text)

    @contextlib.contextmanager
    def bar(self, title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
        """(started(total bytes), progress(bytes done)) of one job: bytes, rate and time left on stderr."""
        kind = self.progress
        if kind == "auto":
            kind = "bar" if sys.stderr and sys.stderr.isatty() else "none"
        if self.quiet or kind == "none" or not sys.stderr or this_rank() != 0:  # Python has no stderr where it was closed
            yield (lambda total: None), (lambda done: None)
            return
        from tqdm import tqdm

        plain = kind == "plain"
        with tqdm(
            total=0, desc=title, unit="B", unit_scale=True, ascii=plain or "NO_COLOR" in os.environ, mininterval=5 if plain else 0.1,
            file=sys.stderr, leave=plain,
        ) as bar:  # fmt: skip

            def started(total: int) -> None:
                bar.total = (bar.total or 0) + total  # of one output after another
                bar.refresh()

            def progress(done: int) -> None:
                bar.update(done)

            yield started, progress


def finite(value: object) -> object:
    """The value with null for every number that JSON has no word for."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def table(rows: Sequence[tuple[str, ...]], head: tuple[str, ...] = ()) -> str:
    """Columns padded with blanks; numbers are the caller's to format."""
    every = [head, *rows] if head else rows
    widths = [max(len(row[n]) for row in every) for n in range(len(every[0]))] if every else []
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in every)
