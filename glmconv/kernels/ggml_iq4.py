"""ggml's IQ4_NL and IQ4_XS: four-bit codes of sixteen values that lie closer around 0. Arguments as in ggml_k.py; IQ4_NL's blocks are of 32."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from glmconv.kernels.floats import Array, f32, i32, u8
from glmconv.kernels.ggml_search import EPSILON, gather, nearest, peaks, scatter, squares, weigh
from glmconv.kernels.ggml_simple import pack_halves, put_half
from glmconv.kernels.jit import inner, kernel
from glmconv.kernels.lanes import LANES, load, splat, staircase, store, where

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
MIDDLES = tuple((a + b) / 2 for a, b in pairwise(VALUES))  # exact, and so are the differences beside them
LEAST = np.float32(VALUES[0])
nearest_value, nearest_code = staircase(MIDDLES, VALUES), staircase(MIDDLES, range(16))  # of two as near the greater


def encode_iq4_nl(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, 32)


def encode_iq4_xs(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, 256)


@inner
def _search(x: Any, w: Any, n: int) -> Any:
    """The scale that fits each lane best, 0 where all values are below EPSILON."""
    top, peak = peaks(x, n)
    d, best = splat(f32(0)), splat(f32(0))
    for k in range(-8, 8):  # -8 stands for the first try, whose sums are taken whatever they are
        factor = f32(1) / (f32(-1) * top / LEAST) if k == -8 else (f32(k) + LEAST) / top
        a, b = splat(f32(0)), splat(f32(0))
        for i in range(n):
            v = load(x, i)
            value = nearest_value(factor * v)
            wq = load(w, i) * value
            a += wq * v
            b += wq * value
        if k == -8:
            d = where(b > f32(0), a / b, d)
            best = d * a
        else:
            won = (b > f32(0)) & (a * a > best * b)
            d, best = where(won, a / b, d), where(won, a / b * a, best)
    return where(peak < EPSILON, f32(0), d)


@kernel
def _encode(values: Any, importance: Any, out: Any, size: int) -> None:
    n, each = 32, size // 32
    given = len(importance) > 0
    x, w, t, r = np.empty((n, LANES), f32), np.empty((n, LANES), f32), np.empty((n, LANES), f32), np.empty((2, LANES), f32)
    codes, small = np.empty(n * LANES, u8), np.empty(LANES, i32)
    for first in range(0, len(out) * each, LANES):
        gather(values, first, n, 0, x)
        if given:
            gather(importance, first, n, len(importance), w)
            for lane in range(0, LANES, each):
                at = (first + lane) * n
                mean = f32(squares(values[at : at + size]) * f32(2.0 / size))
                for j in range(lane, lane + each):
                    r[0, j] = mean
            weigh(x, w, n, load(r, 0))
        else:
            for i in range(n):
                store(w, i, load(x, i) * load(x, i))
        store(r, 0, _search(x, w, n))
        for lane in range(0, LANES, each):
            if (first + lane) // each < len(out):
                block = out[(first + lane) // each]
                if size == 256:
                    _scales(r[0, lane : lane + each], r[1, lane : lane + each], small, block)
                else:
                    scale = r[0, lane]
                    put_half(block, 0, scale)
                    r[1, lane] = f32(1) / scale if scale != f32(0) else f32(0)
        factor = load(r, 1)
        for i in range(n):
            store(t, i, nearest_code(factor * load(x, i)))
        scatter(t, n, codes)
        for lane in range(LANES):
            block, part = (first + lane) // each, (first + lane) % each
            if block < len(out):
                at = (8 if size == 256 else 2) + 16 * part
                pack_halves(codes[lane * n : lane * n + n], out[block, at : at + 16])


@inner
def _scales(scales: Any, factors: Any, small: Any, out: Any) -> None:
    """A super-block's scales, six bits each, in its first 8 bytes; the factors that its codes are made with."""
    top = f32(0)
    for j in range(8):
        top = scales[j] if abs(scales[j]) > abs(top) else top
    d = -top / f32(32)
    put_half(out, 0, d)
    unit = f32(1) / d if d != f32(0) else f32(0)
    out[2:8] = 0
    for j in range(8):
        small[j] = min(max(nearest(unit * scales[j]), i32(-32)), i32(31))
        step = d * f32(small[j])
        factors[j] = f32(1) / step if step != f32(0) else f32(0)
        code = small[j] + 32
        out[4 + j // 2] |= (code & 15) << 4 * (j % 2)
        out[2 + j // 4] |= code >> 4 << 2 * (j % 4)
