"""Four-bit integers in groups on the CPU, rounded to nearest, with the arithmetic of the peers whose files these are.

    pack-quantized, symmetric     scale = amax / 7.5                     code = rnd(w / scale)             -8..7
    pack-quantized, asymmetric    scale = (max - min) / 15               code = rnd(w / scale + zero)      min <= 0 <= max
                                  zero  = rnd(clamp(-8 - min / scale))
    awq                           scale = max(max - min, 1e-5) / 15      code = rnd(w / scale) + zero      0..15
                                  zero  = clamp(-rnd(min / scale))

compressed-tensors computes each operation in the weight's dtype, AutoAWQ in float16: so do these, by rounding each float32 result to it, and
AutoAWQ quantizes twice, the second time what the first gave. Rounding is to nearest even. Sources: compressed-tensors 0.20 (calculate_qparams,
quantize, pack_to_int32), AutoAWQ 0.2.9 (pseudo_quantize_tensor, WQLinear_GEMM.from_linear).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmconv.kernels.jit import jit

Array = NDArray[Any]
Limits = tuple[Array, Array]  # lowest and highest value of each group, float32 [rows, groups]: searched ones take the place of min and max
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
EPSILON = {FLOAT32: np.float32(2**-23), BFLOAT16: np.float32(2**-7), FLOAT16: np.float32(2**-10)}
PACK = 8
WORD = np.int32
TILE = 128  # rows whose words fill a cache line of AutoAWQ's layout
NO_LIMITS = np.empty((0, 0), np.float32)


@jit
def _round(bits, count, precision, small):
    """float32 values to the nearest of a narrower dtype, in place: in 32-bit words and without branches, so that it becomes vector instructions."""
    if precision == BFLOAT16:
        for j in range(count):
            odd = WORD(WORD(bits[j] >> WORD(16)) & WORD(1))
            bits[j] = WORD(WORD(WORD(bits[j] + WORD(0x7FFF)) + odd) & WORD(-0x10000))
    elif precision == FLOAT16:
        floats, words = bits.view(np.float32), small.view(np.int32)
        for j in range(count):  # below 2**-14 float16's last bit is 2**-24, as float32's is at 0.75
            small[j] = (abs(floats[j]) + np.float32(0.75)) - np.float32(0.75)
        for j in range(count):
            word = bits[j]
            magnitude = WORD(word & WORD(0x7FFFFFFF))
            odd = WORD(WORD(magnitude >> WORD(13)) & WORD(1))
            normal = WORD(WORD(WORD(magnitude + WORD(0xFFF)) + odd) & WORD(-0x2000))
            normal = WORD(0x7F800000) if normal > WORD(0x477FE000) else normal  # beyond 65504
            normal = magnitude if magnitude > WORD(0x7F800000) else normal
            normal = words[j] if magnitude < WORD(0x38800000) else normal
            bits[j] = WORD(normal | WORD(word & WORD(-0x80000000)))


@jit
def _rounded(value, one, precision, small):
    floats = one.view(np.float32)
    floats[0] = value
    _round(one, 1, precision, small)
    return floats[0]


@jit
def _load(weight, i, shift, bits, precision, small):
    """A row's values as float32 of the given precision; the column of the first that is NaN or Inf (they count as 0), or -1."""
    row = weight[i]
    count = len(row)
    for j in range(count):
        bits[j] = WORD(WORD(row[j]) << shift)
    if precision == FLOAT16:
        _round(bits, count, precision, small)
    worst = WORD(0)
    for j in range(count):
        magnitude = WORD(bits[j] & WORD(0x7FFFFFFF))
        worst = magnitude if magnitude > worst else worst
    bad = np.int64(-1)
    if worst >= WORD(0x7F800000):
        for j in range(count):
            if WORD(bits[j] & WORD(0x7FFFFFFF)) >= WORD(0x7F800000):
                bad = np.int64(j) if bad < 0 else bad
                bits[j] = 0
    return bad


@jit
def _ranges(bits, group, order, low, high):
    """The least and the largest value of each group. As whole numbers that are ordered as the floats are, they make vector instructions."""
    floats = order.view(np.float32)
    for j in range(len(bits)):
        order[j] = WORD(bits[j] ^ WORD(WORD(bits[j] >> WORD(31)) & WORD(0x7FFFFFFF)))
    for g in range(len(bits) // group):
        values = order[g * group : g * group + group]
        least = most = values[0]
        for j in range(group):
            least, most = min(least, values[j]), max(most, values[j])
        order[0] = WORD(least ^ WORD(WORD(least >> WORD(31)) & WORD(0x7FFFFFFF)))  # the same step leads back; group 0 has been seen
        low[g] = floats[0]
        order[0] = WORD(most ^ WORD(WORD(most >> WORD(31)) & WORD(0x7FFFFFFF)))
        high[g] = floats[0]


@jit
def _encode_packed(weight, packed, scales, zeros, asymmetric, group, lows, highs, shift, precision, epsilon, rows):
    bits, one, low, high, spread, offset, small, _ = rows
    floats = bits.view(np.float32)
    first = np.int64(-1)
    columns = weight.shape[1]
    for i in range(weight.shape[0]):
        bad = _load(weight, i, shift, bits, precision, small)
        first = np.int64(i) * columns + bad if bad >= 0 and first < 0 else first
        _ranges(bits, group, small.view(np.int32), low, high)
        for g in range(scales.shape[1]):
            least, most = (lows[i, g], highs[i, g]) if lows.shape[0] else (low[g], high[g])
            least, most = min(least, np.float32(0)), max(most, np.float32(0))
            zero = np.float32(0)
            if asymmetric:
                span = _rounded(most - least, one, precision, small)
                scale = _rounded(span / np.float32(15), one, precision, small)
                if scale != 0:
                    ratio = _rounded(least / scale, one, precision, small)
                    zero = _rounded(np.float32(-8) - ratio, one, precision, small)
                    zero = np.float32(round(min(max(zero, np.float32(-8)), np.float32(7))))
                zeros[i, g] = np.int8(zero)
            else:
                scale = _rounded(max(-least, most) / np.float32(7.5), one, precision, small)
            scale = epsilon if scale == 0 else scale
            scales[i, g] = scale
            spread[g * group : g * group + group] = scale
            offset[g * group : g * group + group] = zero
        for j in range(columns):
            floats[j] = floats[j] / spread[j]
        _round(bits, columns, precision, small)
        if asymmetric:
            for j in range(columns):
                floats[j] = floats[j] + offset[j]
            _round(bits, columns, precision, small)
        for j in range(columns):
            code = floats[j]
            code = np.float32(7) if code > np.float32(7) else code
            code = np.float32(-8) if code < np.float32(-8) else code
            floats[j] = code + np.float32(12582920)  # 1.5 * 2**23 rounds to whole numbers, whose low bits are then the float's own; 8 more
        to = packed[i]
        for word in range(columns // PACK):
            value = WORD(0)
            for k in range(PACK):
                value |= WORD(WORD(bits[word * PACK + k] & WORD(15)) << WORD(4 * k))
            to[word] = value
    return first


def _rows(columns: int) -> tuple[Array, ...]:
    """A row's worth of memory for each step."""
    return (np.empty(columns, np.int32), np.empty(1, np.int32), *(np.empty(columns, np.float32) for _ in range(6)))


def _as_bits(weight: Array) -> tuple[Array, np.int32, int]:
    """(values as bits, how far to shift them to be float32's, the precision of the arithmetic)."""
    if weight.dtype == np.uint16:
        return weight, WORD(16), BFLOAT16
    precision = FLOAT16 if weight.dtype == np.float16 else FLOAT32
    return np.ascontiguousarray(weight, np.float32).view(np.uint32), WORD(0), precision


def narrowed(values: Array, like: Array) -> None:
    """float32 values that are exact in `like`'s dtype (bfloat16 as uint16 bits) into it."""
    like[...] = values.view(np.uint32) >> 16 if like.dtype == np.uint16 else values


def widened(values: Array) -> Array:
    """bfloat16 bits, float16 or float32 as float32."""
    if values.dtype == np.uint16:
        bits: Array = values.astype(np.uint32) << 16
        return bits.view(np.float32)
    return values.astype(np.float32)


def encode_packed(weight: Array, packed: Array, scales: Array, zeros: Array | None, group: int, limits: Limits | None = None) -> int:
    """compressed-tensors' pack-quantized.

    weight [rows, K]: bfloat16 bits (uint16), float16 or float32; packed int32 [rows, K/8]; scales [rows, K/group] in the weight's dtype; zeros
    int8 [rows, K/group], None for symmetric. Returns the flat index of the first NaN or Inf (which count as 0), or -1.
    """
    values, shift, precision = _as_bits(weight)
    wide = np.empty(scales.shape, np.float32)
    lows, highs = limits or (NO_LIMITS, NO_LIMITS)
    kept = np.empty((0, 0), np.int8) if zeros is None else zeros
    rows = _rows(weight.shape[1])
    bad = _encode_packed(values, packed, wide, kept, zeros is not None, group, lows, highs, shift, precision, EPSILON[precision], rows)
    narrowed(wide, scales)
    return int(bad)


def pack_zeros(zeros: Array) -> Array:
    """int8 [rows, groups] to int32 [rows/8, groups]: eight rows in a word, in their order, each plus 8."""
    codes = (zeros.astype(np.int32) + 8).astype(np.uint32).reshape(-1, PACK, zeros.shape[1])
    words = np.zeros((codes.shape[0], codes.shape[2]), np.uint32)
    for k in range(PACK):
        words |= codes[:, k] << np.uint32(4 * k)
    return words.view(np.int32)


def unpack_zeros(words: Array) -> Array:
    """The way back: int32 [rows/8, groups] to int8 [rows, groups]."""
    plain = np.ascontiguousarray(words).view(np.uint32)
    codes = np.stack([(plain >> np.uint32(4 * k)) & np.uint32(15) for k in range(PACK)], axis=1)
    zeros: Array = codes.astype(np.int8) - np.int8(8)
    return zeros.reshape(-1, words.shape[1])


@jit
def _narrow(bits, count, out, narrow):
    """float32 bits into bfloat16's, rounded, or as they are."""
    if narrow:
        for j in range(count):
            odd = WORD(WORD(bits[j] >> WORD(16)) & WORD(1))
            out[j] = np.uint16(WORD(WORD(bits[j] + WORD(0x7FFF)) + odd) >> WORD(16))
    else:
        for j in range(count):
            out[j] = np.uint32(bits[j])


@jit
def _decode_packed(packed, scales, zeros, asymmetric, out, group, narrow, bits, codes):
    floats = bits.view(np.float32)
    columns = out.shape[1]
    for i in range(packed.shape[0]):
        words = packed[i]
        for word in range(columns // PACK):
            value = words[word]
            eight = codes[word * PACK : word * PACK + PACK]
            for k in range(PACK):
                eight[k] = WORD(WORD(value >> WORD(4 * k)) & WORD(15))
        for g in range(scales.shape[1]):
            scale = scales[i, g]
            zero = WORD(8 + (zeros[i, g] if asymmetric else 0))
            these, values = codes[g * group : g * group + group], floats[g * group : g * group + group]
            for j in range(group):
                values[j] = np.float32(WORD(these[j] - zero)) * scale
        _narrow(bits, columns, out[i], narrow)


def _into(out: Array) -> Array:
    """Where float32 bits or bfloat16 bits for `out` go."""
    if out.dtype == np.float16:
        return np.empty(out.shape, np.uint32)
    return out if out.dtype == np.uint16 else out.view(np.uint32)


def _deliver(made: Array, out: Array) -> None:
    if out.dtype == np.float16:
        with np.errstate(over="ignore"):  # beyond 65504 is Inf, as float16 has it
            out[...] = made.view(np.float32).astype(np.float16)


def decode_packed(packed: Array, scales: Array, zeros: Array | None, out: Array, group: int) -> None:
    """(code - zero) * scale in float32, rounded once to `out` [rows, K]. With bfloat16 scales the product is exact, so these are the peer's bits."""
    kept = np.empty((0, 0), np.int8) if zeros is None else zeros
    made = _into(out)
    columns = out.shape[1]
    bits, codes = np.empty(columns, np.int32), np.empty(columns, np.int32)
    _decode_packed(np.ascontiguousarray(packed), widened(scales), kept, zeros is not None, made, group, out.dtype == np.uint16, bits, codes)
    _deliver(made, out)


@jit
def _encode_awq(weight, codes, zeros, scales, group, lows, highs, shift, rows):
    """Codes uint8 [rows, K], zeros uint8 and scales float32 [rows, groups] of some rows."""
    bits, one, low, high, spread, offset, small, product = rows
    floats = bits.view(np.float32)
    first = np.int64(-1)
    columns = weight.shape[1]
    for i in range(weight.shape[0]):
        bad = _load(weight, i, shift, bits, FLOAT16, small)
        first = np.int64(i) * columns + bad if bad >= 0 and first < 0 else first
        _ranges(bits, group, small.view(np.int32), low, high)
        for g in range(scales.shape[1]):
            least, most = (lows[i, g], highs[i, g]) if lows.shape[0] else (low[g], high[g])
            span = max(_rounded(most - least, one, FLOAT16, small), np.float32(1.0013580322265625e-05))  # 1e-5 in float16
            scale = _rounded(span / np.float32(15), one, FLOAT16, small)
            zero = -np.float32(round(_rounded(least / scale, one, FLOAT16, small)))
            zero = min(max(zero, np.float32(0)), np.float32(15))
            scales[i, g] = scale
            zeros[i, g] = np.uint8(zero)
            spread[g * group : g * group + group] = scale
            offset[g * group : g * group + group] = zero
            product[g * group : g * group + group] = _rounded(zero * scale, one, FLOAT16, small)
        for j in range(columns):
            floats[j] = floats[j] / spread[j]
        _round(bits, columns, FLOAT16, small)
        for j in range(columns):
            code = floats[j]
            code = np.float32(64) if code > np.float32(64) else code  # the clamps below would do the same to anything larger
            code = np.float32(-64) if code < np.float32(-64) else code
            code = (code + np.float32(12582912)) - np.float32(12582912) + offset[j]
            code = np.float32(15) if code > np.float32(15) else code
            code = np.float32(0) if code < np.float32(0) else code
            floats[j] = (code - offset[j]) * spread[j]
        _round(bits, columns, FLOAT16, small)
        for j in range(columns):
            floats[j] = floats[j] + product[j]
        _round(bits, columns, FLOAT16, small)
        for j in range(columns):
            floats[j] = floats[j] / spread[j]
        _round(bits, columns, FLOAT16, small)
        to = codes[i]
        for j in range(columns):
            floats[j] = floats[j] + np.float32(12582912)
            to[j] = np.uint8(bits[j] & WORD(15))
    return first


@jit
def _pack_awq(codes, out, tile):
    """uint8 [rows, columns] to words [columns, rows/8] in AutoAWQ's order: words made along the columns, then turned a tile at a time."""
    columns, words = codes.shape[1], out.shape[1]
    for j0 in range(0, columns, TILE):
        count = min(TILE, columns - j0)
        for c in range(words):
            made = tile[c]
            for j in range(count):
                made[j] = WORD(0)
            for i in range(PACK):
                row, shift = codes[c * PACK + i, j0 : j0 + count], WORD(4 * (i // 2) + 16 * (i % 2))
                for j in range(count):
                    made[j] = WORD(made[j] | WORD(WORD(row[j]) << shift))
        for j in range(count):
            for c in range(words):
                out[j0 + j, c] = tile[c, j]


def encode_awq(weight: Array, qweight: Array, qzeros: Array, scales: Array, group: int, limits: Limits | None = None) -> int:
    """AutoAWQ's gemm layout.

    weight [rows, K], rows a multiple of 8: bfloat16 bits (uint16), float16 or float32; qweight int32 [K, rows/8], qzeros int32 [K/group, rows/8],
    scales float16 [K/group, rows]: views of these rows' columns. Returns the flat index of the first value that is NaN, Inf or beyond
    float16's 65504 (it counts as 0), or -1.
    """
    values, shift, _ = _as_bits(weight)
    rows, groups = weight.shape[0], weight.shape[1] // group
    lows, highs = limits or (NO_LIMITS, NO_LIMITS)
    memory, tile = _rows(weight.shape[1]), np.empty((TILE // PACK, TILE), np.int32)
    first = -1
    for at in range(0, rows, TILE):
        part = values[at : at + TILE]
        codes, zeros = np.empty(part.shape, np.uint8), np.empty((len(part), groups), np.uint8)
        wide = np.empty((len(part), groups), np.float32)
        bad = _encode_awq(part, codes, zeros, wide, group, lows[at : at + TILE], highs[at : at + TILE], shift, memory)
        first = at * weight.shape[1] + int(bad) if bad >= 0 > first else first
        words = slice(at // PACK, (at + len(part)) // PACK)
        _pack_awq(codes, qweight[:, words], tile)
        _pack_awq(zeros, qzeros[:, words], tile)
        scales[:, at : at + len(part)] = wide.T
    return first


@jit
def _decode_awq(qweight, qzeros, scales, out, group, narrow, words, bits):
    floats = bits.view(np.float32)
    columns = qweight.shape[0]
    for c in range(qweight.shape[1]):
        for j in range(columns):
            words[j] = qweight[j, c]
        for i in range(PACK):
            shift = WORD(4 * (i // 2) + 16 * (i % 2))
            for g in range(columns // group):
                zero = WORD(WORD(qzeros[g, c] >> shift) & WORD(15))
                scale = scales[g, c * PACK + i]
                these, values = words[g * group : g * group + group], floats[g * group : g * group + group]
                for j in range(group):
                    values[j] = np.float32(WORD(WORD(WORD(these[j] >> shift) & WORD(15)) - zero)) * scale
            _narrow(bits, columns, out[c * PACK + i], narrow)


def decode_awq(qweight: Array, qzeros: Array, scales: Array, out: Array, group: int) -> None:
    """(code - zero) * scale, exact in float32 as the scale is float16, rounded once to `out` [rows, K]; the parts are views of these rows."""
    made = _into(out)
    words, bits = np.empty(out.shape[1], np.int32), np.empty(out.shape[1], np.int32)
    _decode_awq(qweight, qzeros, np.ascontiguousarray(scales).astype(np.float32), made, group, out.dtype == np.uint16, words, bits)
    _deliver(made, out)
