"""kernels/ggml_simple.py for Triton: floats, 32 values and a scale, and 256 of -1, 0, 1. A block is one lane's work.

rows: float32 [n, columns], whole blocks, C order; importance: float32 [columns] or None. Encoders return uint8 [blocks, bytes].
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels.gpu.floats import INFINITY, bits_of, narrow, real, to_float16
from glmconv.kernels.gpu.ggml_layout import LAYOUTS, blocks_of, put_bytes
from glmconv.kernels.gpu.ggml_search import greatest, inverse, lanes
from glmconv.kernels.gpu.ggml_sub_blocks import WITH_IMPORTANCE, search_signed, search_with_minimum
from glmconv.kernels.gpu.ggml_weights import weighed
from glmconv.kernels.gpu.launch import CARRIERS, KINDS, TILE, beside, bits, ceil_div, launch, launch_lanes

LEAST = tl.constexpr(-(1 << 31))


def encode_float(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 [n, columns] to the bytes of bfloat16 or float16, rounded once; NaN is quiet."""
    out = torch.empty(rows.shape, dtype=CARRIERS[dtype], device=rows.device)
    if rows.numel():
        launch(_narrowed, ceil_div(rows.numel(), TILE), rows, bits(rows), out, rows.numel(), KIND=KINDS[dtype], SIZE=TILE)
    return out.view(torch.uint8)


def encode_fours(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """Q4_0, Q4_1, Q5_0, Q5_1. The mean that goes into the weights is a whole row's."""
    x, columns = beside(rows, 32), rows.shape[1]
    return _plainly(name, x) if importance is None else _searched(name, x, weighed(rows, x, importance, columns, columns))


def _searched(name: str, x: Tensor, w: Tensor) -> Tensor:
    layout, count = LAYOUTS[name], x.shape[1]
    codes, found = torch.empty_like(x, dtype=torch.uint8), torch.empty((3, count), dtype=torch.float32, device=x.device)
    half = 8 if name.startswith("Q4") else 16
    if layout.m >= 0:
        launch_lanes(search_with_minimum, count, x, w, codes, *found, N=32, NMAX=2 * half - 1, **WITH_IMPORTANCE)
        scales = torch.stack((found[0], -found[1]), 1)
    else:
        launch_lanes(search_signed, count, x, w, codes, *found[:2], N=32, NMAX=half)
        scales = found[0, :, None]
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, encode_float(scales.contiguous(), torch.float16))
    return out


def _plainly(name: str, x: Tensor) -> Tensor:
    layout, (_, count) = LAYOUTS[name], x.shape
    based = layout.m >= 0
    codes = torch.empty_like(x, dtype=torch.uint8)
    halves = torch.empty((count, 1 + based), dtype=torch.int16, device=x.device)
    launch_lanes(_plain, count, x, codes, halves, HALF=2 ** (3 if name.startswith("Q4") else 4), BASED=based)
    out = blocks_of(layout, codes)
    put_bytes(out, layout.d, halves)
    return out


def encode_q8_0(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """From the greatest magnitude; the importance is ignored, and so below."""
    x = beside(rows, 32)
    codes, halves = torch.empty_like(x, dtype=torch.uint8), torch.empty((x.shape[1], 1), dtype=torch.int16, device=x.device)
    launch_lanes(_q8_0, x.shape[1], x, codes, halves)
    out = blocks_of(LAYOUTS[name], codes)
    put_bytes(out, 0, halves)
    return out


def encode_mxfp4(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """From the greatest magnitude's power of two."""
    x = beside(rows, 32)
    codes, exponents = torch.empty_like(x, dtype=torch.uint8), torch.empty((x.shape[1], 1), dtype=torch.uint8, device=x.device)
    launch_lanes(_mxfp4, x.shape[1], x, codes, exponents)
    out = blocks_of(LAYOUTS[name], codes)
    put_bytes(out, 0, exponents)
    return out


def encode_ternary(name: str, rows: Tensor, importance: Tensor | None) -> Tensor:
    """TQ1_0, TQ2_0."""
    x, layout = beside(rows, 256), LAYOUTS[name]
    codes, halves = torch.empty_like(x, dtype=torch.uint8), torch.empty((x.shape[1], 1), dtype=torch.int16, device=x.device)
    launch_lanes(_ternary, x.shape[1], x, codes, halves)
    out = blocks_of(layout, codes)
    if name == "TQ1_0":
        _put_digits(out, codes)
    put_bytes(out, layout.d, halves)
    return out


def _put_digits(out: Tensor, codes: Tensor) -> None:
    """Codes [256, blocks] that lie apart as digits base 3, the first the highest, as a fraction of 256, rounded up; the last bytes have four."""
    codes = codes.t().to(torch.int32)
    parts = codes[:, :160].reshape(-1, 5, 32), codes[:, 160:240].reshape(-1, 5, 16), codes[:, 240:].reshape(-1, 4, 4)
    for at, part in zip((0, 32, 48), parts, strict=True):
        total = torch.zeros_like(part[:, 0])
        for place in range(5):
            total = total * 3 + (part[:, place] if place < part.shape[1] else 0)
        out[:, at : at + part.shape[2]] = (((total & 255) * 256 + 242) // 243).to(torch.uint8)


@triton.jit
def cut(v):
    """Towards 0, as processors convert: what does not fit an int32 becomes its least."""
    fits = tl.abs(v) < 2147483648.0
    return tl.where(fits, tl.where(fits, v, 0.0).to(tl.int32), LEAST)


@triton.jit
def away(v):
    """C's roundf, as an integer: to the nearest, ties away from 0."""
    a = tl.abs(v)
    low = cut(a)
    low += ((low >= 0) & (a - low.to(tl.float32) >= 0.5)).to(tl.int32)
    return tl.where((v < 0.0) & (low >= 0), -low, low)


@triton.jit
def _narrowed(x, out, size, KIND: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    b = tl.load(x + place, place < size, 0)
    b = tl.where((b & 0x7FFF_FFFF) > INFINITY, (b & -0x1_0000) | 0x40_0000, b)
    tl.store(out + place, narrow(real(b), KIND), place < size)


@triton.jit
def _plain(x, codes, halves, count, HALF: tl.constexpr, BASED: tl.constexpr, SIZE: tl.constexpr):
    """From the extremes."""
    at, inside = lanes(count, SIZE)
    if BASED:
        low, high, place = tl.load(x + at), tl.load(x + at), at
        for _ in range(31):
            place += count
            v = tl.load(x + place)
            low, high = tl.where(v < low, v, low), tl.where(v > high, v, high)
        d = tl.div_rn(high - low, 2 * HALF - 1.0)
        tl.store(halves + 2 * at + 1, to_float16(low).to(tl.int16), inside)
    else:
        d = tl.div_rn(greatest(x, at, count, 32), -1.0 * HALF)
    tl.store(halves + (2 if BASED else 1) * at, to_float16(d).to(tl.int16), inside)
    factor, place = inverse(d), at
    for _ in range(32):
        v = tl.load(x + place)
        code = cut((v - low) * factor + 0.5) & 255 if BASED else (cut(v * factor + (HALF + 0.5)) << 24) >> 24
        tl.store(codes + place, tl.minimum(code, 2 * HALF - 1).to(tl.uint8), inside)
        place += count


@triton.jit
def _q8_0(x, codes, halves, count, SIZE: tl.constexpr):
    at, inside = lanes(count, SIZE)
    d = tl.div_rn(tl.abs(greatest(x, at, count, 32)), 127.0)
    tl.store(halves + at, to_float16(d).to(tl.int16), inside)
    factor, place = inverse(d), at
    for _ in range(32):
        tl.store(codes + place, away(tl.load(x + place) * factor).to(tl.uint8), inside)
        place += count


@triton.jit
def _exponent(peak):
    """floor(log2(peak)) of a float32 logarithm rounded to nearest: a peak just below a power of two counts as that power.

    Where it matters the logarithm is the next power's less the distance to it, to all bits that the difference keeps.
    """
    small = peak < 2.0**-126
    b = bits_of(tl.where(small, peak * 2.0**24, peak))
    above = (b >> 23) - tl.where(small, 126 + 24, 126)
    distance = (0x100_0000 - ((b & 0x7F_FFFF) | 0x80_0000)).to(tl.float32) * (1.4426950408889634 * 2.0**-24)
    near = above.to(tl.float32) - distance >= above.to(tl.float32)
    return tl.where(near, above, above - 1)


@triton.jit
def _mxfp4(x, codes, exponents, count, SIZE: tl.constexpr):
    """One power of two for 32 values of e2m1; the first of the nearest values."""
    at, inside = lanes(count, SIZE)
    peak = tl.abs(greatest(x, at, count, 32))
    exponent = tl.where(peak > 0.0, (_exponent(peak) + 125) & 255, 0)
    tl.store(exponents + at, exponent.to(tl.uint8), inside)
    d = real(tl.where(exponent < 2, 0x20_0000 << tl.minimum(exponent, 1), (tl.maximum(exponent, 1) - 1) << 23))
    place = at
    for _ in range(32):  # between 0, 1, 2, 3, 4, 6, 8, 12 times d; of two as near the smaller
        v = tl.load(x + place)
        a = tl.abs(v)
        code = (a > 0.5 * d).to(tl.int32) + (a > 1.5 * d).to(tl.int32) + (a > 2.5 * d).to(tl.int32) + (a > 3.5 * d).to(tl.int32)
        code += (a > 5.0 * d).to(tl.int32) + (a > 7.0 * d).to(tl.int32) + (a > 10.0 * d).to(tl.int32)
        code += tl.where((v < 0.0) & (code > 0), 8, 0)
        tl.store(codes + place, code.to(tl.uint8), inside)
        place += count


@triton.jit
def _ternary(x, codes, halves, count, SIZE: tl.constexpr):
    at, inside = lanes(count, SIZE)
    peak = tl.abs(greatest(x, at, count, 256))
    tl.store(halves + at, to_float16(peak).to(tl.int16), inside)
    factor, place = inverse(peak), at
    for _ in range(256):
        tl.store(codes + place, (away(tl.load(x + place) * factor) + 1).to(tl.uint8), inside)
        place += count
