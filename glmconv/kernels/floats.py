"""Floats as their bits, inside kernels: numba has neither bfloat16 nor (on a CPU) float16, so each dtype travels as an integer type of its own.

    bfloat16  uint16      float16  int16      float32  int32

All is integer arithmetic or one float32 operation, free of branches: LLVM turns the loops around it into vector code. numba widens every integer
operation to 64 bits; the casts around each step are what narrows the lanes again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glmconv.kernels.jit import by_type, inner, types

u8, u16, u32, i16, i32, f32 = np.uint8, np.uint16, np.uint32, np.int16, np.int32, np.float32
Array = NDArray[Any]

# dtype of an array -> (the integer type that its bits travel as, the bits of Inf); uint16 arrays hold bfloat16
CARRIERS: dict[str, tuple[type[np.integer[Any]], int]] = {
    "uint16": (np.uint16, 0x7F80),
    "float16": (np.int16, 0x7C00),
    "float32": (np.int32, 0x7F80_0000),
}


def carried(values: Array) -> Array:
    """The bits of `values` in the type that kernels know them by."""
    return values.view(CARRIERS[values.dtype.name][0])


def infinity(values: Array) -> Any:
    """The bits of Inf, as one value of `carried(values)`: finite magnitudes are below, NaN's above."""
    kind, bits = CARRIERS[values.dtype.name]
    return kind(bits)


def fits(array: Array, kind: str, rows: int, columns: int) -> None:
    """Raise ValueError unless `array` has the dtype and at least these sizes: compiled loops look at no bounds, they would write beyond."""
    if array.dtype.name != kind or array.ndim != 2 or array.shape[0] < rows or array.shape[1] < columns:
        raise ValueError(f"{array.dtype.name} {list(array.shape)} is given, {kind} [{rows}, {columns}] is needed")


@inner
def bits(x: Any) -> Any:
    return f32(x).view(np.uint32)


@inner
def real(b: Any) -> Any:
    return u32(b).view(np.float32)


def _widen(x: Any) -> Callable[..., Any] | None:
    def bfloat16(x: Any) -> Any:
        return real(u32(u32(x) << u32(16)))

    def float16(x: Any) -> Any:  # the exponent is moved by a product, which is right for subnormals too; Inf and NaN need their own
        b = u32(u16(x))
        finite = bits(real(u32(u32(b & u32(0x7FFF)) << u32(13))) * f32(2.0**112))
        magnitude = u32(finite | u32(0x7F80_0000)) if u32(b & u32(0x7FFF)) >= u32(0x7C00) else finite
        return real(u32(magnitude | u32(u32(b & u32(0x8000)) << u32(16))))

    def float32(x: Any) -> Any:
        return real(u32(x))

    return {types.uint16: bfloat16, types.int16: float16, types.int32: float32}.get(x)


@by_type(_widen)
def widen(x: Any) -> Any:
    """The float32 that the bits `x` stand for; exact."""


def _magnitude(x: Any) -> Callable[..., Any] | None:
    def bfloat16(x: Any) -> Any:
        return u16(x & u16(0x7FFF))

    def float16(x: Any) -> Any:
        return i16(x & i16(0x7FFF))

    def float32(x: Any) -> Any:
        return i32(x & i32(0x7FFF_FFFF))

    return {types.uint16: bfloat16, types.int16: float16, types.int32: float32}.get(x)


@by_type(_magnitude)
def magnitude(x: Any) -> Any:
    """`x` without its sign: magnitudes are ordered as the values they stand for."""


@inner
def to_bfloat16(x: Any) -> Any:
    """float32 to the bits of bfloat16, to nearest even, overflow to Inf. NaN must be quiet, its lower half 0 (as processors make it)."""
    b = bits(x)
    return u16(u32(u32(b + u32(0x7FFF)) + u32(u32(b >> u32(16)) & u32(1))) >> u32(16))


@inner
def to_float16(x: Any) -> Any:
    """float32 to the bits of float16, to nearest even, subnormals too, overflow to Inf, NaN to a quiet one.

    A power of two 2^13 times the value's own (at least the smallest normal's) is added: the sum's last bit is float16's, so the addition rounds.
    """
    b = bits(x)
    a = min(u32(b & u32(0x7FFF_FFFF)), u32(0x4780_0000))  # 2^16 and all above it become Inf
    step = u32(max(u32(a & u32(0x7F80_0000)), u32(0x3880_0000)) + u32(13 << 23))
    fraction = u32(bits(real(a) + real(step)) - step)
    h = u32(u32(u32(step >> u32(13)) + fraction) - u32((112 + 13 + 1) << 10))
    h = u32(0x7E00) if u32(b & u32(0x7FFF_FFFF)) > u32(0x7F80_0000) else h
    return i16(u16(h | u32(u32(b >> u32(16)) & u32(0x8000))))


def _narrow(x: Any, like: Any) -> Callable[..., Any] | None:
    def bfloat16(x: Any, like: Any) -> Any:
        return to_bfloat16(x)

    def float16(x: Any, like: Any) -> Any:
        return to_float16(x)

    def float32(x: Any, like: Any) -> Any:
        return i32(bits(x))

    return {types.uint16: bfloat16, types.int16: float16, types.int32: float32}.get(like)


@by_type(_narrow)
def narrow(x: Any, like: Any) -> Any:
    """The bits of float32 `x`, rounded once to nearest even to the dtype that `like` travels as."""


def _rounded(x: Any, like: Any) -> Callable[..., Any] | None:
    def bfloat16(x: Any, like: Any) -> Any:
        return real(u32(to_bfloat16(x)) << u32(16))

    def float16(x: Any, like: Any) -> Any:
        b = bits(x)
        return real(u32(u32(b + u32(0xFFF)) + u32(u32(b >> u32(13)) & u32(1))) & u32(0xFFFF_E000))

    def float32(x: Any, like: Any) -> Any:
        return x

    return {types.uint16: bfloat16, types.int16: float16, types.int32: float32}.get(like)


@by_type(_rounded)
def rounded(x: Any, like: Any) -> Any:
    """float32 `x` to the significant bits of `like`'s dtype, still a float32; of float16 without its limits (no Inf, no subnormals)."""


def _ordered(x: Any) -> Callable[..., Any] | None:
    def short(x: Any) -> Any:
        return i16(i16(x) ^ i16(i16(i16(x) >> i16(15)) & i16(0x7FFF)))

    def long(x: Any) -> Any:
        return i32(x ^ i32(i32(x >> i32(31)) & i32(0x7FFF_FFFF)))

    return {types.uint16: short, types.int16: short, types.int32: long}.get(x)


@by_type(_ordered)
def ordered(x: Any) -> Any:
    """A signed integer, in the order of the values: m for magnitude m, -m - 1 for its negative. Applied to its own result it gives `x` back."""


def _carrier(x: Any, like: Any) -> Callable[..., Any] | None:
    def bfloat16(x: Any, like: Any) -> Any:
        return u16(x)

    def float16(x: Any, like: Any) -> Any:
        return i16(x)

    def float32(x: Any, like: Any) -> Any:
        return i32(x)

    return {types.uint16: bfloat16, types.int16: float16, types.int32: float32}.get(like)


@by_type(_carrier)
def carrier(x: Any, like: Any) -> Any:
    """The integer `x` in the type of `like`."""
