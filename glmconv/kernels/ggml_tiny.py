"""ggml's newer types without a search: Q1_0 (signs), Q2_0 (-1 to 2) and NVFP4 (e2m1 with a scale of e4m3 for 16 values). Arguments as in ggml_k.py.

Source: ggml-quants.c and ggml-impl.h of libggml 0.25.3 (quantize_row_q1_0_ref, quantize_row_q2_0_ref, quantize_row_nvfp4_ref, ggml_fp32_to_ue4m3).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmconv.kernels.floats import Array, bits, f32, i32, real, u8, u32
from glmconv.kernels.ggml_simple import away, put_half
from glmconv.kernels.jit import inner, kernel


def encode_q1_0(values: Array, importance: Array, out: Array) -> None:
    _encode_q1_0(values, out)


def encode_q2_0(values: Array, importance: Array, out: Array) -> None:
    _encode_q2_0(values, out)


def encode_nvfp4(values: Array, importance: Array, out: Array) -> None:
    _encode_nvfp4(values, out)


@kernel
def _encode_q1_0(values: Any, out: Any) -> None:
    """The mean magnitude, summed one after the other, and 128 bits: 1 is plus, zero too."""
    for b in range(len(out)):
        x, block = values[b * 128 : (b + 1) * 128], out[b]
        total = f32(0)
        for i in range(128):
            total += abs(x[i])
        put_half(block, 0, total / f32(128))
        for j in range(16):
            byte = 0
            for i in range(8):
                byte |= (1 if x[8 * j + i] >= f32(0) else 0) << i
            block[2 + j] = byte


@kernel
def _encode_q2_0(values: Any, out: Any) -> None:
    """The greatest magnitude, and 64 codes of two bits, one more than the number of times it is taken."""
    for b in range(len(out)):
        x, block = values[b * 64 : (b + 1) * 64], out[b]
        peak = f32(0)
        for i in range(64):
            peak = max(peak, abs(x[i]))
        factor = f32(1) / peak if peak > f32(0) else f32(0)
        put_half(block, 0, peak)
        for j in range(16):
            byte = 0
            for i in range(4):
                byte |= max(min(away(x[4 * j + i] * factor) + 1, 3), 0) << 2 * i
            block[2 + j] = byte


@kernel
def _encode_nvfp4(values: Any, out: Any) -> None:
    """Four scales, then the codes of 16 values after those of 16: the first eight in the lower nibbles; of two values as near the smaller."""
    codes = np.empty(16, u8)
    for b in range(len(out)):
        for j in range(4):
            x, block = values[b * 64 + 16 * j : b * 64 + 16 * j + 16], out[b]
            peak = f32(0)
            for i in range(16):
                peak = max(peak, abs(x[i]))
            scale = _to_e4m3(peak / f32(6))
            d = _half_of_e4m3(scale)
            for i in range(16):
                code = _e2m1(abs(x[i]), d, scale == 0x7E)
                codes[i] = u8(code + (8 if x[i] < f32(0) and code > 0 else 0))
            block[j] = scale
            for i in range(8):
                block[4 + 8 * j + i] = codes[i] | codes[8 + i] << 4


@inner
def _e2m1(a: Any, d: Any, beyond: Any) -> Any:
    """Which of 0, 1, 2, 3, 4, 6, 8, 12 times d, by its number. Far beyond 12 * d smaller ones are as near, once distances are rounded."""
    if beyond:
        code, best = 0, a
        for k in range(1, 8):
            error = abs(f32(k if k < 5 else 2 * k - 4 if k < 7 else 12) * d - a)
            if error < best:
                code, best = k, error
        return code
    code = i32(a > f32(0.5) * d) + i32(a > f32(1.5) * d) + i32(a > f32(2.5) * d) + i32(a > f32(3.5) * d)
    code += i32(a > f32(5) * d) + i32(a > f32(7) * d) + i32(a > f32(10) * d)
    return code if d > f32(0) else 0


@inner
def _to_e4m3(v: Any) -> Any:
    """Positive float32 to e4m3 without a sign, half away from 0; from 248 on, which would be 256, it is 448 as ggml has it."""
    if not v > f32(0):
        return 0
    if v < f32(2.0**-6):
        return min(i32(v * f32(512) + f32(0.5)), 7)
    code = (i32(bits(min(v, f32(448))) >> u32(19)) + 1 >> 1) - (120 << 3)
    return code if code < 0x78 else 0x7E


@inner
def _half_of_e4m3(code: Any) -> Any:
    """Half the value: codes of e2m1 are counted in halves."""
    if code < 8:
        return f32(code) * f32(2.0**-10)
    return real(u32((code + (119 << 3)) << 20))
