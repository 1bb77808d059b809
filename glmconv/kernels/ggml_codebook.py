"""ggml's codebooks as its searches need them: which point stands where all codes of a group are allowed, and which points lie near where none stands.

A group's codes (levels 0, 1, 2, ... of each coordinate) make one number, its key: the first code counts 1, the next `levels`, and so on. Points near
a key are those at the least distances from it, ordered by distance and then by number; how many different distances count is each codebook's own.
Source: ggml-quants.c of libggml 0.25.3 (iq2xs_init_impl, iq3xs_init_impl).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmconv.kernels import ggml_grids
from glmconv.kernels.floats import Array
from glmconv.kernels.lanes import LANES

Book = tuple[Array, Array, Array, Array]  # own int16 [keys], first int32 [keys + 1], near uint32 [rows, LANES], points uint32 [count]

DISTANCES = {"IQ2_XXS": 2, "IQ2_XS": 2, "IQ2_S": 1, "IQ1": 3, "IQ3_XXS": 2, "IQ3_S": 3}


@cache
def codebook(name: str) -> Book:
    """Tables of one of ggml_grids' codebooks.

    own:    the number of the point at a key, or -1
    first:  where the rows of the points near a key begin; none where a point stands
    near:   those points, each as in `points`; a key's last row is filled up with its last point
    points: all points by number, four bits a coordinate, the first coordinate lowest: 2 * code + 1, of IQ1 code + 1
    """
    grid = getattr(ggml_grids, name)
    levels = len(grid.levels)
    codes: NDArray[np.int64] = np.searchsorted(np.array(grid.levels, np.float32), ggml_grids.points(grid))
    powers = levels ** np.arange(grid.dimensions)
    own = np.full(levels**grid.dimensions, -1, np.int16)
    own[codes @ powers] = np.arange(len(codes))
    bare = np.flatnonzero(own < 0)
    row, point = _nearest((bare[:, None] // powers % levels), codes, DISTANCES[name])
    values = codes + 1 if name == "IQ1" else 2 * codes + 1
    packed = (values << 4 * np.arange(grid.dimensions)).sum(axis=1).astype(np.uint32)
    counts = np.zeros(len(own), np.int64)
    counts[bare] = np.bincount(row, minlength=len(bare))
    first = np.zeros(len(own) + 1, np.int32)
    np.cumsum(-(-counts // LANES), out=first[1:])
    return own, first, _in_rows(packed[point], counts, first), packed


def _nearest(places: Array, points: Array, distances: int) -> tuple[Array, Array]:
    """(numbers of places, numbers of points): for each place the points at the `distances` least distances, nearest first."""
    a, b = places.astype(np.float32), points.astype(np.float32)
    squares = (a * a).sum(axis=1)[:, None] + (b * b).sum(axis=1) - 2 * (a @ b.T)  # small integers: exact
    most = squares.min(axis=1)
    for _ in range(distances - 1):
        most = np.where(squares > most[:, None], squares, np.inf).min(axis=1)
    row, point = np.nonzero(squares <= most[:, None])
    order = np.lexsort((point, squares[row, point], row))
    return row[order], point[order]


def _in_rows(packed: Array, counts: Array, first: Array) -> Any:
    """The points of each key from a new row on."""
    places = np.repeat(first[:-1].astype(np.int64) * LANES - (np.cumsum(counts) - counts), counts) + np.arange(len(packed))
    near = np.zeros(int(first[-1]) * LANES, np.uint32)
    near[places] = packed
    filled = np.zeros(len(near), np.int64)
    filled[places] = places
    near = near[np.maximum.accumulate(filled)]
    return near.reshape(-1, LANES)
