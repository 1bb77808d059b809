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
INDEX, WORD, HALF = np.int64, np.int32, np.int16
STRIP = 1024  # columns that go through the loops at once


@jit
def _power_of_two_up(value, bits, floats):
    """The next power of two at or above a positive float32, its exponent kept in 1..254."""
    floats[0] = value
    exponent = INDEX(bits[0] >> 23)
    if bits[0] & 0x7FFFFF:
        exponent += 1
    exponent = min(max(exponent, 1), 254)
    bits[0] = WORD(exponent << 23)
    return floats[0]


@jit
def _scale(amax, smallest, rule, bits, floats):
    amax = max(amax, smallest)
    if rule == 1:
        return np.float32(amax * np.float32(1.0 / 448.0))
    scale = np.float32(amax / np.float32(448))
    return _power_of_two_up(scale, bits, floats) if rule == 2 else scale


@jit
def _fold(tops, j0, j1):
    """The largest of `tops` from j0 to j1, found by folding them in halves (vector instructions, unlike a running maximum); they are used up."""
    part = tops[j0:j1]
    count = j1 - j0
    while count > 1:
        half = (count + 1) // 2
        for j in range(count - half):
            part[j] = part[j + half] if part[j + half] > part[j] else part[j]
        count = half
    return np.uint32(part[0])


@jit
def _column_tops(weight, i0, i1, mask, tops):
    """The bits of each column's largest magnitude: magnitudes are ordered as their bits are."""
    count = weight.shape[1]
    for j in range(count):
        tops[j] = 0
    for i in range(i0, i1):
        row = weight[i]
        for j in range(count):
            found = row[j] & mask
            tops[j] = found if found > tops[j] else tops[j]


@jit
def _finite_top(weight, i0, i1, j0, j1, mask, infinite):
    """(bits of the largest finite magnitude, flat index of the first value that is not finite) of a block that has one."""
    top, bad = np.uint32(0), INDEX(-1)
    for i in range(i0, i1):
        for j in range(j0, j1):
            magnitude = np.uint32(weight[i, j] & mask)
            if magnitude < infinite:
                top = max(top, magnitude)
            elif bad < 0:
                bad = INDEX(i) * weight.shape[1] + j
    return top, bad


@jit
def _to_codes(weight, codes, i, shift, spread, bits, small):
    """One row under each column's scale: short loops over memory that stays in the first cache, in 32-bit words, so that they become vectors."""
    floats, small_floats = bits.view(np.float32), small.view(np.float32)
    columns = weight.shape[1]
    for j0 in range(0, columns, STRIP):
        count = min(STRIP, columns - j0)
        row, out, scales = weight[i, j0 : j0 + count], codes[i, j0 : j0 + count], spread[j0 : j0 + count]
        for j in range(count):
            bits[j] = WORD(WORD(row[j]) << shift)
        for j in range(count):
            quotient = floats[j] / scales[j]
            quotient = np.float32(448) if quotient > np.float32(448) else quotient
            quotient = np.float32(-448) if quotient < np.float32(-448) else quotient
            floats[j] = quotient
            small_floats[j] = abs(quotient) + np.float32(16384)  # its last bit is 2**-9: the addition rounds to E4M3's subnormals
        for j in range(count):
            word = bits[j]
            magnitude = WORD(word & WORD(0x7FFFFFFF))
            sign = WORD(WORD(word >> WORD(24)) & WORD(0x80))
            odd = WORD(WORD(magnitude >> WORD(20)) & WORD(1))
            normal = WORD(WORD(WORD(WORD(magnitude + WORD(0x7FFFF)) + odd) >> WORD(20)) - WORD(960))  # the exponent's bias, 127, becomes 7
            code = normal if magnitude >= WORD(0x3C800000) else WORD(small[j] - WORD(0x46800000))
            code = WORD(0x7F) if magnitude > WORD(0x7F800000) else code
            out[j] = np.uint8(sign | code)


@jit
def _encode(weight, codes, scales, bn, bk, rule, smallest, shift, mask, infinite, bits, small, tops, spread):
    floats = bits.view(np.float32)
    rows, columns = weight.shape
    first = INDEX(-1)
    for bi in range(scales.shape[0]):
        i0, i1 = bi * bn, min(rows, bi * bn + bn)
        _column_tops(weight, i0, i1, mask, tops)
        for bj in range(scales.shape[1]):
            j0, j1 = bj * bk, min(columns, bj * bk + bk)
            top = _fold(tops, j0, j1)
            if top >= infinite:
                top, bad = _finite_top(weight, i0, i1, j0, j1, mask, infinite)
                first = bad if first < 0 or bad < first else first
            bits[0] = WORD(WORD(top) << shift)
            scale = _scale(floats[0], smallest, rule, bits, floats)
            scales[bi, bj] = scale
            spread[j0:j1] = scale
        for i in range(i0, i1):
            _to_codes(weight, codes, i, shift, spread, bits, small)
    return first


class Scratch:
    """A row's worth of memory for the loops."""

    def __init__(self, weight: Array) -> None:
        columns = weight.shape[1]
        self.bits, self.small = np.empty(STRIP, np.int32), np.empty(STRIP, np.int32)
        self.tops, self.spread = np.empty(columns, weight.dtype), np.empty(columns, np.float32)


def _bits(weight: Array) -> tuple[Array, np.int32, Any, Any, np.float32]:
    """(values as bits, how far to shift them to be float32's, mask of the magnitude, bits of infinity, 1e-12 in this dtype)."""
    if weight.dtype == np.uint16:
        return weight, np.int32(16), np.uint16(0x7FFF), np.uint16(0x7F80), BF16_1E_12
    plain = np.ascontiguousarray(weight, np.float32)  # every float16 is a float32; its own 1e-12 would be 0
    return plain.view(np.uint32), np.int32(0), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000), np.float32(1e-12)


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
    use, smallest = Scratch(values), _smallest(rule, smallest)
    return int(
        _encode(values, codes, scales, bn, bk, RULES[rule], smallest, shift, mask, infinite, use.bits, use.small, use.tops, use.spread)
    )  # fmt: skip


def _top(values: Array, mask: Any, infinite: Any) -> tuple[int, int]:
    """(bits of the largest finite magnitude, flat index of the first value that is not finite or -1) of all rows."""
    tops = np.empty(values.shape[1], values.dtype)
    _column_tops(values, 0, values.shape[0], mask, tops)
    top = int(_fold(tops, 0, values.shape[1]))
    if top < infinite:
        return top, -1
    top, bad = _finite_top(values, 0, values.shape[0], 0, values.shape[1], mask, infinite)
    return int(top), int(bad)


def largest(weight: Array, rule: str) -> tuple[float, int]:
    """(the largest magnitude among the finite values, at least the rule's smallest; flat index of the first NaN or Inf, or -1)."""
    values, shift, mask, infinite, smallest = _bits(weight)
    top, bad = _top(values, mask, infinite)
    amax = np.array([np.uint32(int(top) << int(shift))], np.uint32).view(np.float32)[0]
    return float(max(amax, _smallest(rule, smallest))), int(bad)


def scale_of(amax: float, rule: str) -> float:
    """The scale of a block with this largest magnitude."""
    bits = np.empty(1, np.int32)
    return float(_scale(np.float32(amax), np.float32(0), RULES[rule], bits, bits.view(np.float32)))


@jit
def _encode_scaled(weight, codes, shift, bits, small, spread):
    for i in range(weight.shape[0]):
        _to_codes(weight, codes, i, shift, spread, bits, small)


def encode_scaled(weight: Array, codes: Array, scale: float) -> int:
    """Codes under a given scale. Returns the flat index of the first NaN or Inf, or -1."""
    values, shift, mask, infinite, _ = _bits(weight)
    use = Scratch(values)
    use.spread[:] = scale
    _encode_scaled(values, codes, shift, use.bits, use.small, use.spread)
    return _top(values, mask, infinite)[1]


@jit
def _encode_mx(weight, codes, exponents, group, shift, mask, infinite, bits, small, tops, spread):
    floats = bits.view(np.float32)
    first = INDEX(-1)
    for i in range(weight.shape[0]):
        _column_tops(weight, i, i + 1, mask, tops)
        for g in range(exponents.shape[1]):
            j0 = g * group
            top = _fold(tops, j0, j0 + group)
            if top >= infinite:
                top, bad = _finite_top(weight, i, i + 1, j0, j0 + group, mask, infinite)
                first = bad if first < 0 else first
            whole = INDEX(top) << INDEX(shift)
            # the exponent of amax, one more where its mantissa is 1.75 or above, less that of 448 (8); bias 127
            exponent = (whole >> 23) + (1 if (whole & 0x7FFFFF) >= 0x600000 else 0) - 8
            exponent = min(max(exponent, 0), 254)
            exponents[i, g] = np.uint8(exponent)
            bits[0] = WORD(exponent << 23) if exponent else WORD(0x400000)
            spread[j0 : j0 + group] = floats[0]
        _to_codes(weight, codes, i, shift, spread, bits, small)
    return first


def encode_mx(weight: Array, codes: Array, exponents: Array, group: int = 32) -> int:
    """MXFP8: codes uint8 [rows, K] under exponents uint8 [rows, K/group] (bias 127), as compressed-tensors' mxfp8 chooses them.

    Returns the flat index of the first NaN or Inf, or -1.
    """
    values, shift, mask, infinite, _ = _bits(weight)
    use = Scratch(values)
    return int(_encode_mx(values, codes, exponents, group, shift, mask, infinite, use.bits, use.small, use.tops, use.spread))


@jit
def _decode(codes, scales, out, bn, bk, first_row, narrow, bits, halves, seen, spread):
    """Whether a code was NaN. Code -> float32 of 2**-120 of its value (E4M3's bias is 120 less) -> times 2**120, exactly -> times scale."""
    floats = bits.view(np.float32)
    rows, columns = codes.shape
    seen[:] = 0
    last = INDEX(-1)
    for i in range(rows):
        si = (first_row + i) // bn
        if si != last:
            last = si
            for bj in range(scales.shape[1]):
                spread[bj * bk : min(columns, bj * bk + bk)] = scales[si, bj]
        for j0 in range(0, columns, STRIP):
            count = min(STRIP, columns - j0)
            row, to, factors = codes[i, j0 : j0 + count], out[i, j0 : j0 + count], spread[j0 : j0 + count]
            for j in range(count):
                code = HALF(row[j])
                magnitude = HALF(code & HALF(0x7F))
                seen[j] = HALF(seen[j] | HALF(magnitude + HALF(1)))  # 0x80 from NaN alone
                halves[j] = HALF(HALF(magnitude << HALF(4)) | HALF(HALF(code & HALF(0x80)) << HALF(8)))
            for j in range(count):
                bits[j] = WORD(WORD(halves[j]) << WORD(16))
            for j in range(count):
                floats[j] = floats[j] * np.float32(2.0**120) * factors[j]
            if narrow:
                for j in range(count):
                    odd = WORD(WORD(bits[j] >> WORD(16)) & WORD(1))
                    to[j] = np.uint16(WORD(WORD(bits[j] + WORD(0x7FFF)) + odd) >> WORD(16))
            else:
                for j in range(count):
                    to[j] = np.uint32(bits[j])
    bad = HALF(0)
    for j in range(STRIP):
        bad |= seen[j]
    return bad >= 0x80


def decode_block(codes: Array, scales: Array, out: Array, block: tuple[int, int], first_row: int) -> int:
    """Code times scale in float32, rounded once to `out`'s dtype: bfloat16 bits (uint16), float16 or float32, [rows, K].

    codes uint8 [rows, K] are rows `first_row` and on of a weight whose float32 `scales` begin with that of row 0.
    Returns the flat index of the first code that is NaN, or -1.
    """
    if not codes.size:
        return -1
    bk = max(1, min(block[1], codes.shape[1]))
    whole = out if out.dtype == np.uint16 else np.empty(out.shape, np.uint32) if out.dtype == np.float16 else out.view(np.uint32)
    bits, halves, seen = np.empty(STRIP, np.int32), np.empty(STRIP, np.int16), np.empty(STRIP, np.int16)
    spread, bn = np.empty(codes.shape[1], np.float32), INDEX(min(block[0], 1 << 62))
    bad = _decode(codes, scales, whole, bn, bk, INDEX(first_row), out.dtype == np.uint16, bits, halves, seen, spread)
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
