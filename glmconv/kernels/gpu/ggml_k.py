"""kernels/ggml_k.py for Triton. A sub-block's search is one lane's work, a super-block's scales another's.

rows: float32 [n, columns], whole super-blocks, C order; importance: float32 [columns] or None. Encoders return uint8 [super-blocks, bytes].
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels.gpu.floats import to_float16, widen
from glmconv.kernels.gpu.ggml_layout import LAYOUTS, blocks_of, put, put_bytes, put_six_bits
from glmconv.kernels.gpu.ggml_search import EPSILON, greatest, held, lanes, nearest, nothing, positive, signed
from glmconv.kernels.gpu.ggml_sub_blocks import WITH_IMPORTANCE, again, search_by_descent, search_signed, search_with_minimum
from glmconv.kernels.gpu.ggml_weights import raised, repeated, weighed
from glmconv.kernels.gpu.launch import beside, launch_lanes

SUPER = 256
RULES: dict[str, dict[str, Any]] = {
    "Q2_K": {"NMAX": 3, "START": -0.5, "STEP": 0.1, "STEPS": 15, "ABSOLUTE": True},
    "Q4_K": {"NMAX": 15, "START": -1.0, "STEP": 0.1, "STEPS": 20, "ABSOLUTE": False},
    "Q5_K": {"NMAX": 31, "START": -0.5, "STEP": 0.1, "STEPS": 15, "ABSOLUTE": False},
}


def floats(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def encode_with_minimum(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Q2_K, Q4_K, Q5_K."""
    layout, given, two = LAYOUTS[name], importance is not None, name == "Q2_K"
    n, each = layout.sub, SUPER // layout.sub
    x = beside(rows, n)
    w = _weights(name, rows, x, importance)
    count, rule = x.shape[1], RULES[name] | (WITH_IMPORTANCE if given else {})
    codes, found, steps = torch.empty_like(x, dtype=torch.uint8), floats(x, 3, count), floats(x, 2, count)
    launch_lanes(search_with_minimum, count, x, w, codes, *found, N=n, **rule)
    halves = torch.empty((count // each, 2), dtype=torch.int16, device=x.device)
    small = torch.empty((2, count // each, each), dtype=torch.uint8, device=x.device)
    launch_lanes(_scales_with_minimum, count // each, *found, *small, *steps, halves, EACH=each, MOST=15 if two else 63, GIVEN=given)
    launch_lanes(again, count, x, codes, *steps, N=n, LOW=0, HIGH=rule["NMAX"], LIFTED=True)
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, halves)
    if two:
        out[:, :16] = small[0] | small[1] << 4
    else:
        put_six_bits(out, *small)
    return out


def _weights(name: str, rows: Tensor, x: Tensor, importance: Tensor | None) -> Tensor:
    if importance is not None:
        return weighed(rows, x, importance, SUPER, SUPER if name == "Q2_K" else SUPER // 2)
    return x.abs() if name == "Q2_K" else raised(x)


def encode_q3_k(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """With importance the sub-blocks' scales are searched for like values."""
    x = beside(rows, 16)
    count = x.shape[1]
    codes, found = torch.empty_like(x, dtype=torch.uint8), floats(x, 2, count)
    if importance is None:
        launch_lanes(search_by_descent, count, x, codes, found[0], N=16, NMAX=4)
    else:
        launch_lanes(search_signed, count, x, weighed(rows, x, importance, SUPER, SUPER // 2), codes, *found, N=16, NMAX=4)
    return _finished(name, x, codes, found, 32, searched=importance is not None)


def encode_q6_k(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """With importance it is the weights; without, they are the squares."""
    x = beside(rows, 16)
    codes, found = torch.empty_like(x, dtype=torch.uint8), floats(x, 2, x.shape[1])
    w = x * x if importance is None else repeated(x, importance)
    launch_lanes(search_signed, x.shape[1], x, w, codes, *found, N=16, NMAX=32)
    return _finished(name, x, codes, found, 128)


def _finished(name: str, x: Tensor, codes: Tensor, found: Tensor, most: int, *, searched: bool = False) -> Tensor:
    """Q3_K, Q6_K with scales up to `most`, of the sub-blocks' scales and sums of weights `found` and their first codes."""
    layout, count = LAYOUTS[name], x.shape[1]
    blocks = count // 16
    small, steps = torch.empty((blocks, 16), dtype=torch.uint8, device=x.device), floats(x, count)
    halves, dead = (torch.zeros((blocks, 1), dtype=dtype, device=x.device) for dtype in (torch.int16, torch.uint8))
    if searched:
        launch_lanes(_searched_scales, blocks, *found, small, steps, halves)
    else:
        launch_lanes(_signed_scales, blocks, found[0], small, steps, halves, dead, MOST=most)
    nmax = layout.below
    launch_lanes(again, count, x, codes, steps, steps, N=16, LOW=-nmax, HIGH=nmax - 1, LIFTED=False)
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, halves)
    put(out, small, layout.scales)
    return out.masked_fill_(dead.bool(), 0)


@triton.jit
def _small(scales, at, EACH: tl.constexpr, MOST: tl.constexpr):
    """(unit, codes [SIZE, EACH]): scales as multiples of what the greatest is MOST of."""
    top = nothing(at)
    for j in range(EACH):
        v = tl.load(scales + at + j)
        top = tl.where(v > top, v, top)
    factor = tl.where(top > 0.0, tl.div_rn(MOST * 1.0, top), 0.0)
    code = nearest(factor[:, None] * tl.load(scales + at[:, None] + tl.arange(0, EACH)[None, :])) & 255
    return tl.div_rn(top, MOST * 1.0), code if MOST == 15 else tl.minimum(code, MOST)


@triton.jit
def _put_half(halves, at, value, inside):
    """Store as float16; returns the value as stored."""
    half = to_float16(value).to(tl.int16)
    tl.store(halves + at, half, inside)
    return widen(half, "float16")


@triton.jit
def _scales_with_minimum(
    scales, lows, totals, ls, lm, steps, lifts, halves, count, EACH: tl.constexpr, MOST: tl.constexpr, GIVEN: tl.constexpr, SIZE: tl.constexpr
):
    """A super-block's scales and minima as small integers, and what they make of them."""
    block, inside = lanes(count, SIZE)
    at = block * EACH
    if GIVEN:
        d, small = positive(scales, totals, at, EACH, MOST, SIZE)
        m, lifted = positive(lows, totals, at, EACH, MOST, SIZE)
    else:
        d, small = _small(scales, at, EACH, MOST)
        m, lifted = _small(lows, at, EACH, MOST)
    d, m = _put_half(halves, 2 * block, d, inside), _put_half(halves, 2 * block + 1, m, inside)
    place, there = at[:, None] + tl.arange(0, EACH)[None, :], inside[:, None]
    tl.store(ls + place, small.to(tl.uint8), there)
    tl.store(lm + place, lifted.to(tl.uint8), there)
    tl.store(steps + place, d[:, None] * small.to(tl.float32), there)
    tl.store(lifts + place, m[:, None] * lifted.to(tl.float32), there)


@triton.jit
def _put_scales(small, steps, halves, at, d, code, inside, ABOVE: tl.constexpr):
    """Small integers as they are stored, ABOVE higher, and the steps that they make with `d` as it is stored."""
    d = _put_half(halves, at, d, inside)
    place = 16 * at[:, None] + tl.arange(0, 16)[None, :]
    tl.store(small + place, (code + ABOVE).to(tl.uint8), inside[:, None])
    tl.store(steps + place, d[:, None] * code.to(tl.float32), inside[:, None])


@triton.jit
def _signed_scales(scales, small, steps, halves, dead, count, MOST: tl.constexpr, SIZE: tl.constexpr):
    """The scale of the greatest magnitude becomes -MOST, the others multiples of it."""
    at, inside = lanes(count, SIZE)
    top = greatest(scales, 16 * at, 1, 16)
    none = tl.abs(top) < EPSILON if MOST == 128 else top == 0.0
    factor = tl.div_rn(-MOST * 1.0, top)
    code = nearest(factor[:, None] * tl.load(scales + 16 * at[:, None] + tl.arange(0, 16)[None, :]))
    code = tl.minimum(code, 127) if MOST == 128 else code
    code = (code << 24) >> 24
    code = code if MOST == 128 else tl.minimum(tl.maximum(code, -32), 31)
    d, code = tl.where(none, 0.0, tl.div_rn(1.0, factor)), tl.where(none[:, None], -32, code)
    _put_scales(small, steps, halves, at, d, code, inside, 0 if MOST == 128 else 32)
    tl.store(dead + at, (none & (MOST == 128)).to(tl.uint8), inside)  # Q6_K's blocks are all zeros then


@triton.jit
def _searched_scales(scales, totals, small, steps, halves, count, SIZE: tl.constexpr):
    """Scales searched for like values: six bits, weighed by their sub-blocks' weights."""
    at, inside = lanes(count, SIZE)
    d, factor = signed(scales, totals, 16 * at, 1, 16, 32)
    code = held(factor[:, None] * tl.load(scales + 16 * at[:, None] + tl.arange(0, 16)[None, :]), -32, 31)
    _put_scales(small, steps, halves, at, d, tl.where(factor[:, None] == 0.0, -32, code), inside, 32)
