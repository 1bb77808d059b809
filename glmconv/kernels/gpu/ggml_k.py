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
from glmconv.kernels.gpu.ggml_sub_blocks import WITH_IMPORTANCE, again, search_signed, search_with_minimum
from glmconv.kernels.gpu.ggml_weights import weighed
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
    layout, given = LAYOUTS[name], importance is not None
    n = layout.sub
    x = beside(rows, n)
    count, each = x.shape[1], SUPER // n
    w = x if importance is None else weighed(rows, x, importance, SUPER, SUPER if name == "Q2_K" else SUPER // 2)
    codes, found = torch.empty_like(x, dtype=torch.uint8), floats(x, 3, count)
    rule = RULES[name] | (WITH_IMPORTANCE if given else {})
    launch_lanes(search_with_minimum, count, x, w, codes, *found, N=n, ROOTED=name != "Q2_K", GIVEN=given, **rule)
    halves = torch.empty((count // each, 2), dtype=torch.int16, device=x.device)
    small = torch.empty((2, count // each, each), dtype=torch.uint8, device=x.device)
    steps = floats(x, 2, count)
    launch_lanes(_scales_with_minimum, count // each, *found, *small, *steps, halves, EACH=each, MOST=15 if name == "Q2_K" else 63, GIVEN=given)
    launch_lanes(again, count, x, codes, *steps, N=n, LOW=0, HIGH=rule["NMAX"], LIFTED=True)
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, halves)
    if name == "Q2_K":
        out[:, :16] = small[0] | small[1] << 4
    else:
        put_six_bits(out, *small)
    return out


def encode_signed(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Q3_K, Q6_K."""
    layout, given, three = LAYOUTS[name], importance is not None, name == "Q3_K"
    x = beside(rows, 16)
    count, nmax = x.shape[1], 4 if three else 32
    w = x
    if importance is not None:
        w = weighed(rows, x, importance, SUPER, SUPER // 2) if three else beside(importance, 16)
    codes, found = torch.empty_like(x, dtype=torch.uint8), floats(x, 2, count)
    launch_lanes(search_signed, count, x, w, codes, *found, w.shape[1], N=16, NMAX=nmax, GIVEN=given, DESCENT=three and not given)
    halves = torch.empty((count // 16, 1), dtype=torch.int16, device=x.device)
    small, steps = torch.empty((count // 16, 16), dtype=torch.uint8, device=x.device), floats(x, count)
    dead = torch.zeros((count // 16, 1), dtype=torch.uint8, device=x.device)
    kernel = _searched_scales if three and given else _signed_scales
    launch_lanes(kernel, count // 16, *found, small, steps, halves, dead, **({} if three and given else {"MOST": 32 if three else 128}))
    launch_lanes(again, count, x, codes, steps, steps, N=16, LOW=-nmax, HIGH=nmax - 1, LIFTED=False)
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, halves)
    put(out, small, layout.scales)
    return out if three else out.masked_fill_(dead.bool(), 0)


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
def _signed_scales(scales, totals, small, steps, halves, dead, count, MOST: tl.constexpr, SIZE: tl.constexpr):
    """The scale of the greatest magnitude becomes -MOST, the others multiples of it."""
    at, inside = lanes(count, SIZE)
    top = greatest(scales, 16 * at, 1, 16)
    none = (top == 0.0) | (tl.abs(top) < EPSILON) if MOST == 128 else top == 0.0
    factor = tl.div_rn(-MOST * 1.0, top)
    code = nearest(factor[:, None] * tl.load(scales + 16 * at[:, None] + tl.arange(0, 16)[None, :]))
    code = tl.minimum(code, 127) if MOST == 128 else code
    code = (code << 24) >> 24
    code = code if MOST == 128 else tl.minimum(tl.maximum(code, -32), 31)
    d, code = tl.where(none, 0.0, tl.div_rn(1.0, factor)), tl.where(none[:, None], -32, code)
    _put_scales(small, steps, halves, at, d, code, inside, 0 if MOST == 128 else 32)
    tl.store(dead + at, none.to(tl.uint8), inside)


@triton.jit
def _searched_scales(scales, totals, small, steps, halves, dead, count, SIZE: tl.constexpr):
    """Scales searched for like values: six bits, weighed by their sub-blocks' weights."""
    at, inside = lanes(count, SIZE)
    d, factor = signed(scales, totals, 16 * at, 16 * at, 1, 1, 16, 32, True)
    code = held(factor[:, None] * tl.load(scales + 16 * at[:, None] + tl.arange(0, 16)[None, :]), -32, 31)
    _put_scales(small, steps, halves, at, d, tl.where(factor[:, None] == 0.0, -32, code), inside, 32)
