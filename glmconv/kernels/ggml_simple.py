"""ggml's types without sub-blocks: floats, 32 values and a scale (Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, MXFP4), and 256 of -1, 0, 1 (TQ1_0, TQ2_0).

Arguments as in ggml_k.py. Only Q4_0 to Q5_1 heed the importance, which must be as long as a row: its mean is taken over the row.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from glmconv.kernels.floats import Array, bits, f32, i32, narrow, real, to_float16, u8, u32, widen
from glmconv.kernels.ggml_search import gather, minimum, scatter, signed, squares, weigh
from glmconv.kernels.jit import inner, kernel
from glmconv.kernels.lanes import LANES, load, store, where, whole

BLOCK = 32


def encode_f32(values: Array, importance: Array, out: Array) -> None:
    out.reshape(-1).view("<f4")[:] = values


def encode_f16(values: Array, importance: Array, out: Array) -> None:
    _narrowed(values, out.reshape(-1).view(np.int16))


def encode_bf16(values: Array, importance: Array, out: Array) -> None:
    _narrowed(values, out.reshape(-1).view(np.uint16))


def encode_q4_0(values: Array, importance: Array, out: Array) -> None:
    _encode_fours(values, importance, out, 4, False)


def encode_q4_1(values: Array, importance: Array, out: Array) -> None:
    _encode_fours(values, importance, out, 4, True)


def encode_q5_0(values: Array, importance: Array, out: Array) -> None:
    _encode_fours(values, importance, out, 5, False)


def encode_q5_1(values: Array, importance: Array, out: Array) -> None:
    _encode_fours(values, importance, out, 5, True)


def _encode_fours(values: Array, importance: Array, out: Array, width: int, based: bool) -> None:
    if len(importance):
        _search_blocks(values, importance, out, width, based)
    else:
        _plain_blocks(values, out, width, based)


def encode_q8_0(values: Array, importance: Array, out: Array) -> None:
    _encode_q8_0(values, out)


def encode_mxfp4(values: Array, importance: Array, out: Array) -> None:
    _encode_mxfp4(values, out)


def encode_tq1_0(values: Array, importance: Array, out: Array) -> None:
    _encode_ternary(values, out)


def encode_tq2_0(values: Array, importance: Array, out: Array) -> None:
    _encode_ternary(values, out)


@inner
def put_half(out: Any, at: int, value: Any) -> Any:
    """Store as float16, little-endian; returns the value as stored."""
    h = to_float16(value)
    out[at] = h & 0xFF
    out[at + 1] = h >> 8
    return widen(h)


@inner
def pack_halves(codes: Any, out: Any) -> None:
    """32 codes to 16 bytes: the first half in the lower nibbles."""
    for i in range(16):
        out[i] = codes[i] & 15 | codes[16 + i] << 4


@inner
def _pack(codes: Any, width: int, out: Any) -> None:
    """Codes of 4 or 5 bits: the fifth ones first."""
    if width == 5:
        for j in range(4):
            high = 0
            for i in range(8):
                high |= codes[8 * j + i] >> 4 << i
            out[j] = high
        pack_halves(codes, out[4:])
    else:
        pack_halves(codes, out)


@inner
def _cut(v: Any) -> Any:
    """Towards 0, as processors convert: what does not fit an int32 becomes its least."""
    return i32(v) if abs(v) < f32(2147483648.0) else i32(-2147483648)


@inner
def away(v: Any) -> Any:
    """C's roundf, as an integer: to the nearest, ties away from 0."""
    a = abs(v)
    low = f32(math.floor(a))
    low = low + f32(1) if f32(a - low) >= f32(0.5) else low
    return _cut(-low if v < f32(0) else low)


@kernel
def _narrowed(values: Any, out: Any) -> None:
    """float32 to bfloat16 or float16; NaN is quiet."""
    for i in range(len(out)):
        b = bits(values[i])
        quiet = real(u32(b & u32(0xFFFF_0000)) | u32(0x0040_0000)) if u32(b & u32(0x7FFF_FFFF)) > u32(0x7F80_0000) else values[i]
        out[i] = narrow(quiet, out[i])


@kernel
def _plain_blocks(values: Any, out: Any, width: int, based: bool) -> None:
    """Q4_0 to Q5_1 without importance: from the extremes."""
    most, half = i32((1 << width) - 1), f32(1 << (width - 1))
    codes = np.empty(BLOCK, u8)
    for b in range(len(out)):
        x, block = values[b * BLOCK : (b + 1) * BLOCK], out[b]
        low, high, top = x[0], x[0], f32(0)
        for i in range(BLOCK):
            low, high = min(low, x[i]), max(high, x[i])
            top = x[i] if abs(x[i]) > abs(top) else top
        d = f32(high - low) / f32(most) if based else top / -half
        factor = f32(1) / d if d != f32(0) else f32(0)
        put_half(block, 0, d)
        if based:
            put_half(block, 2, low)
            for i in range(BLOCK):
                codes[i] = u8(min(i32(u8(_cut((x[i] - low) * factor + f32(0.5)))), most))
        else:
            for i in range(BLOCK):
                codes[i] = u8(min(i32(np.int8(_cut(x[i] * factor + (half + f32(0.5))))), most))
        _pack(codes, width, block[4 if based else 2 :])


@kernel
def _search_blocks(values: Any, importance: Any, out: Any, width: int, based: bool) -> None:
    """Q4_0 to Q5_1 with importance."""
    columns, nmax = len(importance), (1 << width) - 1
    each = columns // BLOCK
    means = np.empty(len(values) // columns, f32)
    for row in range(len(means)):
        means[row] = squares(values[row * columns : (row + 1) * columns]) / f32(columns)
    x, w, t = np.empty((BLOCK, LANES), f32), np.empty((BLOCK, LANES), f32), np.empty((BLOCK, LANES), f32)
    r, codes = np.zeros((2, LANES), f32), np.empty(BLOCK * LANES, u8)
    for first in range(0, len(out), LANES):
        gather(values, first, BLOCK, 0, x)
        gather(importance, first, BLOCK, columns, w)
        for lane in range(LANES):
            r[0, lane] = means[min((first + lane) // each, len(means) - 1)]
        weigh(x, w, BLOCK, load(r, 0))
        if based:
            scale, low, factor, base = minimum(x, w, t, BLOCK, nmax, (f32(-0.9), f32(0.05), 36, False))
            for i in range(BLOCK):
                store(t, i, whole(factor * (load(x, i) - base), 0, nmax))
            store(r, 1, f32(-1) * low)
        else:
            half = 1 << (width - 1)
            scale, factor = signed(x, w, t, BLOCK, half)
            for i in range(BLOCK):
                store(t, i, where(factor == f32(0), f32(0), whole(factor * load(x, i), -half, half - 1) + f32(half)))
        store(r, 0, scale)
        scatter(t, BLOCK, codes)
        for lane in range(min(LANES, len(out) - first)):
            block = out[first + lane]
            put_half(block, 0, r[0, lane])
            if based:
                put_half(block, 2, r[1, lane])
            _pack(codes[lane * BLOCK : (lane + 1) * BLOCK], width, block[4 if based else 2 :])


@kernel
def _encode_q8_0(values: Any, out: Any) -> None:
    for b in range(len(out)):
        x, block = values[b * BLOCK : (b + 1) * BLOCK], out[b]
        peak = f32(0)
        for i in range(BLOCK):
            peak = max(peak, abs(x[i]))
        d = peak / f32(127)
        factor = f32(1) / d if d != f32(0) else f32(0)
        put_half(block, 0, d)
        codes = block[2:]
        for i in range(BLOCK):
            codes[i] = u8(away(x[i] * factor))


@kernel
def _encode_mxfp4(values: Any, out: Any) -> None:
    """One power of two for 32 values of e2m1; the first of the nearest values."""
    codes = np.empty(BLOCK, u8)
    for b in range(len(out)):
        x, block = values[b * BLOCK : (b + 1) * BLOCK], out[b]
        peak = f32(0)
        for i in range(BLOCK):
            peak = max(peak, abs(x[i]))
        exponent = u8(0)
        if peak > f32(0):  # log2 in float32: just below a power of two it is that power's
            exponent = u8(_cut(f32(math.floor(f32(math.log2(np.float64(peak))))) + f32(125)))
        d = real(u32(u32(0x0020_0000) << u32(exponent))) if exponent < 2 else real(u32(u32(u32(exponent) - u32(1)) << u32(23)))
        for i in range(BLOCK):  # between 0, 1, 2, 3, 4, 6, 8, 12 times d; of two as near the smaller
            a = abs(x[i])
            code = i32(a > f32(0.5) * d) + i32(a > f32(1.5) * d) + i32(a > f32(2.5) * d) + i32(a > f32(3.5) * d)
            code += i32(a > f32(5) * d) + i32(a > f32(7) * d) + i32(a > f32(10) * d)
            codes[i] = u8(i32(code) + (i32(8) if x[i] < f32(0) and code > 0 else i32(0)))
        block[0] = exponent
        pack_halves(codes, block[1:])


@kernel
def _encode_ternary(values: Any, out: Any) -> None:
    """-1, 0, 1: five digits base 3 to a byte (54 bytes), or four of two bits (66)."""
    codes = np.empty(256, u8)
    for b in range(len(out)):
        x, block = values[b * 256 : (b + 1) * 256], out[b]
        peak = f32(0)
        for i in range(256):
            peak = max(peak, abs(x[i]))
        factor = f32(1) / peak if peak != f32(0) else f32(0)
        for i in range(256):
            codes[i] = u8(away(x[i] * factor) + i32(1))
        if len(block) == 66:
            for j in range(64):
                c = 128 * (j // 32) + j % 32
                block[j] = codes[c] + (codes[c + 32] << 2) + (codes[c + 64] << 4) + (codes[c + 96] << 6)
            put_half(block, 64, peak)
        else:
            for j in range(32):
                block[j] = _digits(codes, j, 32, 5)
            for j in range(16):
                block[32 + j] = _digits(codes, 160 + j, 16, 5)
            for j in range(4):
                block[48 + j] = _digits(codes, 240 + j, 4, 4)
            put_half(block, 52, peak)


@inner
def _digits(codes: Any, at: int, apart: int, count: int) -> Any:
    """Codes that lie apart as digits base 3, the first the highest, as a fraction of 256 (rounded up)."""
    total = 0
    for k in range(5):
        total = total * 3 + (codes[at + k * apart] if k < count else 0)
    return ((total & 255) * 256 + 242) // 243
