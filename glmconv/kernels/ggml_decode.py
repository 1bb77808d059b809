"""ggml's blocks to float32, in numpy: each function takes uint8 [blocks, bytes] and gives float32 [blocks, values], with ggml's own bits.

Source: ggml-quants.c of libggml 0.25.3 (dequantize_row_*) and gguf/quants.py of the gguf package 0.19.0; equal to the vectors in tests/vectors/ggml.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from glmconv.kernels import ggml_grids
from glmconv.kernels.floats import Array

Floats = NDArray[np.float32]
IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)  # doubled
PARITY = np.array([i | (i.bit_count() & 1) << 7 for i in range(128)], np.uint8)  # seven signs and the eighth
EIGHTH = np.float32(0.125)


def half(data: Array, at: int) -> Floats:
    """The float16 at byte `at` of each block, [blocks, 1]."""
    return floats(words(data[:, at : at + 2], "<f2"))


def words(data: Array, kind: str) -> Array:
    """Bytes as little-endian integers."""
    found: Array = np.ascontiguousarray(data).view(kind)
    return found


def fields(data: Array, width: int, run: int) -> Array:
    """Each run of bytes, `width` bits of it at a time: all of the run's lowest bits first."""
    shifts = np.arange(0, 8 * data.dtype.itemsize, width, dtype=data.dtype)[:, None]
    parts: Array = (data.reshape(len(data), -1, 1, run) >> shifts) & data.dtype.type(2**width - 1)
    return parts.reshape(len(data), -1)


def scaled(steps: Floats, codes: Array) -> Floats:
    """Codes times the steps of equal shares of them."""
    blocks = len(codes)
    values: Floats = steps.reshape(blocks, -1, 1) * codes.astype(np.float32, copy=False).reshape(blocks, steps.size // max(blocks, 1), -1)
    return values.reshape(blocks, -1)


def floats(codes: Array, below: int = 0) -> Floats:
    values: Floats = codes.astype(np.float32)
    return values - np.float32(below) if below else values


def decode_f32(data: Array) -> Floats:
    return floats(words(data, "<f4"))


def decode_f16(data: Array) -> Floats:
    return floats(words(data, "<f2"))


def decode_bf16(data: Array) -> Floats:
    values: Floats = (words(data, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def decode_q4_0(data: Array) -> Floats:
    return half(data, 0) * floats(fields(data[:, 2:], 4, 16), 8)


def decode_q4_1(data: Array) -> Floats:
    return half(data, 0) * floats(fields(data[:, 4:], 4, 16)) + half(data, 2)


def _fives(data: Array, at: int) -> Array:
    high = fields(words(data[:, at : at + 4], "<u4"), 1, 1).astype(np.uint8)
    codes: Array = fields(data[:, at + 4 :], 4, 16) | high << np.uint8(4)
    return codes


def decode_q5_0(data: Array) -> Floats:
    return half(data, 0) * floats(_fives(data, 2), 16)


def decode_q5_1(data: Array) -> Floats:
    return half(data, 0) * floats(_fives(data, 4)) + half(data, 2)


def decode_q8_0(data: Array) -> Floats:
    return floats(words(data[:, 2:], "i1")) * half(data, 0)


def decode_mxfp4(data: Array) -> Floats:
    e = data[:, :1].astype(np.uint32)
    steps = np.where(e < 2, np.uint32(0x0020_0000) << np.minimum(e, 1), np.maximum(e, 1) - 1 << np.uint32(23)).astype(np.uint32).view(np.float32)
    values: Floats = steps * E2M1[fields(data[:, 1:], 4, 16)]
    return values


def decode_nvfp4(data: Array) -> Floats:
    e, m = data[:, :4] >> np.uint8(3) & np.uint8(15), floats(data[:, :4] & np.uint8(7))
    steps = np.where(e == 0, m * np.float32(2.0**-10), np.ldexp(np.float32(1) + m * EIGHTH, e.astype(np.int32) - 8))
    steps[data[:, :4] == 0x7F] = 0  # NaN, were it not ggml's
    return scaled(steps, E2M1[fields(data[:, 4:], 4, 8)])


def decode_q1_0(data: Array) -> Floats:
    return half(data, 0) * -_signs(data[:, 2:])


def decode_q2_0(data: Array) -> Floats:
    return half(data, 0) * floats(fields(data[:, 2:], 2, 1), 1)


def decode_q2_k(data: Array) -> Floats:
    small = data[:, :16]
    steps, lows = half(data, 80) * floats(small & 15), half(data, 82) * floats(small >> 4)
    return _lowered(steps, lows, fields(data[:, 16:80], 2, 32))


def _lowered(steps: Floats, lows: Floats, codes: Array) -> Floats:
    values = scaled(steps, codes).reshape(len(codes), lows.shape[1], -1)
    values -= lows[:, :, None]
    return values.reshape(len(codes), -1)


def decode_q3_k(data: Array) -> Floats:
    low, high = fields(data[:, 96:104], 4, 8), fields(data[:, 104:108], 2, 4)
    steps = half(data, 108) * floats(low | high << np.uint8(4), 32)
    codes = fields(data[:, 32:96], 2, 32) | fields(data[:, :32], 1, 32) << np.uint8(2)
    return scaled(steps, floats(codes, 4))


def _six_bits(data: Array) -> tuple[Floats, Floats]:
    """The eight scales and eight minima of 12 bytes."""
    d, m, rest = data[:, :4], data[:, 4:8], data[:, 8:12]
    high = np.uint8(0x30)
    scales = np.concatenate([d & np.uint8(63), rest & np.uint8(15) | d >> np.uint8(2) & high], axis=1)
    return floats(scales), floats(np.concatenate([m & np.uint8(63), rest >> np.uint8(4) | m >> np.uint8(2) & high], axis=1))


def decode_q4_k(data: Array) -> Floats:
    scales, minima = _six_bits(data[:, 4:16])
    return _lowered(half(data, 0) * scales, half(data, 2) * minima, fields(data[:, 16:], 4, 32))


def decode_q5_k(data: Array) -> Floats:
    scales, minima = _six_bits(data[:, 4:16])
    codes = fields(data[:, 48:], 4, 32) | fields(data[:, 16:48], 1, 32) << np.uint8(4)
    return _lowered(half(data, 0) * scales, half(data, 2) * minima, codes)


def decode_q6_k(data: Array) -> Floats:
    steps = half(data, 208) * floats(words(data[:, 192:208], "i1"))
    codes = fields(data[:, :128], 4, 64) | fields(data[:, 128:192], 2, 32) << np.uint8(4)
    return scaled(steps, floats(codes, 32))


def decode_iq4_nl(data: Array) -> Floats:
    values: Floats = half(data, 0) * IQ4[fields(data[:, 2:], 4, 16)]
    return values


def decode_iq4_xs(data: Array) -> Floats:
    high = fields(words(data[:, 2:4], "<u2"), 2, 1).astype(np.uint8)
    low = fields(data[:, 4:8], 4, 1)
    return scaled(half(data, 0) * floats(low | high << np.uint8(4), 32), IQ4[fields(data[:, 8:], 4, 16)])


def decode_tq1_0(data: Array) -> Floats:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:, None]
    parts = [(data[:, None, a:b] * powers[:count]).reshape(len(data), -1) for a, b, count in ((0, 32, 5), (32, 48, 5), (48, 52, 4))]
    digits = np.concatenate(parts, axis=1).astype(np.uint16) * np.uint16(3) >> np.uint16(8)
    return half(data, 52) * floats(digits, 1)


def decode_tq2_0(data: Array) -> Floats:
    return half(data, 64) * floats(fields(data[:, :64], 2, 32), 1)


def _signs(bits: Array) -> Floats:
    """A byte's bits as factors, 1 or -1."""
    factors: Floats = np.float32(1) - np.float32(2) * floats(fields(bits.reshape(len(bits), -1), 1, 1))
    return factors


def _signed_points(steps: Floats, grid: ggml_grids.Grid, indices: Array, signs: Array) -> Floats:
    points = ggml_grids.points(grid)[indices].reshape(len(indices), -1)
    values: Floats = scaled(steps, points) * _signs(signs)
    return values


def _quarter_steps(data: Array, small: Array, share: float) -> Floats:
    """d * (0.5 + s) * share, each product rounded."""
    steps: Floats = half(data, 0) * (np.float32(0.5) + floats(small)) * np.float32(share)
    return steps


def decode_iq2_xxs(data: Array) -> Floats:
    pairs = words(data[:, 2:], "<u4").reshape(len(data), -1, 2)
    tail = pairs[:, :, 1]
    indices = words(pairs[:, :, 0].reshape(len(data), -1), "u1")
    return _signed_points(_quarter_steps(data, tail >> np.uint32(28), 0.25), ggml_grids.IQ2_XXS, indices, _sevens(tail))


def _sevens(tail: Array) -> Array:
    """Four times seven signs of a word; the eighth makes their number even."""
    found: Array = PARITY[(tail[:, :, None] >> np.array([0, 7, 14, 21], np.uint32)) & np.uint32(127)]
    return found


def decode_iq2_xs(data: Array) -> Floats:
    pairs = words(data[:, 2:66], "<u2")
    steps = _quarter_steps(data, fields(data[:, 66:], 4, 1), 0.25)
    return _signed_points(steps, ggml_grids.IQ2_XS, pairs & np.uint16(511), PARITY[pairs >> np.uint16(9)])


def decode_iq2_s(data: Array) -> Floats:
    indices = data[:, 2:34].astype(np.uint16) | fields(data[:, 66:74], 2, 1).astype(np.uint16) << np.uint16(8)
    return _signed_points(_quarter_steps(data, fields(data[:, 74:], 4, 1), 0.25), ggml_grids.IQ2_S, indices, data[:, 34:66])


def decode_iq3_xxs(data: Array) -> Floats:
    tail = words(data[:, 66:], "<u4")
    return _signed_points(_quarter_steps(data, tail >> np.uint32(28), 0.5), ggml_grids.IQ3_XXS, data[:, 2:66], _sevens(tail))


def decode_iq3_s(data: Array) -> Floats:
    indices = data[:, 2:66].astype(np.uint16) | fields(data[:, 66:74], 1, 1).astype(np.uint16) << np.uint16(8)
    steps = half(data, 0) * (np.float32(1) + np.float32(2) * floats(fields(data[:, 106:], 4, 1)))
    return _signed_points(steps, ggml_grids.IQ3_S, indices, data[:, 74:106])


def _moved_points(steps: Floats, indices: Array, down: Array) -> Floats:
    """step * (point + or - 1/8)."""
    points = ggml_grids.points(ggml_grids.IQ1)[indices]
    delta = np.where(down, -EIGHTH, EIGHTH).reshape(len(indices), -1, 1)
    moved = points.reshape(len(indices), delta.shape[1], -1) + delta
    return scaled(steps, moved)


def decode_iq1_s(data: Array) -> Floats:
    high = words(data[:, 34:], "<u2")
    steps = half(data, 0) * (np.float32(2) * floats(high >> np.uint16(12) & np.uint16(7)) + np.float32(1))
    top = (high[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)).reshape(len(data), -1)
    return _moved_points(steps, data[:, 2:34].reshape(len(data), -1) | top << np.uint16(8), high & np.uint16(0x8000) != 0)


def decode_iq1_m(data: Array) -> Floats:
    small = words(data[:, 48:], "<u2")
    pieces = (small & np.uint16(0xF000)) >> np.array([12, 8, 4, 0], np.uint16)
    d = half(words(np.bitwise_or.reduce(pieces, axis=1)[:, None], "u1"), 0)
    shares = (small[:, :, None] >> np.array([0, 3, 6, 9], np.uint16) & np.uint16(7)).reshape(len(data), -1)
    nibbles = fields(data[:, 32:48], 4, 1)
    indices = data[:, :32] | (nibbles & np.uint8(7)).astype(np.uint16) << np.uint16(8)
    return _moved_points(d * (np.float32(2) * floats(shares) + np.float32(1)), indices, nibbles & np.uint8(8) != 0)


DECODE: Mapping[str, Callable[[Array], Floats]] = {
    "F32": decode_f32,
    "F16": decode_f16,
    "BF16": decode_bf16,
    "Q4_0": decode_q4_0,
    "Q4_1": decode_q4_1,
    "Q5_0": decode_q5_0,
    "Q5_1": decode_q5_1,
    "Q8_0": decode_q8_0,
    "MXFP4": decode_mxfp4,
    "NVFP4": decode_nvfp4,
    "Q1_0": decode_q1_0,
    "Q2_0": decode_q2_0,
    "Q2_K": decode_q2_k,
    "Q3_K": decode_q3_k,
    "Q4_K": decode_q4_k,
    "Q5_K": decode_q5_k,
    "Q6_K": decode_q6_k,
    "IQ4_NL": decode_iq4_nl,
    "IQ4_XS": decode_iq4_xs,
    "TQ1_0": decode_tq1_0,
    "TQ2_0": decode_tq2_0,
    "IQ2_XXS": decode_iq2_xxs,
    "IQ2_XS": decode_iq2_xs,
    "IQ2_S": decode_iq2_s,
    "IQ3_XXS": decode_iq3_xxs,
    "IQ3_S": decode_iq3_s,
    "IQ1_S": decode_iq1_s,
    "IQ1_M": decode_iq1_m,
}
