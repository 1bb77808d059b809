"""Whether boxes tile a tensor exactly once, in n log n steps for every tiling that a checkpoint has."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from operator import itemgetter

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes
CUTS = 24  # how often pieces are cut again
PAIRS = 64  # boxes that no straight cut separates are compared one by one, up to so many


def problem(shape: Sequence[int], boxes: Sequence[Box]) -> str:
    """What is wrong with the tiling, or nothing. Boxes that lie inside, do not overlap, and whose volumes add up tile exactly."""
    rank = len(shape)
    for offsets, sizes in boxes:
        if len(offsets) != rank or len(sizes) != rank or any(o + n > whole for o, n, whole in zip(offsets, sizes, shape, strict=True)):
            return "has a chunk outside its shape"
    whole = math.prod(shape)
    volumes = [math.prod(sizes) for _, sizes in boxes]
    if sum(volumes) != whole or (whole and not all(volumes)):
        return "is not covered exactly once by its chunks"
    return "" if not whole or _disjoint(list(boxes), rank, CUTS) else "has chunks that overlap, or that no straight cuts separate"


def _disjoint(boxes: list[Box], rank: int, cuts: int) -> bool:
    """Separate the boxes by straight cuts across one axis after the other. Boxes that stay together in every axis are compared."""
    if len(boxes) < 2:
        return True
    for axis in range(rank):
        groups = list(_groups(boxes, axis))
        if len(groups) > 1:
            return cuts > 0 and all(_disjoint(group, rank, cuts - 1) for group in groups)
    if len(boxes) > PAIRS:
        return False
    return not any(_meet(box, other) for n, box in enumerate(boxes) for other in boxes[:n])


def _groups(boxes: list[Box], axis: int) -> Iterator[list[Box]]:
    """The boxes in groups whose extents along the axis do not overlap."""
    group: list[Box] = []
    end = 0
    for begin, size, box in sorted(((offsets[axis], sizes[axis], (offsets, sizes)) for offsets, sizes in boxes), key=itemgetter(0)):
        if group and begin >= end:
            yield group
            group = []
        group.append(box)
        end = max(end, begin + size)
    yield group


def _meet(a: Box, b: Box) -> bool:
    return all(o < p + m and p < o + n for o, n, p, m in zip(*a, *b, strict=True))
