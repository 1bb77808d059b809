"""The search of ggml's types IQ2 and IQ3: sub-blocks of magnitudes as points of a codebook times a scale.

Sixteen scales are tried at once, one in each lane; where a group's codes are no point, sixteen points near are weighed at once. A lane's sums run in the
order of ggml's scalar loops, so the bits are ggml's. Where ggml would abort (it finds no point, or a scale is NaN), the scale is NaN.
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
MISSED, ANY_MISSED, ALWAYS = 0, 1, 2  # which groups are looked for once more with the final scale: those that were no points, all if one was none, all


class Rule(NamedTuple):
    """How a type's super-blocks of 256 values are searched. Numbers with a point are float32."""

    n: int  # values of a sub-block, which have a scale
    even: bool  # whether an eighth sign is told by seven others
    least: Any  # a sub-block whose values are below is all 0
    spread: Any  # times the mean of squares, beside a value's own square, under the root that the importance is multiplied with
    floor: Any  # without importance: times that, beside a value's own square, is a value's weight
    tries: int
    step: Any  # tried is whether the greatest value stands for 2 * levels - 1 and so many steps more or less
    how: int
    fudge: Any  # times the super-block's scale


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
    lines: Any  # float32 [4, LANES]
    codes: Any  # uint8 [32]
    missed: Any  # int32 [32], of each scale that is tried the groups that are no points, as bits


@inner
def scratch() -> Any:
    x, w, r, c = np.ones(32, f32), np.ones(32, f32), np.ones(32, f32), np.ones(32, f32)
    return Scratch(x, w, r, c, np.empty((64, LANES), f32), np.empty((8, LANES), f32), np.empty((4, LANES), f32), np.zeros(32, u8), np.zeros(32, i32))


@inner
def found() -> Any:
    return Found(np.zeros(16, f32), np.zeros(16, u8), np.zeros(16, u8), np.zeros(32, u8), np.zeros(64, i32))


@inner
def weigh(block: Any, importance: Any, at: int, mean: Any, rule: Any, s: Any) -> None:
    """Weights of the sub-block at `at`, and their roots."""
    w, r = s.w, s.r
    for row in range(rule.n // LANES):
        v = load(block, at // LANES + row)
        if len(importance):
            weight = load(importance, at // LANES + row) * roots(mean + v * v)
        else:
            weight = rule.floor * mean + v * v if rule.floor else v * v
        store(w, row, weight)
        store(r, row, roots(weight))


@inner
def fold(values: Any, x: Any, w: Any, at: int, even: bool) -> Any:
    """The signs of eight values as bits, their magnitudes to `x`. Even signs: of an odd number the one that matters least is turned, its value negative."""
    sign, count = 0, 0
    for i in range(8):
        v = values[at + i]
        x[at + i] = v if v >= f32(0) else -v
        if not v >= f32(0):
            sign |= 1 << i
            count += 1
    if even:
        if count & 1:
            turned = 0
            low = w[at] * x[at] * x[at]
            for i in range(1, 8):
                loss = w[at + i] * x[at + i] * x[at + i]
                if loss < low:
                    low, turned = loss, i
            x[at + turned] = -x[at + turned]
            sign ^= 1 << turned
        sign &= 127
    return sign


@inner
def highest(x: Any, n: int) -> Any:
    top = x[0]
    for i in range(1, n):
        top = top if top > x[i] else x[i]
    return top


@inner
def fitted(w: Any, x: Any, c: Any, n: int, scale: Any) -> Any:
    """The scale that fits the values found best; the one given if all weights are 0."""
    qx, q2 = f32(0), f32(0)
    for i in range(n):
        qx += w[i] * x[i] * c[i]
        q2 += w[i] * c[i] * c[i]
    return qx / q2 if q2 > f32(0) else scale


@inner
def share(f: Any, n: int) -> Any:
    """Scales as (2 * code + 1) * d, codes of 0 to 15; returns d, which is NaN if one is."""
    scales, codes, top = f.scales, f.codes, f32(0)
    for i in range(n):
        top = top if top > scales[i] else scales[i]
        if not scales[i] >= f32(0):
            return LOST
    d = top / f32(31)
    factor = f32(1) / d
    for i in range(n):
        codes[i] = max(min(nearest(f32(0.5) * (factor * scales[i] - f32(1))), i32(15)), i32(0))
    return d


def searcher(dimensions: int, levels: int) -> Any:
    """The function that searches a super-block, for a codebook's groups of so many codes, each below `levels`."""

    @inner
    def point(first: Any, near: Any, key: Any, scale: Any, x: Any, r: Any, at: int) -> Any:
        """Of the points near a key the first one that times the scale is nearest to the values from `at` on; 0 if there is none."""
        found = NOTHING
        for row in range(first[key], first[key + 1]):
            total = splat(f32(0))
            for j in range(dimensions):
                e = scale * nibbles(near, row, 4 * j) - x[at + j]
                total += r[at + j] * e * e
            found = min(found, least(total) + (row - first[key]) * LANES)
        if found >= NOTHING:
            return u32(0)
        place = found & 0xFFFF
        return near[first[key] + place // LANES, place % LANES]

    @inner
    def attempt(book: Any, s: Any, n: int, factor: Any, batch: int, count: int) -> bool:
        """Values with LANES scales, to `s.t` and `s.missed`; their sums to `s.lines`. Whether all are points."""
        own, first, near = book[0], book[1], book[2]
        x, w, r, t, keys, lines = s.x, s.w, s.r, s.t, s.keys, s.lines
        store(lines, 0, f32(1) / factor)
        for k in range(n // dimensions):
            key = splat(f32(0))
            for j in range(dimensions):
                i = k * dimensions + j
                code = whole(f32(0.5) * (factor * x[i] - f32(1)), 0, levels - 1)
                store(t, batch * n + i, code + code + f32(1))
                key += code * f32(levels**j)
            store(keys, k, key)
        for lane in range(count):
            missed = 0
            for k in range(n // dimensions):
                number = i32(keys[k, lane])
                if own[number] < 0:
                    found = point(first, near, number, lines[0, lane], x, r, k * dimensions)
                    if not found:
                        return False
                    missed |= 1 << k
                    for j in range(dimensions):
                        t[batch * n + k * dimensions + j, lane] = f32(i32(found >> u32(4 * j)) & 15)
            s.missed[batch * LANES + lane] = missed
        qx, q2 = splat(f32(0)), splat(f32(0))
        for i in range(n):
            c = load(t, batch * n + i)
            qx += w[i] * x[i] * c
            q2 += w[i] * c * c
        store(lines, 1, qx)
        store(lines, 2, q2)
        return True

    @inner
    def again(book: Any, s: Any, n: int, scale: Any, groups: int) -> Any:
        """Some groups looked for once more with the scale found; the scale that then fits best."""
        x, c, factor = s.x, s.c, f32(1) / scale
        for k in range(n // dimensions):
            if groups >> k & 1:
                key, power = i32(0), i32(1)
                for i in range(k * dimensions, (k + 1) * dimensions):
                    code = max(min(nearest(f32(0.5) * (factor * x[i] - f32(1))), i32(levels - 1)), i32(0))
                    c[i] = f32(2 * code + 1)
                    key += code * power
                    power *= levels
                if book[0][key] < 0:
                    found = point(book[1], book[2], key, scale, x, s.r, k * dimensions)
                    if not found:
                        return LOST
                    for j in range(dimensions):
                        c[k * dimensions + j] = f32(i32(found >> u32(4 * j)) & 15)
        return fitted(s.w, x, c, n, scale)

    @inner
    def fit(book: Any, s: Any, rule: Any, top: Any, scale: Any) -> Any:
        """The scale, signed or NaN, with the values in `s.c`; the scale given if no try is better than nothing."""
        n, best, chosen = rule.n, f32(0), -1
        c, t, lines = s.c, s.t, s.lines
        for batch in range((rule.tries + LANES - 1) // LANES):
            for lane in range(LANES):
                steps = batch * LANES + lane - rule.tries // 2
                lines[3, lane] = (f32(2 * levels - 1) + f32(steps) * rule.step) / top
            count = min(LANES, rule.tries - batch * LANES)
            if not attempt(book, s, n, load(lines, 3), batch, count):
                return LOST
            for lane in range(count):
                qx, q2 = lines[1, lane], lines[2, lane]
                if q2 > f32(0) and qx * qx > best * q2:
                    scale = qx / q2
                    best, chosen = scale * qx, batch * LANES + lane
        for i in range(n):
            c[i] = t[chosen // LANES * n + i, chosen % LANES] if chosen >= 0 else f32(1)
        every = (1 << 8) - 1
        groups = every if rule.how == ANY_MISSED else 0
        if chosen >= 0:
            groups = every if rule.how == ANY_MISSED and s.missed[chosen] else s.missed[chosen]
        if rule.how == ALWAYS:
            groups = every
        return again(book, s, n, scale, groups) if groups and scale > f32(0) else scale

    @inner
    def sub_block(book: Any, s: Any, f: Any, rule: Any, j: int) -> None:
        """Values in `s.x` and `s.w` to the scale and points of sub-block j."""
        n, top = rule.n, highest(s.x, rule.n)
        f.live[j] = 0
        if top < rule.least:
            return
        own, c, points, signs = book[0], s.c, f.points, f.signs
        scale = top / f32(2 * levels - 1)
        if rule.how == ALWAYS:
            scale = positive(s.x, s.w, n, levels + 1, s.codes)
            top = scale * f32(levels)
            if top <= f32(0):
                return
        scale = fit(book, s, rule, top, scale)
        f.live[j] = 1
        if scale < f32(0):
            scale = -scale
            for k in range(n // 8):
                signs[n // 8 * j + k] ^= 127 if rule.even else 255
        f.scales[j] = scale
        for k in range(n // dimensions):
            key, power = i32(0), i32(1)
            for i in range(k * dimensions, (k + 1) * dimensions):
                key += i32(c[i]) // 2 * power
                power *= levels
            points[n // dimensions * j + k] = own[key]

    @inner
    def search(book: Any, s: Any, f: Any, rule: Any, block: Any, importance: Any) -> Any:
        """Fills `f`; returns the super-block's scale, NaN if it has none."""
        n = rule.n
        mean = rule.spread * squares(block) / f32(256)
        f.signs[:] = 0
        f.points[:] = 0
        f.scales[:] = f32(0)
        for j in range(256 // n):
            weigh(block, importance, j * n, mean, rule, s)
            part = block[j * n :]
            for k in range(n // 8):
                f.signs[n // 8 * j + k] = fold(part, s.x, s.w, 8 * k, rule.even)
            sub_block(book, s, f, rule, j)
            if not f.live[j]:
                for k in range(n // 8):
                    f.signs[n // 8 * j + k] = 0
        return share(f, 256 // n)

    return search
