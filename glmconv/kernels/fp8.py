"""float8 e4m3fn with float32 scales, on the CPU: each weight is read once from memory, each code and scale written once.

Arithmetic and peers: docs/quantization.md; glmconv/kernels/reference.py is the same in plain torch, with the same bytes.

Weights are numpy arrays [rows, columns]: uint16 (the bits of bfloat16), float16 or float32. A block is (rows, columns) of any size: blocks on the
right and bottom edge may be cut short, which changes nothing, since what they lack counts as 0. Channel: (1, columns). MX: (1, 32).

NaN and Inf in a weight are reported, not refused: NaN becomes the code NaN with its sign, Inf becomes +-448, and scales come from the finite
values alone, so that the other values of the block keep their codes.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from glmconv.kernels.floats import Array, bits, carried, f32, fits, infinity, magnitude, narrow, real, u8, u32, widen
from glmconv.kernels.jit import inner, kernel

Rule = Literal["division", "reciprocal", "ue8m0"]
RULES = ("division", "reciprocal", "ue8m0")
MX = 3  # a rule that only encode_mx has
LARGEST = 448.0
STRIP = 1 << 17  # bytes of weight that are measured, then encoded while they are in the second-level cache


def encode_block(weight: Array, codes: Array, scales: Array, block: tuple[int, int], rule: Rule) -> int:
    """Encode rows that begin where a block begins.

    codes:  uint8 [rows, columns], scales: float32 [ceil(rows / block[0]), ceil(columns / block[1])]; both are overwritten
    rule:   "division"    scale = amax / 448 (slime on a CPU, byte for byte, with its clamp of amax at 1e-12 in the weight's dtype)
            "reciprocal"  scale = amax * float32(1 / 448) (the same on CUDA)
            "ue8m0"       scale = the power of two at or above max(amax, 1e-4) / 448 (DeepGEMM, SGLang, vLLM)
    Returns row * columns + column of the first NaN or Inf, or -1.
    """
    return _encode(weight, codes, scales, block, RULES.index(rule), floor_of(weight, rule))


def largest(weight: Array, rule: Rule) -> tuple[float, int]:
    """The largest finite magnitude, at least the rule's floor, and the index of the first NaN or Inf or -1: pieces of a tensor, then their max."""
    amax, first = _largest(carried(weight), infinity(weight)) if weight.size else (0, -1)
    return max(float(amax), float(floor_of(weight, rule))), int(first)


def scale_of(amax: float, rule: Rule) -> np.float32:
    """The scale for values up to `amax`, which `largest` gave."""
    scale: np.float32 = f32(_scale(f32(amax), RULES.index(rule)))
    return scale


def encode_scaled(weight: Array, codes: Array, scale: float) -> int:
    """Encode with a scale that is known (per tensor). Returns the index of the first NaN or Inf, or -1."""
    fits(codes, "uint8", *weight.shape)
    return int(_encode_scaled(carried(weight), codes, np.float32(scale), infinity(weight))) if weight.size else -1


def encode_mx(weight: Array, codes: Array, exponents: Array, group: int = 32) -> int:
    """MXFP8 as compressed-tensors writes it: exponents uint8 [rows, ceil(columns / group)], a scale is 2^(exponent - 127).

    The exponent is that of amax, one more from 1.75 on, minus 8; at least 0, which is also what an all-zero group gets.
    """
    scales = np.empty(exponents.shape, np.float32)
    first = _encode(weight, codes, scales, (1, group), MX, np.float32(0))
    exponents[...] = scales.view(np.uint32) >> 23
    return first


def decode_block(codes: Array, scales: Array, out: Array, block: tuple[int, int], first_row: int) -> int:
    """code * scale in float32, rounded once to `out`'s dtype (uint16: bfloat16, float16, float32).

    codes:  uint8 [rows, columns], the rows from `first_row` on of a weight
    scales: float32, the grid of the whole weight; they must be finite, or what they touch becomes NaN or Inf
    Per channel: block (1, columns); per tensor: a block that no tensor exceeds.
    Returns the index of the first NaN code (it decodes to NaN with its sign), or -1.
    """
    rows, columns = codes.shape
    fits(out, out.dtype.name, rows, columns)
    if rows and columns:
        fits(scales, "float32", (first_row + rows - 1) // block[0] + 1, (columns - 1) // block[1] + 1)
    out = carried(out)
    return int(_decode_block(codes, scales, out, block[0], block[1], first_row, out.dtype.type(0)))


def exponents_to_scales(exponents: Array) -> Array:
    """e8m0 bytes to float32: 2^(e - 127), which is subnormal for 0, and NaN for 255."""
    scales = (exponents.astype(np.uint32) << 23).view(np.float32)
    scales[exponents == 0] = np.float32(2.0**-127)
    scales[exponents == 255] = np.nan
    return scales


def floor_of(weight: Array, rule: Rule) -> np.float32:
    """What amax is at least: rounded to the weight's dtype, except in float16, where it would round to 0 and slime would divide by it."""
    floor: np.float32 = f32(1e-4 if rule == "ue8m0" else 141 * 2.0**-47 if weight.dtype == np.uint16 else 1e-12)
    return floor


def _encode(weight: Array, codes: Array, scales: Array, block: tuple[int, int], rule: int, floor: np.float32) -> int:
    if not weight.size:
        return -1
    height, length = (min(size, limit) for size, limit in zip(block, weight.shape, strict=True))
    fits(codes, "uint8", *weight.shape)
    fits(scales, "float32", -(-weight.shape[0] // height), -(-weight.shape[1] // length))
    width = length * max(1, STRIP // (height * length * weight.itemsize))
    peaks = np.empty(min(width, weight.shape[1]), weight.dtype)
    return int(_encode_block(carried(weight), codes, scales, height, length, rule, floor, carried(peaks), infinity(weight)))


@kernel
def _scale(amax: Any, rule: int) -> Any:
    if rule == MX:
        exponent = u32(u32(bits(amax) + u32(1 << 21)) >> u32(23))
        return real(u32(max(exponent, u32(8)) - u32(8)) << u32(23)) if exponent > u32(8) else f32(2.0**-127)
    if rule == 1:
        return f32(amax * f32(1 / LARGEST))
    scale = f32(amax / f32(LARGEST))
    if rule == 2:
        b = bits(scale)
        exponent = u32(b >> u32(23)) + (u32(1) if u32(b & u32(0x7F_FFFF)) != u32(0) else u32(0))
        return real(u32(min(max(u32(exponent), u32(1)), u32(254)) << u32(23)))
    return scale


@inner
def _code(a: Any) -> Any:
    """The bits of a positive float32 to e4m3, to nearest even, saturating.

    A power of two 2^20 times the value's own (at least the smallest normal's, 2^-6) is added: the sum's last bit is e4m3's, so the addition rounds.
    """
    a = min(a, u32(0x43E0_0000))  # 448
    own = u32(max(u32(a & u32(0x7F80_0000)), u32(0x3C80_0000)))
    step = u32(own + u32(20 << 23))
    fraction = u32(bits(real(a) + real(step)) - step)
    return u32(u32(u32(own >> u32(20)) + fraction) - u32((120 + 1) << 3))


@inner
def _encode_row(weight: Any, divisors: Any, codes: Any) -> None:
    """cast(clamp(w / s)), s column by column. ue8m0's w * (1 / s) is the same, since 1 / s is exact."""
    for c in range(len(weight)):
        w = bits(widen(weight[c]))
        quotient = real(u32(w & u32(0x7FFF_FFFF))) / divisors[c]
        codes[c] = u8(u32(_code(bits(quotient)) | u32(u32(w >> u32(24)) & u32(0x80))))


@inner
def _mend_row(weight: Any, codes: Any, infinite: Any) -> int:
    """Give NaN its code; returns the column of the first NaN or Inf, or -1."""
    first = -1
    for c in range(len(weight) - 1, -1, -1):
        if magnitude(weight[c]) >= infinite:
            first = c
        if magnitude(weight[c]) > infinite:
            codes[c] = u8(u32(0x7F) | u32(u32(bits(widen(weight[c])) >> u32(24)) & u32(0x80)))
    return first


@inner
def _peak(weight: Any) -> Any:
    """The largest magnitude of one value or more."""
    most = magnitude(weight[0])
    for c in range(len(weight)):
        most = max(most, magnitude(weight[c]))
    return most


@inner
def _peaks(weight: Any, peaks: Any) -> None:
    """The largest magnitude of each column so far, with one more row."""
    for c in range(len(peaks)):
        peaks[c] = max(peaks[c], magnitude(weight[c]))


@inner
def _finite_peaks(weight: Any, peaks: Any, infinite: Any) -> None:
    for c in range(len(peaks)):
        m = magnitude(weight[c])
        if m < infinite:
            peaks[c] = max(peaks[c], m)


@inner
def _earlier(first: int, other: int) -> int:
    return other if first < 0 else min(first, other)


@kernel
def _encode_block(weight: Any, codes: Any, scales: Any, height: int, length: int, rule: int, floor: Any, peaks: Any, infinite: Any) -> int:
    rows, columns = weight.shape
    divisors = np.empty(len(peaks), np.float32)
    first = -1
    for top in range(0, rows, height):
        for left in range(0, columns, len(peaks)):
            bottom, right = min(top + height, rows), min(left + len(peaks), columns)
            width = right - left
            peaks[:] = 0
            for r in range(top, bottom):
                _peaks(weight[r, left:right], peaks[:width])
            spoiled = _peak(peaks) >= infinite
            if spoiled:
                peaks[:] = 0
                for r in range(top, bottom):
                    _finite_peaks(weight[r, left:right], peaks[:width], infinite)
            for begin in range(0, width, length):
                end = min(begin + length, width)
                scale = _scale(max(widen(_peak(peaks[begin:end])), floor), rule)
                scales[top // height, (left + begin) // length] = scale
                divisors[begin:end] = scale
            for r in range(top, bottom):
                _encode_row(weight[r, left:right], divisors[:width], codes[r, left:right])
                if spoiled:
                    found = _mend_row(weight[r, left:right], codes[r, left:right], infinite)
                    if found >= 0:
                        first = _earlier(first, r * columns + left + found)
    return first


@kernel
def _encode_scaled(weight: Any, codes: Any, scale: Any, infinite: Any) -> int:
    rows, columns = weight.shape
    divisors = np.full(columns, scale, np.float32)
    first = -1
    for r in range(rows):
        row = weight[r]
        most = _peak(row)
        _encode_row(row, divisors, codes[r])
        if most >= infinite:
            found = _mend_row(row, codes[r], infinite)
            if found >= 0:
                first = _earlier(first, r * columns + found)
    return first


@kernel
def _largest(weight: Any, infinite: Any) -> tuple[Any, int]:
    rows, columns = weight.shape
    amax, first = f32(0), -1
    for r in range(rows):
        row = weight[r]
        most = _peak(row)
        if most < infinite:
            amax = max(amax, widen(most))
            continue
        for c in range(columns):
            if magnitude(row[c]) < infinite:
                amax = max(amax, widen(magnitude(row[c])))
            elif first < 0:
                first = r * columns + c
    return amax, first


@inner
def _decode_row(codes: Any, scales: Any, out: Any, like: Any) -> None:
    for c in range(len(codes)):
        code = u32(codes[c])
        value = real(u32(u32(u32(code & u32(0x7F)) << u32(20)) | u32(u32(code & u32(0x80)) << u32(24)))) * f32(2.0**120)  # exact, subnormals too
        out[c] = narrow(value * scales[c], like)


@inner
def _mend_decoded_row(codes: Any, out: Any, like: Any) -> int:
    """Give the code NaN its NaN; returns the column of the first, or -1."""
    first = -1
    for c in range(len(codes) - 1, -1, -1):
        if (codes[c] & 0x7F) == 0x7F:
            first = c
            out[c] = narrow(real(u32(u32(0x7FC0_0000) | u32(u32(codes[c] & 0x80) << u32(24)))), like)
    return first


@kernel
def _decode_block(codes: Any, scales: Any, out: Any, height: int, length: int, first_row: int, like: Any) -> int:
    rows, columns = codes.shape
    factors = np.empty(columns, np.float32)
    first, expanded = -1, -1
    for r in range(rows):
        line = (first_row + r) // height
        if line != expanded:
            expanded = line
            for begin in range(0, columns, length):
                factors[begin : min(begin + length, columns)] = scales[line, begin // length]
        row = codes[r]
        _decode_row(row, factors, out[r], like)
        most = u8(0)
        for c in range(columns):
            most = max(most, u8(row[c] & u8(0x7F)))
        if most == 0x7F:
            found = _mend_decoded_row(row, out[r], like)
            first = r * columns + found if first < 0 else first
    return first
