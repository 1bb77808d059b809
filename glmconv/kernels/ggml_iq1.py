"""ggml's IQ1_S and IQ1_M: groups of eight as points of -1, 0 and 1, all moved an eighth up or down. Arguments as in ggml_k.py.

A sub-block's values, sorted, are cut into three runs in every way there is, and each way is weighed; sixteen second cuts at once, one in each lane.
Source: ggml-quants.c of libggml 0.25.3 (quantize_row_iq1_s_impl, quantize_row_iq1_m_impl, iq1_find_best_neighbour2).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmconv.kernels.floats import Array, f32, i32, to_float16, u16, u32
from glmconv.kernels.ggml_codebook import codebook
from glmconv.kernels.ggml_iq_search import LOST, NOTHING, share
from glmconv.kernels.ggml_search import squares
from glmconv.kernels.ggml_simple import put_half
from glmconv.kernels.jit import inner, kernel
from glmconv.kernels.lanes import LANES, first, least, load, nibbles, roots, splat, store

UP, DOWN = np.float32(0.125), np.float32(-0.125)
WORST = np.float32(-3.4028235e38)
ROW = 3 * LANES  # room for the sums up to each of 0 to 32 values


def encode_iq1_s(values: Array, importance: Array, out: Array) -> None:
    _encode_s(values, importance, out, codebook("IQ1"))


def encode_iq1_m(values: Array, importance: Array, out: Array) -> None:
    _encode_m(values, importance, out, codebook("IQ1"))


@inner
def _weigh(block: Any, importance: Any, w: Any) -> None:
    mean = f32(2) * squares(block) / f32(256)
    for row in range(16):
        v = load(block, row)
        store(w, row, load(importance, row) * roots(mean + v * v) if len(importance) else v * v)


@inner
def _peak(x: Any) -> Any:
    peak = abs(x[0])
    for i in range(1, len(x)):
        peak = peak if peak > abs(x[i]) else abs(x[i])
    return peak


@inner
def _sort(x: Any, order: Any) -> None:
    """Which value comes first, second, ...; equal ones as they stand."""
    for i in range(len(x)):
        at = i
        while at > 0 and x[i] < x[order[at - 1]]:
            order[at] = order[at - 1]
            at -= 1
        order[at] = i


@inner
def _sums(x: Any, w: Any, order: Any, halves: int, sums: Any) -> None:
    """Sums up to each value in order, of w * x and of w; of two halves apart, w * x of both first."""
    half = len(x) // halves
    for h in range(2 * halves):
        sums[h * ROW] = f32(0)
    for j in range(len(x)):
        i = order[j]
        for h in range(halves):
            mine = i // half == h
            a, b = h * ROW + j, (halves + h) * ROW + j
            sums[a + 1] = sums[a] + w[i] * x[i] if mine else sums[a]
            sums[b + 1] = sums[b] + w[i] if mine else sums[b]


@inner
def _whole_cuts(sums: Any, n: int, i: int, row: int, lines: Any) -> None:
    """For the first cut at i and sixteen second ones: moved up, then down, sums of w * x * q and of w * q * q."""
    x, w = load(sums, row), load(sums, ROW // LANES + row)
    for k in range(2):
        mid = UP if k == 0 else DOWN
        low, high = mid - f32(1), mid + f32(1)
        qx = (sums[i] - sums[0]) * low + (x - sums[i]) * mid + (sums[n] - x) * high
        q2 = (sums[ROW + i] - sums[ROW]) * low * low + (w - sums[ROW + i]) * mid * mid + (sums[ROW + n] - w) * high * high
        store(lines, 2 * k, qx)
        store(lines, 2 * k + 1, q2)


@inner
def _half_cuts(sums: Any, n: int, i: int, row: int, lines: Any) -> None:
    """The same with the halves each moved up or down: both up, the second down, the first down, both down."""
    for h in range(2):
        x, w = h * ROW, (2 + h) * ROW
        sx = sums[x + i] + load(sums, x // LANES + row)
        for k in range(2):
            mid = UP if k == 0 else DOWN
            low, high = mid - f32(1), mid + f32(1)
            store(lines, 8 + 4 * h + 2 * k, sums[x + n] * high - sx)
            a, b = low * low - mid * mid, mid * mid - high * high
            store(lines, 9 + 4 * h + 2 * k, sums[w + n] * high * high + sums[w + i] * a + load(sums, w // LANES + row) * b)
    for k in range(4):
        for j in range(2):
            store(lines, 2 * k + j, load(lines, 8 + 2 * (k // 2) + j) + load(lines, 12 + 2 * (k % 2) + j))


@inner
def _cut(sums: Any, n: int, ways: int, places: Any, lines: Any) -> Any:
    """(scale, first cut, second cut, way): the best of all; the way is -1 if none is any good."""
    best, scale, one, two, way = WORST, f32(0), 0, 0, -1
    for i in range(n + 1):
        for row in range(i // LANES, n // LANES + 1):
            if ways == 2:
                _whole_cuts(sums, n, i, row, lines)
            else:
                _half_cuts(sums, n, i, row, lines)
            start = i
            while True:
                place = load(places, row)
                better = splat(f32(1)) < splat(f32(0))
                for k in range(ways):
                    qx, q2 = load(lines, 2 * k), load(lines, 2 * k + 1)
                    better = better | (q2 > f32(0)) & (qx * qx > best * q2)
                lane = first(better & (place >= f32(start)) & (place <= f32(n)))
                if lane == LANES:
                    break
                for k in range(ways):
                    a, b = lines[2 * k, lane], lines[2 * k + 1, lane]
                    if b > f32(0) and a * a > best * b:
                        scale = a / b
                        best, one, two, way = scale * a, i, row * LANES + lane, k
                start = row * LANES + lane + 1
    return scale, one, two, way


@inner
def _point(firsts: Any, near: Any, key: Any, scale: Any, x: Any, w: Any, at: int, move: Any) -> Any:
    """Of the points near a key the first one that, moved and times the scale, is nearest to the values from `at` on; 0 if there is none."""
    found = NOTHING
    for row in range(firsts[key], firsts[key + 1]):
        total = splat(f32(0))
        for j in range(8):
            e = scale * (nibbles(near, row, 4 * j) + (move - f32(2))) - x[at + j]
            total += w[at + j] * e * e
        found = min(found, least(total) + (row - firsts[key]) * LANES)
    if found >= NOTHING:
        return u32(0)
    place = found & 0xFFFF
    return near[firsts[key] + place // LANES, place % LANES]


@inner
def _value(point: Any, j: int) -> Any:
    """Coordinate j of a point, -1, 0 or 1."""
    return f32((i32(point >> u32(4 * j)) & 15) - 2)


@inner
def _moves(way: int, ways: int, k: int, n: int) -> Any:
    """How group k is moved."""
    if ways == 2:
        return UP if way == 0 else DOWN
    return UP if (way < 2 if k == 0 else way % 2 == 0) else DOWN


@inner
def _search(book: Any, x: Any, w: Any, ways: int, room: Any, order: Any, codes: Any, points: Any) -> Any:
    """(scale, way) of a sub-block, the numbers of its points in `points`; the way is -1 where it is not searched, a scale that cannot be is NaN."""
    n = len(x)
    sums, lines, places = room[:12].reshape(-1), room[12:28], room[28:31]
    _sort(x, order)
    _sums(x, w, order, ways // 2, sums)
    scale, one, two, way = _cut(sums, n, ways, places, lines)
    if way < 0:
        return f32(0), way
    for j in range(n):
        codes[order[j]] = 0 if j < one else 1 if j < two else 2
    if scale < f32(0):
        scale, way = -scale, ways - 1 - way
        for j in range(n):
            codes[j] = 2 - codes[j]
    own, near = book[0], book[2]
    missed = False
    for k in range(n // 8):
        key, power = 0, 1
        for j in range(8 * k, 8 * k + 8):
            key += codes[j] * power
            power *= 3
        if own[key] < 0:
            missed = True
            point = _point(book[1], near, key, scale, x, w, 8 * k, _moves(way, ways, k, n))
            if not point:
                return LOST, way
            key, power = 0, 1
            for j in range(8):
                key += ((i32(point >> u32(4 * j)) & 15) - 1) * power
                power *= 3
        points[k] = own[key]
    return _fitted(book[3], x, w, points, way, ways, scale) if missed else scale, way


@inner
def _fitted(all_points: Any, x: Any, w: Any, points: Any, way: int, ways: int, scale: Any) -> Any:
    qx, q2 = f32(0), f32(0)
    for k in range(len(x) // 8):
        point, move = all_points[points[k]], _moves(way, ways, k, len(x))
        for j in range(8):
            q = _value(point, j) + move
            qx += w[8 * k + j] * q * x[8 * k + j]
            q2 += w[8 * k + j] * q * q
    return qx / q2 if qx > f32(0) and q2 > f32(0) else scale


@inner
def _room() -> Any:
    """Scratch: cut sums, lines of lanes, and the numbers 0, 1, 2, ..."""
    room = np.zeros((31, LANES), f32)
    for i in range(ROW):
        room[28 + i // LANES, i % LANES] = f32(i)
    return room


@kernel
def _encode_s(values: Any, importance: Any, out: Any, book: Any) -> None:
    w, room, scales = np.empty(256, f32), _room(), np.empty(8, f32)
    order, codes, points, high, small = np.zeros(32, i32), np.zeros(32, i32), np.zeros(4, i32), np.zeros(8, i32), np.zeros(8, i32)
    for b in range(len(out)):
        x, block, at = values[b * 256 : (b + 1) * 256], out[b], b * 256 % max(len(importance), 1)
        _weigh(x, importance[at : at + 256], w)
        block[:] = 0
        for j in range(8):
            part, scale, way = x[32 * j : 32 * j + 32], f32(0), -1
            if _peak(part) >= f32(1e-12):
                scale, way = _search(book, part, w[32 * j : 32 * j + 32], 2, room, order, codes, points)
            scales[j], high[j] = scale, 0
            if way >= 0:
                for k in range(4):
                    block[2 + 4 * j + k] = points[k] & 255
                    high[j] |= points[k] >> 8 << 3 * k
                high[j] |= (way & 1) << 15
        d, top = share(scales, 8, 15, small)
        put_half(block, 0, d * f32(1.125))
        for j in range(8):
            word = high[j] | small[j] << 12 if top > f32(0) else high[j] & 0xFFF
            block[34 + 2 * j] = word & 255
            block[35 + 2 * j] = word >> 8 & 255


@kernel
def _encode_m(values: Any, importance: Any, out: Any, book: Any) -> None:
    w, room, scales = np.empty(256, f32), _room(), np.empty(16, f32)
    order, codes, points = np.zeros(16, i32), np.zeros(16, i32), np.zeros((16, 2), i32)
    ways, small = np.zeros(16, i32), np.zeros(16, i32)
    for b in range(len(out)):
        x, block, at = values[b * 256 : (b + 1) * 256], out[b], b * 256 % max(len(importance), 1)
        _weigh(x, importance[at : at + 256], w)
        block[:] = 0
        points[:] = 0
        for j in range(16):
            part, scale, way = x[16 * j : 16 * j + 16], f32(0), -1
            if _peak(part) >= f32(1e-7):
                scale, way = _search(book, part, w[16 * j : 16 * j + 16], 4, room, order, codes, points[j])
            scales[j], ways[j] = scale, max(way, 0)
            for k in range(2):
                block[2 * j + k] = points[j, k] & 255
                block[32 + j] |= points[j, k] >> 8 << 4 * k
        d, top = share(scales, 16, 15, small)
        if top == f32(0):
            continue
        scale = _refitted(book[3], x, w, points, ways, small, d) if d >= f32(0) else LOST
        h = u16(to_float16(scale * f32(1.1125)))
        for j in range(16):
            block[32 + j] |= (ways[j] & 1) << 7 | ways[j] >> 1 << 3
        for j in range(4):
            word = i32(h) >> 4 * j & 15
            word = word << 12 | small[4 * j] | small[4 * j + 1] << 3 | small[4 * j + 2] << 6 | small[4 * j + 3] << 9
            block[48 + 2 * j] = word & 255
            block[49 + 2 * j] = word >> 8


@inner
def _refitted(all_points: Any, x: Any, w: Any, points: Any, ways: Any, small: Any, d: Any) -> Any:
    """The super-block's scale that fits its values best, once all else is decided."""
    qx, q2 = f32(0), f32(0)
    for j in range(16):
        for k in range(2):
            point, move = all_points[points[j, k]], _moves(ways[j], 4, k, 16)
            for i in range(8):
                q = (_value(point, i) + move) * f32(2 * small[j] + 1)
                at = 16 * j + 8 * k + i
                qx += w[at] * q * x[at]
                q2 += w[at] * q * q
    return qx / q2 if q2 > f32(0) else d
