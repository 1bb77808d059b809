"""float8 e4m3fn with float32 scales, and MXFP8, on a GPU: kernels/reference.py's functions with kernels/fp8.py's rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels import reference
from glmconv.kernels.gpu.floats import INFINITY, bits_of, narrow, real, report, widen
from glmconv.kernels.gpu.launch import KINDS, TILE, bits, ceil_div, first, launch, tile, unspoiled

RECIPROCAL = tl.constexpr(1 / 448)
TO_NORMAL = tl.constexpr(2.0**120)  # from e4m3's exponents to float32's


def encode_block(weight: Tensor, block: tuple[int, int], rule: str) -> tuple[Tensor, Tensor, int]:
    """(codes uint8 [rows, columns], scales float32, first NaN or Inf); see kernels.fp8.encode_block. A block is one program's work.

    For a whole tensor `largest` and `encode` are the way: many programs each.
    """
    weight, (rows, columns) = weight.contiguous(), weight.shape
    height, length = (min(size, max(limit, 1)) for size, limit in zip(block, weight.shape, strict=True))
    codes, spoiled = torch.empty_like(weight, dtype=torch.uint8), unspoiled(weight)
    scales = torch.empty((ceil_div(rows, height), ceil_div(columns, length)), dtype=torch.float32, device=weight.device)
    if weight.numel():
        sizes = (rows, columns, height, length, reference.floor_of(weight.dtype, rule))
        constants = tile(height, min(length, 1024)) | {"RULE": rule, "KIND": KINDS[weight.dtype]}
        launch(_encode_block, scales.numel(), weight, bits(weight), codes, scales, spoiled, *sizes, **constants)
    return codes, scales, first(spoiled)


def largest(weight: Tensor, rule: str) -> tuple[float, int]:
    """The largest finite magnitude, at least the rule's floor, and the index of the first NaN or Inf or -1."""
    weight, spoiled = weight.contiguous(), unspoiled(weight)
    amax = torch.zeros(1, dtype=torch.int32, device=weight.device)
    if weight.numel():
        launch(_largest, ceil_div(weight.numel(), TILE), weight, bits(weight), amax, spoiled, weight.numel(), KIND=KINDS[weight.dtype], SIZE=TILE)
    return max(amax.view(torch.float32).item(), reference.floor_of(weight.dtype, rule)), first(spoiled)


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Codes under one scale that is known, a float32 of no axes: Inf saturates, NaN keeps its sign."""
    weight, codes = weight.contiguous(), torch.empty_like(weight, dtype=torch.uint8).contiguous()
    if weight.numel():
        one = scale.to(torch.float32).reshape(1)
        launch(_encode, ceil_div(weight.numel(), TILE), weight, bits(weight), codes, one, weight.numel(), KIND=KINDS[weight.dtype], SIZE=TILE)
    return codes


def encode_mx(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor, int]:
    """(codes, exponents uint8 [rows, ceil(columns / group)], first NaN or Inf); see kernels.fp8.encode_mx."""
    weight, (rows, columns) = weight.contiguous(), weight.shape
    codes, spoiled = torch.empty_like(weight, dtype=torch.uint8), unspoiled(weight)
    exponents = torch.empty((rows, ceil_div(columns, group)), dtype=torch.uint8, device=weight.device)
    if weight.numel():
        sizes = tile(rows, group)
        programs = ceil_div(rows, sizes["TALL"]) * exponents.shape[1]
        launch(_encode_mx, programs, weight, bits(weight), codes, exponents, spoiled, rows, columns, group, KIND=KINDS[weight.dtype], **sizes)
    return codes, exponents, first(spoiled)


def decode_block(codes: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int], first_row: int = 0) -> tuple[Tensor, int]:
    """(values, first NaN code); see kernels.fp8.decode_block."""
    codes, scales, spoiled = codes.contiguous(), scales.contiguous(), unspoiled(codes)
    rows, columns = codes.shape
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    if codes.numel():
        sizes = tile(rows, min(columns, 256))
        programs = ceil_div(rows, sizes["TALL"]) * ceil_div(columns, sizes["WIDE"])
        extent = (rows, columns, min(block[0], first_row + rows), min(block[1], columns), first_row, scales.shape[1])
        launch(_decode_block, programs, codes, codes, scales, bits(out), spoiled, *extent, KIND=KINDS[dtype], **sizes)
    return out, first(spoiled)


@triton.jit
def _scale(amax, RULE: tl.constexpr):
    scale = amax * RECIPROCAL if RULE == "reciprocal" else tl.div_rn(amax, 448.0)
    if RULE == "ue8m0":
        b = bits_of(scale)
        exponent = (b >> 23) + ((b & 0x7F_FFFF) != 0).to(tl.int32)
        scale = real(tl.minimum(tl.maximum(exponent, 1), 254) << 23)
    return scale


@triton.jit
def _code(x, scale, KIND: tl.constexpr):
    """cast(clamp(w / s)) of a weight's bits; kernels.fp8._code says why the addition rounds."""
    magnitude = bits_of(widen(x, KIND)) & 0x7FFF_FFFF
    a = tl.minimum(bits_of(tl.div_rn(real(magnitude), scale)), 0x43E0_0000)  # 448
    own = tl.maximum(a & 0x7F80_0000, 0x3C80_0000)
    step = own + (20 << 23)
    fraction = bits_of(real(a) + real(step)) - step
    code = (own >> 20) + fraction - ((120 + 1) << 3)
    code = tl.where(magnitude > INFINITY, 0x7F, code)
    return (code | tl.where(x < 0, 0x80, 0)).to(tl.uint8)


@triton.jit
def _tile(top, left, bottom, right, columns, TALL: tl.constexpr, WIDE: tl.constexpr):
    """(flat indices, which of them are inside)."""
    r = top + tl.arange(0, TALL)[:, None].to(tl.int64)
    c = left + tl.arange(0, WIDE)[None, :]
    return r * columns + c, (r < bottom) & (c < right)


@triton.jit
def _encode_block(
    weight, codes, scales, spoiled, rows, columns, height, length, floor,
    RULE: tl.constexpr, KIND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, length)
    top = (tl.program_id(0) // across).to(tl.int64) * height
    left = (tl.program_id(0) % across).to(tl.int64) * length
    bottom, right = tl.minimum(top + height, rows), tl.minimum(left + length, columns)
    down, wide = tl.cdiv(bottom - top, TALL), tl.cdiv(right - left, WIDE)
    peaks = tl.zeros((TALL, WIDE), tl.int32)  # bits of magnitudes: ordered as the values are
    for number in range(down * wide):
        place, inside = _tile(top + number // wide * TALL, left + number % wide * WIDE, bottom, right, columns, TALL, WIDE)
        magnitude = bits_of(widen(tl.load(weight + place, inside, 0), KIND)) & 0x7FFF_FFFF
        report(spoiled, magnitude >= INFINITY, place)
        peaks = tl.maximum(peaks, tl.where(magnitude < INFINITY, magnitude, 0))
    scale = _scale(tl.maximum(real(tl.max(peaks)), floor), RULE)
    tl.store(scales + tl.program_id(0), scale)
    for number in range(down * wide):
        place, inside = _tile(top + number // wide * TALL, left + number % wide * WIDE, bottom, right, columns, TALL, WIDE)
        tl.store(codes + place, _code(tl.load(weight + place, inside, 0), scale, KIND), inside)


@triton.jit
def _largest(weight, amax, spoiled, size, KIND: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    magnitude = bits_of(widen(tl.load(weight + place, place < size, 0), KIND)) & 0x7FFF_FFFF
    report(spoiled, magnitude >= INFINITY, place)
    tl.atomic_max(amax, tl.max(tl.where(magnitude < INFINITY, magnitude, 0)))


@triton.jit
def _encode(weight, codes, scale, size, KIND: tl.constexpr, SIZE: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    x = tl.load(weight + place, place < size, 0)
    tl.store(codes + place, _code(x, tl.load(scale), KIND), place < size)


@triton.jit
def _encode_mx(weight, codes, exponents, spoiled, rows, columns, group, KIND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr):
    """One group of TALL rows."""
    across = tl.cdiv(columns, group)
    top, number = (tl.program_id(0) // across).to(tl.int64) * TALL, tl.program_id(0) % across
    right = tl.minimum((number + 1) * group, columns)
    place, inside = _tile(top, number * group, rows, right, columns, TALL, WIDE)
    x = tl.load(weight + place, inside, 0)
    magnitude = bits_of(widen(x, KIND)) & 0x7FFF_FFFF
    report(spoiled, magnitude >= INFINITY, place)
    amax = tl.max(tl.where(magnitude < INFINITY, magnitude, 0), 1)
    exponent = tl.maximum((amax + (1 << 21)) >> 23, 8) - 8
    scale = real(tl.where(exponent > 0, exponent << 23, 1 << 22))  # 2^-127 is subnormal
    tl.store(codes + place, _code(x, scale[:, None], KIND), inside)
    line = top + tl.arange(0, TALL)
    tl.store(exponents + line * across + number, exponent.to(tl.uint8), line < rows)


@triton.jit
def _decode_block(
    codes, scales, out, spoiled, rows, columns, height, length, first_row, grid,
    KIND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, WIDE)
    top, left = (tl.program_id(0) // across).to(tl.int64) * TALL, tl.program_id(0) % across * WIDE
    place, inside = _tile(top, left, rows, columns, columns, TALL, WIDE)
    line = (first_row + top + tl.arange(0, TALL)) // height
    at = line[:, None] * grid + ((left + tl.arange(0, WIDE)) // length)[None, :]
    code, scale = tl.load(codes + place, inside, 0).to(tl.int32), tl.load(scales + at, inside, 0.0)
    value = real(((code & 0x7F) << 20) | ((code & 0x80) << 24)) * TO_NORMAL  # exact, subnormals too
    nan = (code & 0x7F) == 0x7F
    report(spoiled, nan, place)
    result = tl.where(nan, real(0x7FC0_0000 | ((code & 0x80) << 24)), value * scale)
    tl.store(out + place, narrow(result, KIND), inside)
