"""4-bit integers in groups along a row, on the CPU: compressed-tensors' pack-quantized and AutoAWQ's gemm layout, both ways.

Arithmetic and peers: docs/quantization.md; glmconv/kernels/reference.py is the same in plain torch, with the same bytes.

Weights are numpy arrays [rows, columns]: uint16 (the bits of bfloat16), float16 or float32; a group divides the columns. Both peers compute in the
weight's dtype, AutoAWQ in float16, each operation rounded: so do these kernels, in float32 with a rounding after each. Scales that are stored
in less than a float32 weight's dtype are rounded to it once, and what is computed with them is computed with them as stored.

NaN and Inf in a weight are reported, not refused: NaN is encoded as 0 would be, Inf as the largest of its sign, and both are left out of the
group's minimum and maximum. `limits` (low, high), float32 [rows, columns / group], replace those: what is beyond is cut off.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmconv.kernels.floats import Array, bits, carried, carrier, f32, fits, i32, infinity, magnitude, narrow, ordered, rounded, u8, u32, widen
from glmconv.kernels.jit import inner, kernel

Limits = tuple[Array, Array]
CHUNK = 1024  # columns of ROWS rows, with their words: both stay in a second-level cache
EPSILON = {"uint16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}  # the scale of an all-zero group: torch.finfo(dtype).eps
ROWS = 128  # rows of a weight whose AWQ words, side by side, fill a cache line of the output
NO_LIMITS = np.empty((0, 0), np.float32)
HALF = np.int16(0)  # what float16 travels as


def encode_packed(weight: Array, packed: Array, scales: Array, zeros: Array | None, group: int, limits: Limits | None = None) -> int:
    """compressed-tensors' pack-quantized; asymmetric if `zeros` is given.

    packed: int32 [rows, columns / 8], nibble k % 8 holds value + 8
    scales: [rows, columns / group] of the weight's dtype, or of any under a float32 weight; zeros: int8, of the same shape
    Returns row * columns + column of the first NaN or Inf, or -1.
    """
    low, high = limits or (NO_LIMITS, NO_LIMITS)
    points = np.empty((0, 0), np.int8) if zeros is None else zeros
    rows, columns = weight.shape
    fits(packed, "int32", rows, -(-columns // 8))
    stored = scales.dtype.name if weight.dtype == np.float32 and scales.dtype.name in EPSILON else weight.dtype.name
    _fit_groups(rows, columns, group, (scales, stored), *([] if zeros is None else [(zeros, "int8")]), *_typed(limits))
    words = packed.view(np.uint32)
    edges = np.float32(EPSILON[stored]), infinity(weight), infinity(scales)
    return int(_encode_packed(carried(weight), words, carried(scales), points, group, low, high, *edges))


def decode_packed(packed: Array, scales: Array, zeros: Array | None, out: Array, group: int) -> None:
    """(value - zero) * scale, rounded once to `out`'s dtype.

    compressed-tensors multiplies in the scale's dtype: the same wherever `out` has that dtype, since the product of 5 bits and a bfloat16 or float16
    is exact in float32, so that either rounds the true product once.
    """
    points = np.empty((0, 0), np.int8) if zeros is None else zeros
    rows, columns = out.shape
    fits(packed, "int32", rows, -(-columns // 8))
    _fit_groups(rows, columns, group, (scales, scales.dtype.name), *([] if zeros is None else [(zeros, "int8")]))
    target = carried(out)
    _decode_packed(packed.view(np.uint32), carried(scales), points, target, group, target.dtype.type(0))


def pack_zeros(zeros: Array) -> Array:
    """int8 [rows, groups] to int32 [ceil(rows / 8), groups]: zero + 8 in nibble row % 8, missing rows as 0."""
    padded = np.zeros((-(-zeros.shape[0] // 8) * 8, zeros.shape[1]), np.uint32)
    padded[: zeros.shape[0]] = (zeros.astype(np.int32) + 8).astype(np.uint32)
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    words: Array = np.bitwise_or.reduce(padded.reshape(-1, 8, zeros.shape[1]) << shifts, axis=1)
    return words.view(np.int32)


def unpack_zeros(packed: Array, rows: int | None = None) -> Array:
    """The inverse of `pack_zeros`: int8 [rows, groups], all that the words hold unless `rows` says fewer."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
    nibbles = (packed.view(np.uint32)[:, None, :] >> shifts) & np.uint32(15)
    zeros: Array = nibbles.reshape(-1, packed.shape[1])[:rows].astype(np.int8) - np.int8(8)
    return zeros


def encode_awq(weight: Array, qweight: Array, qzeros: Array, scales: Array, group: int, limits: Limits | None = None) -> int:
    """AutoAWQ's gemm layout, input by output; rows are a multiple of 8.

    qweight: int32 [columns, rows / 8], qzeros: int32 [columns / group, rows / 8], scales: float16 [columns / group, rows]; each may be a slice of the
    columns of a larger array. Nibble i of a word holds row 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i], unsigned.
    The weight is rounded to float16 first, beyond which it counts as Inf. Returns the index of the first NaN or Inf, or -1.
    """
    rows, columns = weight.shape
    _fit_awq(weight.shape, group, qweight, qzeros, scales)
    _fit_groups(rows, columns, group, *_typed(limits))
    first, halves = -1, np.empty((0 if weight.dtype == np.float16 else min(rows, ROWS), columns), np.float16)
    for top in range(0, rows, ROWS):
        strip, words = slice(top, min(top + ROWS, rows)), slice(top // 8, min(top + ROWS, rows) // 8)
        low, high = (edge[strip] for edge in limits or (NO_LIMITS, NO_LIMITS))
        part = weight[strip]
        if weight.dtype != np.float16:
            part = halves[: len(part)]
            _halve(carried(weight[strip]), carried(part), HALF)
        targets = qweight[:, words].view(np.uint32), qzeros[:, words].view(np.uint32), carried(scales[:, strip])
        found = int(_encode_awq(carried(part), *targets, group, low, high, infinity(part)))
        first = top * columns + found if first < 0 <= found else first
    return first


def decode_awq(qweight: Array, qzeros: Array, scales: Array, out: Array, group: int) -> None:
    """(value - zero) * scale, rounded once to the dtype of `out` [rows, columns]; AutoAWQ's own numbers if that is float16."""
    _fit_awq(out.shape, group, qweight, qzeros, scales)
    target = carried(out)
    _decode_awq(qweight.view(np.uint32), qzeros.view(np.uint32), carried(scales), target, group, target.dtype.type(0))


def _typed(limits: Limits | None) -> list[tuple[Array, str]]:
    return [(edge, "float32") for edge in limits or ()]


def _fit_groups(rows: int, columns: int, group: int, *arrays: tuple[Array, str]) -> None:
    if columns % group:
        raise ValueError(f"groups of {group} do not divide {columns} columns")
    for array, kind in arrays:
        fits(array, kind, rows, columns // group)


def _fit_awq(shape: tuple[int, ...], group: int, qweight: Array, qzeros: Array, scales: Array) -> None:
    rows, columns = shape
    if rows % 8 or columns % group:
        raise ValueError(f"groups of {group} and words of 8 do not divide [{rows}, {columns}]")
    fits(qweight, "int32", columns, rows // 8)
    fits(qzeros, "int32", columns // group, rows // 8)
    fits(scales, "float16", columns // group, rows)


@inner
def _extremes(weight: Any, infinite: Any) -> Any:
    """(smallest, largest, whether one is NaN or Inf), the values as bits; of the finite ones if there are others."""
    low = high = ordered(weight[0])
    for c in range(len(weight)):
        key = ordered(weight[c])
        low, high = min(low, key), max(high, key)
    spoiled = high >= infinite or low < -i32(infinite)
    if spoiled:
        low = high = ordered(carrier(0, weight[0]))
        seen = False
        for c in range(len(weight)):
            key = ordered(weight[c])
            if magnitude(weight[c]) < infinite:
                low, high = (min(low, key), max(high, key)) if seen else (key, key)
                seen = True
    return carrier(ordered(low), weight[0]), carrier(ordered(high), weight[0]), spoiled


@inner
def _cleaned(weight: Any, clean: Any, infinity_bits: Any) -> None:
    """A copy in which NaN is 0."""
    for c in range(len(weight)):
        clean[c] = carrier(0, weight[c]) if magnitude(weight[c]) > infinity_bits else weight[c]


@inner
def _first(weight: Any, infinite: Any) -> int:
    for c in range(len(weight)):
        if magnitude(weight[c]) >= infinite:
            return c
    return -1


@inner
def _whole(x: Any) -> Any:
    """|x| < 2^22 to the nearest integer, ties to even: the addition's own rounding."""
    return i32(u32(bits(x + f32(12582912)) - bits(f32(12582912))))


@inner
def _clamped(x: Any, low: Any, high: Any) -> Any:
    x = x if x < high else high
    return x if x > low else low


@inner
def _quantize_packed(weight: Any, scale: Any, zero: Any, values: Any) -> None:
    """round(clamp(w / s + z, -8, 7)) + 8, the quotient and the sum rounded to the weight's dtype."""
    for c in range(len(weight)):
        quotient = rounded(widen(weight[c]) / scale, weight[c])
        shifted = _clamped(rounded(quotient + zero, weight[c]), f32(-8), f32(7))
        values[c] = u8(u32(_whole(shifted) + i32(8)))


@inner
def _pack(values: Any, words: Any) -> None:
    """Eight bytes, each below 16, to the nibbles of a word, the first lowest."""
    eights = values.view(np.uint64)
    for c in range(len(words)):
        x = eights[c]
        x = (x | (x >> np.uint64(4))) & np.uint64(0x00FF00FF00FF00FF)
        x = (x | (x >> np.uint64(8))) & np.uint64(0x0000FFFF0000FFFF)
        words[c] = u32(x | (x >> np.uint64(16)))


@inner
def _unpack(words: Any, values: Any) -> None:
    eights = values.view(np.uint64)
    for c in range(len(words)):
        x = np.uint64(words[c])
        x = (x | (x << np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
        x = (x | (x << np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
        eights[c] = (x | (x << np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)


@inner
def _stored(scale: Any, ceiling: Any) -> Any:
    """A scale as it is stored, in the dtype whose Inf is `ceiling`: at most its largest value."""
    return min(widen(narrow(scale, ceiling)), widen(carrier(ceiling - 1, ceiling)))


@inner
def _symmetric(low: Any, high: Any, epsilon: Any, ceiling: Any) -> Any:
    scale = _stored(max(-low, high) / f32(7.5), ceiling)
    return scale if scale > f32(0) else epsilon


@inner
def _asymmetric(low: Any, high: Any, epsilon: Any, infinite: Any, ceiling: Any) -> Any:
    """(scale, zero point); a range beyond the dtype's largest counts as that."""
    extent = min(widen(narrow(high - low, infinite)), widen(carrier(infinite - 1, infinite)))
    scale = _stored(extent / f32(15), ceiling)
    if scale > f32(0):
        zero = _whole(_clamped(rounded(f32(-8) - rounded(low / scale, infinite), infinite), f32(-8), f32(7)))
        return scale, f32(zero)
    return epsilon, f32(7) if low < f32(0) else f32(0)  # compressed-tensors divides by the scale before it replaces it


@kernel
def _encode_packed(
    weight: Any, packed: Any, scales: Any, zeros: Any, group: int, lows: Any, highs: Any, epsilon: Any, infinite: Any, ceiling: Any
) -> int:
    rows, columns = weight.shape
    values, clean = np.zeros(packed.shape[1] * 8, np.uint8), np.empty(group, weight.dtype)
    first = -1
    for r in range(rows):
        for g in range(columns // group):
            source = weight[r, g * group : (g + 1) * group]
            least, most, spoiled = _extremes(source, infinite)
            low, high = widen(least), widen(most)
            if lows.size:
                low, high = widen(narrow(lows[r, g], infinite)), widen(narrow(highs[r, g], infinite))
            low, high = min(low, f32(0)), max(high, f32(0))
            zero = f32(0)
            if zeros.size:
                scale, zero = _asymmetric(low, high, epsilon, infinite, ceiling)
                zeros[r, g] = np.int8(zero)
            else:
                scale = _symmetric(low, high, epsilon, ceiling)
            scales[r, g] = narrow(scale, ceiling)
            if spoiled:
                if first < 0:
                    first = r * columns + g * group + _first(source, infinite)
                _cleaned(source, clean, infinite)
                _quantize_packed(clean, scale, zero, values[g * group : (g + 1) * group])
            else:
                _quantize_packed(source, scale, zero, values[g * group : (g + 1) * group])
        _pack(values, packed[r])
    return first


@kernel
def _decode_packed(packed: Any, scales: Any, zeros: Any, out: Any, group: int, like: Any) -> None:
    rows, columns = out.shape
    values = np.empty(packed.shape[1] * 8, np.uint8)
    for r in range(rows):
        _unpack(packed[r], values)
        for g in range(columns // group):
            scale, zero = widen(scales[r, g]), f32(8)
            if zeros.size:
                zero += f32(zeros[r, g])
            source, target = values[g * group : (g + 1) * group], out[r, g * group : (g + 1) * group]
            for c in range(group):
                target[c] = narrow((f32(source[c]) - zero) * scale, like)


@inner
def _awq_qparams(low: Any, high: Any, like: Any) -> Any:
    """(scale, zero point) from float16 values; a range beyond 65504, where AutoAWQ has Inf, counts as that."""
    extent = min(widen(narrow(high - low, like)), f32(65504))
    scale = widen(narrow(max(extent, f32(168 * 2.0**-24)) / f32(15), like))  # 168 * 2^-24: float16(1e-5)
    return scale, min(max(-_whole(_clamped(rounded(low / scale, like), f32(-64), f32(64))), i32(0)), i32(15))


@inner
def _quantize_awq(weight: Any, low: Any, high: Any, scale: Any, zero: Any, values: Any) -> None:
    """clamp(round(w / s) + z, 0, 15), the quotient rounded to float16. AutoAWQ reads the integers from its fake-quantized weight: the same."""
    for c in range(len(weight)):
        quotient = _clamped(rounded(_clamped(widen(weight[c]), low, high) / scale, weight[c]), f32(-64), f32(64))
        values[c] = u8(u32(min(max(i32(_whole(quotient) + zero), i32(0)), i32(15))))


@inner
def _words(values: Any, words: Any) -> None:
    """Eight rows of bytes below 16 to words: nibbles in the order 0, 2, 4, 6, 1, 3, 5, 7."""
    a, b, c, d, e, f, g, h = values[0], values[1], values[2], values[3], values[4], values[5], values[6], values[7]
    for k in range(len(words)):
        even = u32(u32(u32(a[k]) | u32(u32(c[k]) << u32(4))) | u32(u32(u32(e[k]) << u32(8)) | u32(u32(g[k]) << u32(12))))
        odd = u32(u32(u32(b[k]) | u32(u32(d[k]) << u32(4))) | u32(u32(u32(f[k]) << u32(8)) | u32(u32(h[k]) << u32(12))))
        words[k] = u32(even | u32(odd << u32(16)))


@kernel
def _halve(weight: Any, halves: Any, half: Any) -> None:
    for r in range(weight.shape[0]):
        source, target = weight[r], halves[r]
        for c in range(len(source)):
            target[c] = narrow(widen(source[c]), half)


@kernel
def _encode_awq(weight: Any, qweight: Any, qzeros: Any, scales: Any, group: int, lows: Any, highs: Any, infinite: Any) -> int:
    """At most ROWS rows of float16."""
    rows, columns = weight.shape
    step = group * max(1, CHUNK // group)
    values, zeros = np.empty((rows, step), np.uint8), np.empty((rows, step // group), np.uint8)
    words, clean = np.empty((rows // 8, step), np.uint32), np.empty(group, weight.dtype)
    first = -1
    for left in range(0, columns, step):
        right = min(left + step, columns)
        for r in range(rows):
            for g in range(left // group, right // group):
                source, target = weight[r, g * group : (g + 1) * group], values[r, g * group - left : (g + 1) * group - left]
                least, most, spoiled = _extremes(source, infinite)
                low, high = widen(least), widen(most)
                if lows.size:
                    low, high = widen(narrow(lows[r, g], infinite)), widen(narrow(highs[r, g], infinite))
                scale, zero = _awq_qparams(low, high, infinite)
                scales[g, r] = narrow(scale, infinite)
                zeros[r, g - left // group] = zero
                if spoiled:
                    at = r * columns + g * group + _first(source, infinite)
                    first = at if first < 0 else min(first, at)
                    _cleaned(source, clean, infinite)
                    _quantize_awq(clean, low, high, scale, zero, target)
                else:
                    _quantize_awq(source, low, high, scale, zero, target)
        _store_words(values, words, qweight[left:right])
        _store_words(zeros, words, qzeros[left // group : right // group])
    return first


@inner
def _store_words(values: Any, words: Any, target: Any) -> None:
    """Eight rows of values to one column of words each; stored line by line of the target."""
    lines, columns = target.shape
    for c in range(columns):
        _words(values[8 * c : 8 * c + 8], words[c, :lines])
    for k in range(lines):
        for c in range(columns):
            target[k, c] = words[c, k]


@kernel
def _decode_awq(qweight: Any, qzeros: Any, scales: Any, out: Any, group: int, like: Any) -> None:
    rows, columns = out.shape
    words = np.empty((ROWS // 8, group), np.uint32)
    for top in range(0, rows // 8, ROWS // 8):
        bottom = min(top + ROWS // 8, rows // 8)
        for g in range(columns // group):
            for k in range(group):
                for c in range(top, bottom):
                    words[c - top, k] = qweight[g * group + k, c]
            for c in range(top, bottom):
                for i in range(8):
                    row, shift = 8 * c + i, u32(4 * ((i >> 1) + (i & 1) * 4))  # the inverse of (0, 2, 4, 6, 1, 3, 5, 7)
                    scale, zero = widen(scales[g, row]), f32(u32(qzeros[g, c] >> shift) & u32(15))
                    source, target = words[c - top], out[row, g * group : (g + 1) * group]
                    for k in range(group):
                        target[k] = narrow((f32(i32(u32(source[k] >> shift) & u32(15))) - zero) * scale, like)
