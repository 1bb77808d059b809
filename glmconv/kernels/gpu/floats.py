"""kernels/floats.py for Triton: the dtype is named by `KIND`, its bits come and go as signed integers of its width."""

from __future__ import annotations

import triton
import triton.language as tl

INFINITY = tl.constexpr(0x7F80_0000)  # bits of float32: finite magnitudes are below, NaN's above
NOWHERE = tl.constexpr(1 << 62)


@triton.jit
def real(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def bits_of(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def widen(x, KIND: tl.constexpr):
    """The float32 that the bits `x` stand for; exact. A NaN may lose its sign, which is that of `x`."""
    if KIND == "bfloat16":
        value = real(x.to(tl.int32) << 16)
    elif KIND == "float16":
        value = x.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = real(x)
    return value


@triton.jit
def to_bfloat16(x):
    """float32 to the bits of bfloat16 in a uint32, to nearest even, overflow to Inf. NaN must be quiet, its lower half 0."""
    b = x.to(tl.uint32, bitcast=True)
    return (b + 0x7FFF + ((b >> 16) & 1)) >> 16


@triton.jit
def to_float16(x):
    """float32 to the bits of float16 in an int32, to nearest even, subnormals too, overflow to Inf, NaN to a quiet one.

    A power of two 2^13 times the value's own (at least the smallest normal's) is added: the sum's last bit is float16's, so the addition rounds.
    """
    b = bits_of(x)
    magnitude = b & 0x7FFF_FFFF
    a = tl.minimum(magnitude, 0x4780_0000)  # 2^16 and all above it become Inf
    step = tl.maximum(a & 0x7F80_0000, 0x3880_0000) + (13 << 23)
    fraction = bits_of(real(a) + real(step)) - step
    h = (step >> 13) + fraction - ((112 + 13 + 1) << 10)
    h = tl.where(magnitude > INFINITY, 0x7E00, h)
    return h | ((b >> 16) & 0x8000)


@triton.jit
def narrow(x, KIND: tl.constexpr):
    """The bits of float32 `x`, rounded once to nearest even."""
    if KIND == "bfloat16":
        bits = to_bfloat16(x).to(tl.int16)
    elif KIND == "float16":
        bits = to_float16(x).to(tl.int16)
    else:
        bits = bits_of(x)
    return bits


@triton.jit
def nearest(x, KIND: tl.constexpr):
    """float32 `x` rounded once to `KIND`, its limits included."""
    return widen(narrow(x, KIND), KIND)


@triton.jit
def rounded(x, KIND: tl.constexpr):
    """float32 `x` to the significant bits of `KIND`, still a float32; of float16 without its limits (no Inf, no subnormals)."""
    if KIND == "bfloat16":
        x = real(to_bfloat16(x) << 16)
    elif KIND == "float16":
        b = x.to(tl.uint32, bitcast=True)
        x = real((b + 0xFFF + ((b >> 13) & 1)) & 0xFFFF_E000)
    return x


@triton.jit
def whole(x):
    """|x| < 2^22 to the nearest integer, ties to even: the addition's own rounding."""
    return bits_of(x + 12582912.0) - 0x4B40_0000


@triton.jit
def clamped(x, low, high):
    return tl.maximum(tl.minimum(x, high), low)


@triton.jit
def report(spoiled, bad, places):
    """Keep the smallest of `places` where there is `bad`."""
    found = tl.min(tl.where(bad, places, NOWHERE))
    tl.atomic_min(spoiled, found, mask=found < NOWHERE)
