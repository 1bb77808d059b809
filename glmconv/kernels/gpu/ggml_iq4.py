"""kernels/ggml_iq4.py for Triton: IQ4_NL and IQ4_XS. Arguments as in ggml_k.py; IQ4_NL's blocks are of 32."""

from __future__ import annotations

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels.gpu.floats import to_float16
from glmconv.kernels.gpu.ggml_layout import LAYOUTS, blocks_of, put, put_bytes
from glmconv.kernels.gpu.ggml_search import EPSILON, greatest, held, inverse, lanes, nothing
from glmconv.kernels.gpu.ggml_weights import weighed
from glmconv.kernels.gpu.launch import beside, launch_lanes

VALUES = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)
TABLE = (*((a + b) / 2 for a, b in pairwise(VALUES)), *VALUES)  # fifteen middles between them, and they themselves
LEAST = tl.constexpr(VALUES[0])


def encode_iq4(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """IQ4_NL, IQ4_XS."""
    layout = LAYOUTS[name]
    x = beside(rows, 32)
    count, each = x.shape[1], layout.values // 32
    w = x * x if importance is None else weighed(rows, x, importance, layout.values, layout.values // 2)
    codes, (scales, factors) = torch.empty_like(x, dtype=torch.uint8), torch.empty((2, count), dtype=torch.float32, device=x.device)
    halves = torch.empty((count // each, 1), dtype=torch.int16, device=x.device)
    table = torch.tensor(TABLE, dtype=torch.float32, device=x.device)
    launch_lanes(_search, count, x, w, table, scales)
    if name == "IQ4_XS":
        small = torch.empty((count // each, each), dtype=torch.uint8, device=x.device)
        launch_lanes(_small_scales, count // each, scales, small, factors, halves)
    else:
        launch_lanes(_own_scales, count, scales, factors, halves)
    launch_lanes(_codes, count, x, table, factors, codes)
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, halves)
    if name == "IQ4_XS":
        put(out, small, layout.scales)
    return out


@triton.jit
def _nearest_code(v, table):
    """Of two values as near the greater one's; the last one for NaN."""
    code = tl.where(v < tl.load(table + 7), 0, 8)
    code += tl.where(v < tl.load(table + code + 3), 0, 4)
    code += tl.where(v < tl.load(table + code + 1), 0, 2)
    return code + tl.where(v < tl.load(table + code), 0, 1)


@triton.jit
def _products(x, w, table, at, stride, factor):
    """The sums of w v x and w v v for the values v that `factor` gives."""
    a, b = nothing(at), nothing(at)
    for _ in range(32):
        v = tl.load(x + at)
        value = tl.load(table + 15 + _nearest_code(factor * v, table))
        wq = tl.load(w + at) * value
        a += wq * v
        b += wq * value
        at += stride
    return a, b


@triton.jit
def _search(x, w, table, scales, count, SIZE: tl.constexpr):
    """The scale that fits each sub-block best, 0 where all values are below EPSILON."""
    at, inside = lanes(count, SIZE)
    top = greatest(x, at, count, 32)
    a, b = _products(x, w, table, at, count, tl.div_rn(1.0, tl.div_rn(top * -1.0, LEAST)))
    d = tl.where(b > 0.0, tl.div_rn(a, b), 0.0)
    best = d * a
    k = nothing(at) - 7.0
    for _ in range(15):
        a, b = _products(x, w, table, at, count, tl.div_rn(k + LEAST, top))
        fitted = tl.div_rn(a, b)
        won = (b > 0.0) & (a * a > best * b)
        d, best = tl.where(won, fitted, d), tl.where(won, fitted * a, best)
        k += 1.0
    tl.store(scales + at, tl.where(tl.abs(top) < EPSILON, 0.0, d), inside)


@triton.jit
def _own_scales(scales, factors, halves, count, SIZE: tl.constexpr):
    at, inside = lanes(count, SIZE)
    d = tl.load(scales + at)
    tl.store(halves + at, to_float16(d).to(tl.int16), inside)
    tl.store(factors + at, inverse(d), inside)


@triton.jit
def _small_scales(scales, small, factors, halves, count, SIZE: tl.constexpr):
    """A super-block's eight scales, six bits each, and the factors that its codes are made with."""
    at, inside = lanes(count, SIZE)
    d = tl.div_rn(greatest(scales, 8 * at, 1, 8) * -1.0, 32.0)
    tl.store(halves + at, to_float16(d).to(tl.int16), inside)
    place = 8 * at[:, None] + tl.arange(0, 8)[None, :]
    code = held(inverse(d)[:, None] * tl.load(scales + place), -32, 31)
    tl.store(small + place, (code + 32).to(tl.uint8), inside[:, None])
    tl.store(factors + place, inverse(d[:, None] * code.to(tl.float32)), inside[:, None])


@triton.jit
def _codes(x, table, factors, codes, count, SIZE: tl.constexpr):
    at, inside = lanes(count, SIZE)
    factor = tl.load(factors + at)
    for _ in range(32):
        tl.store(codes + at, _nearest_code(factor * tl.load(x + at), table).to(tl.uint8), inside)
        at += count
