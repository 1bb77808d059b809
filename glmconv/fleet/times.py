"""How long a conversion takes at the least, from what disks and links carry. Moving bytes is all that a conversion to bfloat16 does."""

from __future__ import annotations

from dataclasses import dataclass

from glmconv.convert import Summary


@dataclass(frozen=True)
class Expected:
    """Seconds that each part of the way needs by itself; they overlap, so the longest of them, `seconds`, is what to expect at the least.

    `storage`: all that is read and written, at the rate of the storage as a whole; None if that is not known.
    `link`: what the fullest node reads or writes, whichever is more, at the rate of its link each way; None if that is not known.
    """

    seconds: float
    storage: float | None
    link: float | None
    node_bytes_read: int
    node_bytes_written: int


def expected_time(summary: Summary, ranks_per_node: int, *, disk_rate: int | None = None, network_rate: int | None = None) -> Expected | None:
    """The rates in bytes a second: `disk_rate` of the storage that all nodes share, `network_rate` of one node's link. None if neither is known."""
    if disk_rate is None and network_rate is None:
        return None
    loads = [rank["bytes"] for rank in summary.ranks]
    fullest = max(sum(loads[at : at + ranks_per_node]) for at in range(0, len(loads), ranks_per_node))
    read = round(summary.bytes_read * fullest / sum(loads)) if sum(loads) else 0
    storage = (summary.bytes_read + summary.bytes_written) / disk_rate if disk_rate else None
    link = max(read, fullest) / network_rate if network_rate else None
    return Expected(max(storage or 0.0, link or 0.0), storage, link, read, fullest)


def in_words(seconds: float) -> str:
    """1 h 36 min, 12 min, 40 s."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
