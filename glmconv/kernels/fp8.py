"""FP8 on the CPU: bfloat16, float16 or float32 to E4M3 codes under float32 scales and back, each byte touched once.

E4M3FN: 1 sign, 4 exponent bits (bias 7), 3 mantissa bits; largest 448, smallest 2**-9, 0x7f and 0xff are NaN, no infinities (OCP FP8).
All rounding is to nearest even, and saturates. bfloat16 comes and goes as its bits in uint16. `reference.py` has the same in plain torch.

    division     scale = max(amax, 1e-12) / 448          slime's torch formula, clamped in the weight's dtype
    reciprocal   scale = max(amax, 1e-12) * fl(1/448)    the same as a GPU computes it (torch divides by a Python number so on CUDA)
    ue8m0        scale = 2 ** ceil(log2(max(amax, 1e-4) / 448))    DeepGEMM's per_block_cast_to_fp8
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmconv.kernels.jit import jit

Array = NDArray[Any]
LARGEST = np.float32(448)
SMALLEST = {"division": 1e-12, "reciprocal": 1e-12, "ue8m0": 1e-4}
BF16_1E_12 = np.float32(1.0018652574217413e-12)  # 1e-12 in bfloat16
RULES = {"division": 0, "reciprocal": 1, "ue8m0": 2}
INDEX = np.int64


@jit
def _power_of_two_up(value, bits, floats):
    """The next power of two at or above a positive float32, its exponent kept in 1..254."""
    floats[0] = value
    exponent = np.int64(bits[0] >> 23)
    if bits[0] & 0x7FFFFF:
        exponent += 1
    exponent = min(max(exponent, 1), 254)
    bits[0] = np.uint32(exponent << 23)
    return floats[0]


@jit
def _scale(amax, smallest, rule, bits, floats):
    amax = max(amax, smallest)
    if rule == 1:
        return np.float32(amax * np.float32(1.0 / 448.0))
    scale = np.float32(amax / np.float32(448))
    return _power_of_two_up(scale, bits, floats) if rule == 2 else scale


@jit
def _largest(weight, i0, i1, j0, j1, mask, infinite):
    """(largest magnitude among the finite, flat index of the first that is not): magnitudes are ordered as their bits are."""
    top = weight[i0, j0] & mask
    for i in range(i0, i1):
        for j in range(j0, j1):
            top = max(top, weight[i, j] & mask)
    if top < infinite:
        return top, INDEX(-1)
    top, bad = weight[i0, j0] & weight.dtype.type(0), INDEX(-1)
    for i in range(i0, i1):
        for j in range(j0, j1):
            found = weight[i, j] & mask
            if found < infinite:
                top = max(top, found)
            elif bad < 0:
                bad = INDEX(i) * weight.shape[1] + j
    return top, bad


@jit
def _to_codes(weight, codes, i, j0, j1, shift, scale, bits, floats, small_bits, small_floats):
    """One row's share of a block. Three short loops over memory that stays in the first cache, each of which becomes vector instructions."""
    count = j1 - j0
    for j in range(count):
        bits[j] = np.uint32(weight[i, j0 + j]) << shift
    for j in range(count):
        quotient = floats[j] / scale
        quotient = np.float32(448) if quotient > np.float32(448) else quotient
        quotient = np.float32(-448) if quotient < np.float32(-448) else quotient
        floats[j] = quotient
        small_floats[j] = abs(quotient) + np.float32(16384)  # its last bit is 2**-9: the addition rounds to E4M3's subnormals
    for j in range(count):
        magnitude = bits[j] & np.uint32(0x7FFFFFFF)
        sign = (bits[j] >> np.uint32(24)) & np.uint32(0x80)
        normal = ((magnitude + np.uint32(0x7FFFF) + ((magnitude >> np.uint32(20)) & np.uint32(1))) >> np.uint32(20)) - np.uint32(960)
        code = normal if magnitude >= np.uint32(0x3C800000) else small_bits[j] - np.uint32(0x46800000)
        code = np.uint32(0x7F) if magnitude > np.uint32(0x7F800000) else code
        codes[i, j0 + j] = np.uint8(sign | code)


@jit
def _encode(weight, codes, scales, bn, bk, rule, smallest, shift, mask, infinite, bits, small_bits):
    floats, small_floats = bits.view(np.float32), small_bits.view(np.float32)
    rows, columns = weight.shape
    first = INDEX(-1)
    for bi in range(scales.shape[0]):
        i0, i1 = bi * bn, min(rows, bi * bn + bn)
        for bj in range(scales.shape[1]):
            j0, j1 = bj * bk, min(columns, bj * bk + bk)
            top, bad = _largest(weight, i0, i1, j0, j1, mask, infinite)
            if bad >= 0 and (first < 0 or bad < first):
                first = bad
            bits[0] = np.uint32(top) << shift
            scale = _scale(floats[0], smallest, rule, bits, floats)
            scales[bi, bj] = scale
            for i in range(i0, i1):
                _to_codes(weight, codes, i, j0, j1, shift, scale, bits, floats, small_bits, small_floats)
    return first


def _bits(weight: Array) -> tuple[Array, np.uint32, Any, Any, np.float32]:
    """(values as bits, how far to shift them to be float32's, mask of the magnitude, bits of infinity, 1e-12 in this dtype)."""
    if weight.dtype == np.uint16:
        return weight, np.uint32(16), np.uint16(0x7FFF), np.uint16(0x7F80), BF16_1E_12
    plain = np.ascontiguousarray(weight, np.float32)  # every float16 is a float32; its own 1e-12 would be 0
    return plain.view(np.uint32), np.uint32(0), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.float32(1e-12)


def _smallest(rule: str, of_dtype: np.float32) -> np.float32:
    return np.float32(SMALLEST[rule]) if rule == "ue8m0" else of_dtype


def encode_block(weight: Array, codes: Array, scales: Array, block: tuple[int, int], rule: str) -> int:
    """Codes and scales of whole blocks.

    weight [rows, K]: bfloat16 bits (uint16), float16 or float32, from a block's first row on; codes uint8 [rows, K]; scales float32
    [ceil(rows/bn), ceil(K/bk)], ragged blocks as if padded with zeros. Returns the flat index of the first NaN or Inf, or -1. With such
    values the scale is that of the finite ones, Inf becomes +-448 and NaN the code NaN.
    """
    if not weight.size:
        return -1
    values, shift, mask, infinite, smallest = _bits(weight)
    bn, bk = (max(1, min(by, n)) for by, n in zip(block, weight.shape, strict=True))
    bits, small = np.empty(bk, np.uint32), np.empty(bk, np.uint32)
    return int(_encode(values, codes, scales, bn, bk, RULES[rule], _smallest(rule, smallest), shift, mask, infinite, bits, small))


def largest(weight: Array, rule: str) -> tuple[float, int]:
    """(the largest magnitude among the finite values, at least the rule's smallest; flat index of the first NaN or Inf, or -1)."""
    values, shift, mask, infinite, smallest = _bits(weight)
    top, bad = _largest(values, 0, values.shape[0], 0, values.shape[1], mask, infinite)
    amax = np.array([np.uint32(int(top) << int(shift))], np.uint32).view(np.float32)[0]
    return float(max(amax, _smallest(rule, smallest))), int(bad)


def scale_of(amax: float, rule: str) -> float:
    """The scale of a block with this largest magnitude."""
    bits = np.empty(1, np.uint32)
    return float(_scale(np.float32(amax), np.float32(0), RULES[rule], bits, bits.view(np.float32)))


@jit
def _encode_scaled(weight, codes, scale, shift, bits, small_bits):
    floats, small_floats = bits.view(np.float32), small_bits.view(np.float32)
    for i in range(weight.shape[0]):
        _to_codes(weight, codes, i, 0, weight.shape[1], shift, scale, bits, floats, small_bits, small_floats)


def encode_scaled(weight: Array, codes: Array, scale: float) -> int:
    """Codes under a given scale. Returns the flat index of the first NaN or Inf, or -1."""
    values, shift, mask, infinite, _ = _bits(weight)
    bits, small = np.empty(weight.shape[1], np.uint32), np.empty(weight.shape[1], np.uint32)
    _encode_scaled(values, codes, np.float32(scale), shift, bits, small)
    return int(_largest(values, 0, values.shape[0], 0, values.shape[1], mask, infinite)[1])


@jit
def _encode_mx(weight, codes, exponents, group, shift, mask, infinite, bits, small_bits):
    floats, small_floats = bits.view(np.float32), small_bits.view(np.float32)
    first = INDEX(-1)
    for i in range(weight.shape[0]):
        for g in range(exponents.shape[1]):
            j0 = g * group
            top, bad = _largest(weight, i, i + 1, j0, j0 + group, mask, infinite)
            if bad >= 0 and first < 0:
                first = bad
            whole = np.int64(np.uint32(top) << shift)
            # the exponent of amax, one more where its mantissa is 1.75 or above, less that of 448 (8); bias 127
            exponent = (whole >> 23) + (1 if (whole & 0x7FFFFF) >= 0x600000 else 0) - 8
            exponent = min(max(exponent, 0), 254)
            exponents[i, g] = np.uint8(exponent)
            bits[0] = np.uint32(exponent << 23) if exponent else np.uint32(0x400000)
            _to_codes(weight, codes, i, j0, j0 + group, shift, floats[0], bits, floats, small_bits, small_floats)
    return first


def encode_mx(weight: Array, codes: Array, exponents: Array, group: int = 32) -> int:
    """MXFP8: codes uint8 [rows, K] under exponents uint8 [rows, K/group] (bias 127), as compressed-tensors' mxfp8 chooses them.

    Returns the flat index of the first NaN or Inf, or -1.
    """
    values, shift, mask, infinite, _ = _bits(weight)
    bits, small = np.empty(group, np.uint32), np.empty(group, np.uint32)
    return int(_encode_mx(values, codes, exponents, group, shift, mask, infinite, bits, small))


@jit
def _decode(codes, scales, out, bn, bk, first_row, narrow, bits):
    floats = bits.view(np.float32)
    rows, columns = codes.shape
    top = np.uint8(0)
    for i in range(rows):
        si = (first_row + i) // bn
        for bj in range(scales.shape[1]):
            j0 = bj * bk
            count = min(columns, j0 + bk) - j0
            scale = scales[si, bj]
            for j in range(count):
                code = codes[i, j0 + j]
                top = max(top, code & np.uint8(0x7F))
                bits[j] = (np.uint32(code & np.uint8(0x7F)) << np.uint32(20)) | (np.uint32(code & np.uint8(0x80)) << np.uint32(24))
            for j in range(count):
                floats[j] = floats[j] * np.float32(2.0**120) * scale  # the first product is exact: E4M3's bias is 120 less than float32's
            if narrow:
                for j in range(count):
                    out[i, j0 + j] = (bits[j] + np.uint32(0x7FFF) + ((bits[j] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            else:
                for j in range(count):
                    out[i, j0 + j] = bits[j]
    return top == 0x7F


def decode_block(codes: Array, scales: Array, out: Array, block: tuple[int, int], first_row: int) -> int:
    """Code times scale in float32, rounded once to `out`'s dtype: bfloat16 bits (uint16), float16 or float32, [rows, K].

    codes uint8 [rows, K] are rows `first_row` and on of a weight whose float32 `scales` begin with that of row 0.
    Returns the flat index of the first code that is NaN, or -1.
    """
    if not codes.size:
        return -1
    bk = max(1, min(block[1], codes.shape[1]))
    whole = out if out.dtype == np.uint16 else np.empty(out.shape, np.uint32) if out.dtype == np.float16 else out.view(np.uint32)
    bad = _decode(codes, scales, whole, INDEX(min(block[0], 1 << 62)), bk, INDEX(first_row), out.dtype == np.uint16, np.empty(bk, np.uint32))
    if out.dtype == np.float16:
        with np.errstate(over="ignore"):  # beyond 65504 is Inf, as float16 has it
            out[:] = whole.view(np.float32).astype(np.float16)
    return int(np.flatnonzero((codes & 0x7F) == 0x7F)[0]) if bad else -1


def exponents_to_scales(exponents: Array) -> Array:
    """E8M0 (bias 127, 255 is NaN) as float32."""
    wide = exponents.astype(np.uint32)
    bits = np.where(wide == 0, np.uint32(0x400000), wide << 23)
    return np.where(wide == 255, np.uint32(0x7FC00000), bits).astype(np.uint32).view(np.float32)


def scales_to_exponents(scales: Array) -> Array:
    """float32 powers of two as E8M0. ValueError if one is none."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    exponents = np.where(bits == 0x400000, 0, bits >> 23)
    if not np.array_equal(exponents_to_scales(exponents.astype(np.uint8)), scales):
        raise ValueError("a scale is no power of two")
    return exponents.astype(np.uint8)
