"""Kernels for ggml's sub-blocks: the search that finds a scale for each, and their codes anew once the scales are stored. A sub-block is one lane's work.

x: float32 [n, sub-blocks] (`launch.beside`), codes: uint8 of that shape; w: the weights, for some sub-blocks that repeat or for all, if there are any.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from glmconv.kernels.gpu.ggml_search import descent, held, lanes, minimum, nothing, signed, squares, total

WITH_IMPORTANCE: dict[str, Any] = {"START": -0.9, "STEP": 0.05, "STEPS": 36, "ABSOLUTE": False}


@triton.jit
def search_with_minimum(
    x, w, codes, scales, lows, totals, count,
    N: tl.constexpr, ROOTED: tl.constexpr, NMAX: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr,
    ABSOLUTE: tl.constexpr, GIVEN: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Scale, -minimum, sum of weights and first codes of each sub-block."""
    at, inside = lanes(count, SIZE)
    mean = tl.sqrt_rn(tl.div_rn(squares(x, at, count, N), N * 1.0)) if ROOTED and not GIVEN else nothing(at)
    scale, low, factor, base, sw = minimum(x, w, at, at, count, count, mean, N, NMAX, START, STEP, STEPS, ABSOLUTE, GIVEN)
    tl.store(scales + at, scale, inside)
    tl.store(lows + at, low * -1.0, inside)
    tl.store(totals + at, sw, inside)
    for _ in range(N):
        tl.store(codes + at, held(factor * (tl.load(x + at) - base), 0, NMAX).to(tl.uint8), inside)
        at += count


@triton.jit
def search_signed(
    x, w, codes, scales, totals, span, count, N: tl.constexpr, NMAX: tl.constexpr, GIVEN: tl.constexpr, DESCENT: tl.constexpr, SIZE: tl.constexpr
):
    """Scale, sum of weights and first codes of each sub-block."""
    at, inside = lanes(count, SIZE)
    heavy = at % span
    if GIVEN:
        tl.store(totals + at, total(w, heavy, span, N), inside)
    if DESCENT:
        scale, found = descent(x, at, count, N, NMAX)
    else:
        scale, factor = signed(x, w, at, heavy, count, span, N, NMAX, GIVEN)
    tl.store(scales + at, scale, inside)
    for i in range(N):
        if DESCENT:
            code = ((found >> (4 * i)) & 15).to(tl.int32)
        else:
            code = tl.where(factor == 0.0, 0, held(factor * tl.load(x + at), -NMAX, NMAX - 1) + NMAX)
        tl.store(codes + at, code.to(tl.uint8), inside)
        at += count


@triton.jit
def again(
    x, codes, steps, lifts, count, N: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, LIFTED: tl.constexpr, SIZE: tl.constexpr
):
    """The codes anew, of the scales as they are stored; where a step is 0 the search's stay."""
    at, inside = lanes(count, SIZE)
    step = tl.load(steps + at)
    lift = tl.load(lifts + at) if LIFTED else step
    for _ in range(N):
        v = tl.load(x + at)
        code = held(tl.div_rn(v + lift if LIFTED else v, step), LOW, HIGH) - LOW
        tl.store(codes + at, code.to(tl.uint8), inside & (step != 0.0))
        at += count
