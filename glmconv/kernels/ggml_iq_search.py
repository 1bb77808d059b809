"""The search of ggml's types IQ2 and IQ3: sub-blocks of magnitudes as points of a codebook times a scale.

Sixteen scales are tried at once, one in each lane; where a group's codes are no point, sixteen points near are weighed at once. A lane's sums run in
the order of ggml's scalar loops, so the bits are ggml's. Where ggml would abort (it finds no point, or a scale is NaN), the scale is NaN.
Source: ggml-quants.c of libggml 0.25.3 (quantize_row_iq2_*_impl, quantize_row_iq3_*_impl, iq2_find_best_neighbour, iq3_find_best_neighbour).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from glmconv.kernels.floats import f32, i32, u8, u32
from glmconv.kernels.ggml_search import nearest, positive, squares
from glmconv.kernels.jit import inner
from glmconv.kernels.lanes import LANES, least, load, nibbles, roots, splat, store, whole

NOTHING = 0x7F7F_FFFF << 16  # a distance must be below the greatest float32
LOST = np.float32(np.nan)
MISSED, ANY_MISSED, ALWAYS = 0, 1, 2  # groups that are looked for again with the final scale: those that were no points; all if one was none; all
EVERY = (1 << 8) - 1


class Found(NamedTuple):
    """Of one super-block."""

    scales: Any  # float32 [16], of sub-blocks
    codes: Any  # uint8 [16], what is stored of the scales
    live: Any  # uint8 [16], whether a sub-block was searched at all
    signs: Any  # uint8 [32], of eight values each
    points: Any  # int32 [64], numbers of points


class Scratch(NamedTuple):
    """Of one sub-block of up to 32 values."""

    x: Any  # float32 [32], magnitudes
    w: Any  # float32 [32], weights
    r: Any  # float32 [32], their roots
    c: Any  # float32 [32], what is found: odd numbers that times the scale stand for the magnitudes
    t: Any  # float32 [64, LANES], the same of each scale that is tried
    keys: Any  # float32 [8, LANES]
    lines: Any  # float32 [8, LANES]: the tries' factors, scales and two sums, of two times LANES
    missed: Any  # int32 [32], of each scale that is tried the groups that are no points, as bits
    codes: Any  # uint8 [32]


@inner
def scratch() -> Any:
    x, w, r, c = np.ones(32, f32), np.ones(32, f32), np.ones(32, f32), np.ones(32, f32)
    t, keys, lines = np.empty((64, LANES), f32), np.empty((8, LANES), f32), np.empty((8, LANES), f32)
    return Scratch(x, w, r, c, t, keys, lines, np.zeros(32, i32), np.zeros(32, u8))


@inner
def found() -> Any:
    return Found(np.zeros(16, f32), np.zeros(16, u8), np.zeros(16, u8), np.zeros(32, u8), np.zeros(64, i32))


@inner
def search(book: Any, s: Any, f: Any, rule: Any, block: Any, importance: Any) -> Any:
    """Fills `f`, by a Rule of ggml_iq23.py; returns the super-block's scale, NaN if it has none."""
    n, signs = rule.n, f.signs
    mean = rule.spread * squares(block) / f32(256)
    f.points[:] = 0
    f.scales[:] = f32(0)
    for j in range(256 // n):
        _weigh(block, importance, j * n, mean, rule, s)
        _fold(block[j * n : (j + 1) * n], s.x, s.w, rule.even, signs[n // 8 * j :])
        _sub_block(book, s, f, rule, j)
        if not f.live[j]:
            signs[n // 8 * j : n // 8 * (j + 1)] = 0
    return share(f.scales, 256 // n, 31, f.codes)[0]


@inner
def _weigh(block: Any, importance: Any, at: int, mean: Any, rule: Any, s: Any) -> None:
    """Weights of the sub-block at `at`, and their roots."""
    w, r = s.w, s.r
    for row in range(rule.n // LANES):
        v = load(block, at // LANES + row)
        weight = v * v
        if len(importance):
            weight = load(importance, at // LANES + row) * roots(mean + v * v)
        elif rule.floor:
            weight = rule.floor * mean + v * v
        store(w, row, weight)
        store(r, row, roots(weight))


@inner
def _fold(values: Any, x: Any, w: Any, even: bool, signs: Any) -> None:
    """Signs, eight in a byte, and magnitudes. Even: of an odd number of signs the one that matters least is turned, its value then negative."""
    for k in range(0, len(values), 8):
        sign, count = 0, 0
        for i in range(8):
            v = values[k + i]
            minus = 0 if v >= f32(0) else 1
            x[k + i] = -v if minus else v
            sign |= minus << i
            count += minus
        if even and count & 1:
            turned = _lightest(x, w, k)
            x[turned] = -x[turned]
            sign ^= 1 << turned - k
        signs[k // 8] = sign & 127 if even else sign


@inner
def _lightest(x: Any, w: Any, at: int) -> Any:
    """Of eight values from `at` on the place of the first whose loss is the least."""
    place, low = at, w[at] * x[at] * x[at]
    for i in range(at + 1, at + 8):
        loss = w[i] * x[i] * x[i]
        if loss < low:
            place, low = i, loss
    return place


@inner
def _sub_block(book: Any, s: Any, f: Any, rule: Any, j: int) -> None:
    """Values in `s.x` and `s.w` to the scale and points of sub-block j."""
    x, n = s.x, rule.n
    top = x[0]
    for i in range(1, n):
        top = top if top > x[i] else x[i]
    f.live[j] = 0
    if top < rule.least:
        return
    scale = top / f32(2 * rule.levels - 1)
    if rule.how == ALWAYS:
        scale = positive(x, s.w, n, rule.levels + 1, s.codes)
        top = scale * f32(rule.levels)
        if top <= f32(0):
            return
    scale = _fit(book, s, rule, top, scale)
    f.live[j] = 1
    if scale < f32(0):
        scale = -scale
        for k in range(n // 8 * j, n // 8 * (j + 1)):
            f.signs[k] ^= 127 if rule.even else 255
    f.scales[j] = scale
    _number(book[0], s.c, rule, f.points[n // rule.dimensions * j :])


@inner
def _number(own: Any, c: Any, rule: Any, points: Any) -> None:
    """The numbers of a sub-block's points."""
    for k in range(rule.n // rule.dimensions):
        key = i32(0)
        for i in range(rule.dimensions - 1, -1, -1):
            key = key * rule.levels + i32(c[k * rule.dimensions + i]) // 2
        points[k] = own[key]


@inner
def _fit(book: Any, s: Any, rule: Any, top: Any, scale: Any) -> Any:
    """The scale, signed or NaN, with the values in `s.c`; the scale given if no try is better than nothing."""
    n, c, t, lines = rule.n, s.c, s.t, s.lines
    if not _try(book, s, rule, top):
        return LOST
    best, chosen = f32(0), -1
    for k in range(rule.tries):
        qx, q2 = lines[4 + k // LANES, k % LANES], lines[6 + k // LANES, k % LANES]
        if q2 > f32(0) and qx * qx > best * q2:
            scale = qx / q2
            best, chosen = scale * qx, k
    for i in range(n):
        c[i] = t[chosen // LANES * n + i, chosen % LANES] if chosen >= 0 else f32(1)
    groups = EVERY if rule.how == ANY_MISSED else 0
    if chosen >= 0:
        groups = s.missed[chosen]
        if rule.how == ANY_MISSED and groups:
            groups = EVERY
    if rule.how == ALWAYS:
        groups = EVERY
    return _again(book, s, rule, scale, groups) if groups and scale > f32(0) else scale


@inner
def _try(book: Any, s: Any, rule: Any, top: Any) -> bool:
    """Values with each scale that is tried, to `s.t` and `s.missed`; their sums to `s.lines`. Whether all are points."""
    n, lines = rule.n, s.lines
    for batch in range((rule.tries + LANES - 1) // LANES):
        for lane in range(LANES):
            steps = batch * LANES + lane - rule.tries // 2
            lines[batch, lane] = (f32(2 * rule.levels - 1) + f32(steps) * rule.step) / top
        store(lines, 2 + batch, f32(1) / load(lines, batch))
        _round(s, rule, load(lines, batch), batch)
        if not _snap(book, s, rule, batch):
            return False
        _sum(s.x, s.w, s.t, n, batch, lines)
    return True


@inner
def _round(s: Any, rule: Any, factor: Any, batch: int) -> None:
    """Each value for itself to the nearest level, and each group's key."""
    x, t, keys = s.x, s.t, s.keys
    for k in range(rule.n // rule.dimensions):
        key = splat(f32(0))
        for i in range((k + 1) * rule.dimensions - 1, k * rule.dimensions - 1, -1):
            code = whole(f32(0.5) * (factor * x[i] - f32(1)), 0, rule.levels - 1)
            store(t, batch * rule.n + i, code + code + f32(1))
            key = key * f32(rule.levels) + code
        store(keys, k, key)


@inner
def _snap(book: Any, s: Any, rule: Any, batch: int) -> bool:
    """Groups that are no points to the points that are nearest; whether there are such."""
    own, first, near, x, r, t, keys, lines, missed = book[0], book[1], book[2], s.x, s.r, s.t, s.keys, s.lines, s.missed
    for lane in range(min(LANES, rule.tries - batch * LANES)):
        gone = 0
        for k in range(rule.n // rule.dimensions):
            key = i32(keys[k, lane])
            if own[key] < 0:
                point = _point(first, near, key, lines[2 + batch, lane], x, r, k * rule.dimensions, rule.dimensions)
                if not point:
                    return False
                gone |= 1 << k
                for j in range(rule.dimensions):
                    t[batch * rule.n + k * rule.dimensions + j, lane] = f32(i32(point >> u32(4 * j)) & 15)
        missed[batch * LANES + lane] = gone
    return True


@inner
def _sum(x: Any, w: Any, t: Any, n: int, batch: int, lines: Any) -> None:
    qx, q2 = splat(f32(0)), splat(f32(0))
    for i in range(n):
        c = load(t, batch * n + i)
        qx += w[i] * x[i] * c
        q2 += w[i] * c * c
    store(lines, 4 + batch, qx)
    store(lines, 6 + batch, q2)


@inner
def _point(first: Any, near: Any, key: Any, scale: Any, x: Any, r: Any, at: int, dimensions: int) -> Any:
    """Of the points near a key the first one that times the scale is nearest to the values from `at` on; 0 if there is none."""
    best = NOTHING
    for row in range(first[key], first[key + 1]):
        total = splat(f32(0))
        for j in range(4):
            e = scale * nibbles(near, row, 4 * j) - x[at + j]
            total += r[at + j] * e * e
        if dimensions == 8:
            for j in range(4, 8):
                e = scale * nibbles(near, row, 4 * j) - x[at + j]
                total += r[at + j] * e * e
        best = min(best, least(total) + (row - first[key]) * LANES)
    place = best & 0xFFFF
    return near[first[key] + place // LANES, place % LANES] if best < NOTHING else u32(0)


@inner
def _again(book: Any, s: Any, rule: Any, scale: Any, groups: int) -> Any:
    """Some groups looked for once more with the scale found; the scale that then fits best, the old one if all weights are 0."""
    x, w, c, factor = s.x, s.w, s.c, f32(1) / scale
    for k in range(rule.n // rule.dimensions):
        if groups >> k & 1:
            key = i32(0)
            for i in range((k + 1) * rule.dimensions - 1, k * rule.dimensions - 1, -1):
                code = max(min(nearest(f32(0.5) * (factor * x[i] - f32(1))), i32(rule.levels - 1)), i32(0))
                c[i] = f32(2 * code + 1)
                key = key * rule.levels + code
            if book[0][key] < 0:
                point = _point(book[1], book[2], key, scale, x, s.r, k * rule.dimensions, rule.dimensions)
                if not point:
                    return LOST
                for j in range(rule.dimensions):
                    c[k * rule.dimensions + j] = f32(i32(point >> u32(4 * j)) & 15)
    qx, q2 = f32(0), f32(0)
    for i in range(rule.n):
        qx += w[i] * x[i] * c[i]
        q2 += w[i] * c[i] * c[i]
    return qx / q2 if q2 > f32(0) else scale


@inner
def share(scales: Any, n: int, most: int, codes: Any) -> Any:
    """Scales as (2 * code + 1) * d, no code above most / 2; (d, the greatest scale), NaN if one is."""
    top = f32(0)
    for i in range(n):
        top = top if top > scales[i] else scales[i]
        if not scales[i] >= f32(0):
            return LOST, LOST
    d = top / f32(most)
    factor = f32(1) / d
    for i in range(n):
        codes[i] = max(min(nearest(f32(0.5) * (factor * scales[i] - f32(1))), i32(most // 2)), i32(0))
    return d, top
