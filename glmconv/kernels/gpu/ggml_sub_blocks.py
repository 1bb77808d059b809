"""Kernels for ggml's sub-blocks: the searches for their scales, and their codes anew once these are stored. A sub-block is one lane's work.

x, w: values and weights, float32 [n, sub-blocks] (`launch.beside`); codes: uint8 of that shape; the rest float32 [sub-blocks].
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from glmconv.kernels.gpu.ggml_search import descent, held, lanes, minimum, nibble, signed, total

WITH_IMPORTANCE: dict[str, Any] = {"START": -0.9, "STEP": 0.05, "STEPS": 36, "ABSOLUTE": False}


@triton.jit
def search_with_minimum(
    x, w, codes, scales, lows, totals, count,
    N: tl.constexpr, NMAX: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, ABSOLUTE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Scale, -minimum, sum of weights and first codes of each sub-block."""
    at, inside = lanes(count, SIZE)
    scale, low, factor, base, sw = minimum(x, w, at, count, N, NMAX, START, STEP, STEPS, ABSOLUTE)
    tl.store(scales + at, scale, inside)
    tl.store(lows + at, low * -1.0, inside)
    tl.store(totals + at, sw, inside)
    for _ in range(N):
        tl.store(codes + at, held(factor * (tl.load(x + at) - base), 0, NMAX).to(tl.uint8), inside)
        at += count


@triton.jit
def search_signed(x, w, codes, scales, totals, count, N: tl.constexpr, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """Scale, sum of weights and first codes of each sub-block."""
    at, inside = lanes(count, SIZE)
    scale, factor = signed(x, w, at, count, N, NMAX)
    tl.store(scales + at, scale, inside)
    tl.store(totals + at, total(w, at, count, N), inside)
    for _ in range(N):
        code = tl.where(factor == 0.0, 0, held(factor * tl.load(x + at), -NMAX, NMAX - 1) + NMAX)
        tl.store(codes + at, code.to(tl.uint8), inside)
        at += count


@triton.jit
def search_by_descent(x, codes, scales, count, N: tl.constexpr, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """Scale and first codes of each sub-block."""
    at, inside = lanes(count, SIZE)
    scale, found = descent(x, at, count, N, NMAX)
    tl.store(scales + at, scale, inside)
    for i in range(N):
        tl.store(codes + at, nibble(found, i).to(tl.uint8), inside)
        at += count


@triton.jit
def again(x, codes, steps, lifts, count, N: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LIFTED: tl.constexpr, SIZE: tl.constexpr):
    """The codes anew, of the scales as they are stored; where a step is 0 the search's stay."""
    at, inside = lanes(count, SIZE)
    step = tl.load(steps + at)
    lift = tl.load(lifts + at) if LIFTED else step
    for _ in range(N):
        v = tl.load(x + at)
        code = held(tl.div_rn(v + lift if LIFTED else v, step), LOW, HIGH) - LOW
        tl.store(codes + at, code.to(tl.uint8), inside & (step != 0.0))
        at += count
