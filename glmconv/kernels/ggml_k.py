"""ggml's k-quants: super-blocks of 256 values in sub-blocks of 16 or 32, each with a small integer scale, the super-block with float16's.

`values` is float32, flat, whole super-blocks; `importance` float32, flat, of one row, or empty; `out` uint8 [super-blocks, bytes].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmconv.kernels.floats import Array, f32, i32, u8
from glmconv.kernels.ggml_search import EPSILON, descent, gather, minimum, nearest, positive, scatter, signed, squares, weigh
from glmconv.kernels.ggml_simple import put_half
from glmconv.kernels.jit import inner, kernel
from glmconv.kernels.lanes import LANES, load, magnitudes, roots, splat, store, where, whole

SUPER = 256


def encode_q2_k(values: Array, importance: Array, out: Array) -> None:
    _encode_with_minimum(values, importance, out, 2)


def encode_q3_k(values: Array, importance: Array, out: Array) -> None:
    _encode_signed(values, importance, out, 3)


def encode_q4_k(values: Array, importance: Array, out: Array) -> None:
    _encode_with_minimum(values, importance, out, 4)


def encode_q5_k(values: Array, importance: Array, out: Array) -> None:
    _encode_with_minimum(values, importance, out, 5)


def encode_q6_k(values: Array, importance: Array, out: Array) -> None:
    _encode_signed(values, importance, out, 6)


@inner
def _means(values: Any, first: int, n: int, factor: Any, means: Any) -> None:
    """`factor` times the sum of squares of each lane's super-block, in row 0 of `means`."""
    each = SUPER // n
    for lane in range(0, LANES, each):
        block = (first + lane) // each
        mean = f32(factor * squares(values[block * SUPER : (block + 1) * SUPER]))
        for i in range(each):
            means[0, lane + i] = mean


@inner
def _weights(x: Any, w: Any, n: int, bits: int) -> None:
    """The weights without importance."""
    mean = splat(f32(0))
    if bits != 2:
        for i in range(n):
            v = load(x, i)
            mean += v * v
        mean = roots(mean / f32(n))
    for i in range(n):
        store(w, i, mean + magnitudes(load(x, i)))


@inner
def _small(scales: Any, count: int, most: int, codes: Any) -> Any:
    """Scales as integers up to `most`; returns what they are multiples of."""
    top = f32(0)
    for j in range(count):
        top = scales[j] if scales[j] > top else top
    factor = f32(most) / top if top > f32(0) else f32(0)
    for j in range(count):
        code = u8(nearest(factor * scales[j]))
        codes[j] = code if most == 15 else min(code, u8(most))
    return top / f32(most)


@kernel
def _encode_with_minimum(values: Any, importance: Any, out: Any, bits: int) -> None:
    """Q2_K, Q4_K, Q5_K."""
    n, nmax, most = (16, 3, 15) if bits == 2 else (32, 15 if bits == 4 else 31, 63)
    each, at = SUPER // n, 80 if bits == 2 else 0
    given = len(importance) > 0
    rule = (f32(-0.9), f32(0.05), 36, False) if given else (f32(-1) if bits == 4 else f32(-0.5), f32(0.1), 20 if bits == 4 else 15, bits == 2)
    x, w, t, r = np.empty((n, LANES), f32), np.empty((n, LANES), f32), np.empty((n, LANES), f32), np.empty((6, LANES), f32)
    codes, ls, lm = np.empty(n * LANES, u8), np.empty(LANES, u8), np.empty(LANES, u8)
    for first in range(0, len(out) * each, LANES):
        gather(values, first, n, 0, x)
        if given:
            gather(importance, first, n, len(importance), w)
            _means(values, first, n, f32(2.0 / 256) if bits != 2 else f32(1.0 / 256), r)
            store(r, 2, weigh(x, w, n, load(r, 0)))
        else:
            _weights(x, w, n, bits)
        scale, low, factor, base = minimum(x, w, t, n, nmax, rule)
        store(r, 0, scale)
        store(r, 1, low)
        for lane in range(0, LANES, each):
            block, end = (first + lane) // each, lane + each
            if block < len(out):
                if given:
                    d = positive(r[0, lane:end], r[2, lane:end], each, most, ls[lane:end])
                    m = positive(r[1, lane:end], r[2, lane:end], each, most, lm[lane:end])
                else:
                    d = _small(r[0, lane:end], each, most, ls[lane:end])
                    m = _small(r[1, lane:end], each, most, lm[lane:end])
                d, m = put_half(out[block], at, d), put_half(out[block], at + 2, m)
                for j in range(lane, end):
                    r[3, j], r[4, j] = d * f32(ls[j]), m * f32(lm[j])
        step, lift = load(r, 3), load(r, 4)
        for i in range(n):
            v = load(x, i)
            store(t, i, where(step == f32(0), whole(factor * (v - base), 0, nmax), whole((v + lift) / step, 0, nmax)))
        scatter(t, n, codes)
        for lane in range(0, LANES, each):
            block = (first + lane) // each
            if block < len(out):
                _pack_with_minimum(codes[lane * n : lane * n + SUPER], ls[lane : lane + each], lm[lane : lane + each], out[block], bits)


@inner
def _pack_with_minimum(codes: Any, ls: Any, lm: Any, out: Any, bits: int) -> None:
    if bits == 2:
        for j in range(16):
            out[j] = ls[j] | lm[j] << 4
        _pack_quarters(codes, out[16:80])
        return
    for j in range(4):
        out[4 + j] = ls[j] | ls[j + 4] >> 4 << 6
        out[8 + j] = lm[j] | lm[j + 4] >> 4 << 6
        out[12 + j] = ls[j + 4] & 15 | lm[j + 4] << 4
    if bits == 5:
        _pack_bits(codes, 4, out[16:48])
    low = out[16 if bits == 4 else 48 :]
    for j in range(4):
        for i in range(32):
            low[32 * j + i] = codes[64 * j + i] & 15 | codes[64 * j + 32 + i] << 4


@inner
def _pack_bits(codes: Any, bit: int, out: Any) -> None:
    """One bit of each code: those of eight sub-blocks of 32 side by side."""
    for i in range(32):
        high = 0
        for j in range(8):
            high |= (codes[32 * j + i] >> bit & 1) << j
        out[i] = high


@inner
def _pack_quarters(codes: Any, out: Any) -> None:
    """Two bits of each code: 32 columns of each half's four quarters side by side."""
    for h in range(2):
        for i in range(32):
            c = 128 * h + i
            out[32 * h + i] = codes[c] & 3 | (codes[c + 32] & 3) << 2 | (codes[c + 64] & 3) << 4 | codes[c + 96] << 6


@kernel
def _encode_signed(values: Any, importance: Any, out: Any, bits: int) -> None:
    """Q3_K, Q6_K: a super-block fills the lanes."""
    n, nmax, steps = 16, 1 << (bits - 1), 32 if bits == 3 else 128
    given = len(importance) > 0
    x, w, t, r = np.empty((n, LANES), f32), np.empty((n, LANES), f32), np.empty((n, LANES), f32), np.empty((6, LANES), f32)
    column, heavy = np.zeros((LANES, LANES), f32), np.zeros((LANES, LANES), f32)
    codes, small = np.empty(SUPER, u8), np.empty(LANES, i32)
    for block in range(len(out)):
        gather(values, block * LANES, n, 0, x)
        if given:
            gather(importance, block * LANES, n, len(importance), w)
        if given and bits == 3:
            _means(values, block * LANES, n, f32(2.0 / 256), r)
            store(r, 1, weigh(x, w, n, load(r, 0)))
        store(r, 0, _first_codes(x, w, t, n, nmax, bits, given))
        if given and bits == 3:
            d = _searched(r, w, column, heavy, small)
        else:
            d = _signed_scales(r[0], steps, small)
            if bits == 6 and d == f32(0):
                out[block] = u8(0)
                continue
        d = put_half(out[block], 108 if bits == 3 else 208, d)
        for j in range(LANES):
            r[3, j] = d * f32(small[j])
        step = load(r, 3)
        for i in range(n):
            store(t, i, where(step == f32(0), load(t, i), whole(load(x, i) / step, -nmax, nmax - 1) + f32(nmax)))
        scatter(t, n, codes)
        if bits == 3:
            _pack_q3(codes, small, out[block])
        else:
            _pack_q6(codes, small, out[block])


@inner
def _first_codes(x: Any, w: Any, t: Any, n: int, nmax: int, bits: int, given: bool) -> Any:
    """The search's codes in `t`, from 0 up; returns the scales."""
    if bits == 3 and not given:
        scale, factor = descent(x, t, n, nmax)
    else:
        if not given:
            for i in range(n):
                store(w, i, load(x, i) * load(x, i))
        scale, factor = signed(x, w, t, n, nmax)
        for i in range(n):
            store(t, i, whole(factor * load(x, i), -nmax, nmax - 1))
    for i in range(n):
        store(t, i, where(factor == f32(0), f32(0), load(t, i) + f32(nmax)))
    return scale


@inner
def _searched(r: Any, t: Any, column: Any, heavy: Any, small: Any) -> Any:
    """Q3_K's scales with importance (rows 0 and 1 of `r`), searched for like values, in one lane; returns what they are multiples of."""
    for j in range(LANES):
        column[j, 0], heavy[j, 0] = r[0, j], r[1, j]
    scale, factor = signed(column, heavy, t, LANES, 32)
    for j in range(LANES):
        store(t, j, where(factor == f32(0), f32(-32), whole(factor * load(column, j), -32, 31)))
        small[j] = i32(t[j, 0])
    store(r, 2, scale)
    return r[2, 0]


@inner
def _signed_scales(scales: Any, steps: int, small: Any) -> Any:
    """The scale of the greatest magnitude becomes -steps, the others multiples of it; returns what they are multiples of."""
    top = f32(0)
    for j in range(LANES):
        top = scales[j] if abs(scales[j]) > abs(top) else top
    if top == f32(0) or (steps == 128 and abs(top) < EPSILON):
        small[:] = i32(-32)  # stored as 0
        return f32(0)
    factor = f32(-steps) / top
    for j in range(LANES):
        code = nearest(factor * scales[j])
        small[j] = min(max(i32(np.int8(code)), i32(-32)), i32(31)) if steps == 32 else i32(np.int8(min(code, i32(127))))
    return f32(1) / factor


@inner
def _pack_q3(codes: Any, small: Any, out: Any) -> None:
    _pack_bits(codes, 2, out[:32])
    _pack_quarters(codes, out[32:96])
    out[96:108] = 0
    for j in range(16):
        code = small[j] + 32
        out[96 + j % 8] |= (code & 15) << 4 * (j // 8)
        out[104 + j % 4] |= code >> 4 << 2 * (j // 4)


@inner
def _pack_q6(codes: Any, small: Any, out: Any) -> None:
    for h in range(2):
        for i in range(32):
            a, b, c, d = codes[128 * h + i], codes[128 * h + 32 + i], codes[128 * h + 64 + i], codes[128 * h + 96 + i]
            out[64 * h + i] = a & 15 | c << 4
            out[64 * h + 32 + i] = b & 15 | d << 4
            out[128 + 32 * h + i] = a >> 4 | b >> 4 << 2 | c >> 4 << 4 | d >> 4 << 6
    for j in range(16):
        out[192 + j] = small[j]
