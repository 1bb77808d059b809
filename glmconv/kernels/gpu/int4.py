"""4-bit integers in groups along a row, on a GPU: kernels/reference.py's functions with kernels/int4.py's arithmetic.

A group is read by one program, which needs it as a whole; encoders take groups of a multiple of 8 columns, decoders any that divides the columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels.gpu.floats import INFINITY, bits_of, clamped, narrow, nearest, report, rounded, to_float16, whole, widen
from glmconv.kernels.gpu.launch import KINDS, bits, ceil_div, first, launch, tile, unspoiled

Limits = tuple[Tensor, Tensor]
EIGHT = tl.constexpr(8)
SMALLEST = tl.constexpr(168 * 2.0**-24)  # float16(1e-5)


def encode_packed(
    weight: Tensor, group: int, limits: Limits | None = None, *, symmetric: bool, stored: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(packed int32, scales, zeros int8, first NaN or Inf); see kernels.int4.encode_packed. Zeros are 0 if symmetric.

    `stored`: the scales' dtype, if not the weight's.
    """
    stored = stored or weight.dtype
    weight, (rows, columns) = weight.contiguous(), weight.shape
    _divides(group, columns, 8)
    packed = torch.empty((rows, columns // 8), dtype=torch.int32, device=weight.device)
    scales, spoiled = torch.empty((rows, columns // group), dtype=stored, device=weight.device), unspoiled(weight)
    zeros = torch.zeros(scales.shape, dtype=torch.int8, device=weight.device)
    if weight.numel():
        sizes = tile(rows, group)
        constants = {"STORED": KINDS[stored], "KIND": KINDS[weight.dtype], "SYMMETRIC": symmetric, "LIMITED": limits is not None}
        programs = ceil_div(rows, sizes["TALL"]) * scales.shape[1]
        parts = bits(weight), packed, bits(scales), zeros, *_edges(limits, spoiled), spoiled
        bounds = torch.finfo(stored).eps, torch.finfo(weight.dtype).max, torch.finfo(stored).max
        launch(_encode_packed, programs, weight, *parts, rows, columns, group, *bounds, **constants, **sizes)
    return packed, scales, zeros, first(spoiled)


def decode_packed(packed: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype, group: int) -> Tensor:
    """See kernels.int4.decode_packed."""
    rows, columns = scales.shape[0], scales.shape[1] * group
    out = torch.empty((rows, columns), dtype=dtype, device=packed.device)
    if out.numel():
        sizes = tile(rows, min(columns, 256))
        programs = ceil_div(rows, sizes["TALL"]) * ceil_div(columns, sizes["WIDE"])
        parts = packed.contiguous(), bits(scales.contiguous()), packed if zeros is None else zeros.contiguous()
        kinds = {"STORED": KINDS[scales.dtype], "KIND": KINDS[dtype], "SYMMETRIC": zeros is None}
        launch(_decode_packed, programs, packed, *parts, bits(out), rows, columns, packed.shape[1], group, **kinds, **sizes)
    return out


def encode_awq(weight: Tensor, group: int, limits: Limits | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """(qweight int32 [columns, rows / 8], qzeros, scales float16 [columns / group, rows], first NaN or Inf); see kernels.int4.encode_awq."""
    weight, (rows, columns) = weight.contiguous(), weight.shape
    _divides(8, rows, 1)
    _divides(group, columns, 1)
    qweight, qzeros = (torch.empty((n, rows // 8), dtype=torch.int32, device=weight.device) for n in (columns, columns // group))
    scales, spoiled = torch.empty((columns // group, rows), dtype=torch.float16, device=weight.device), unspoiled(weight)
    if weight.numel():
        sizes = tile(rows, group)
        sizes["TALL"] = max(sizes["TALL"], 8)
        programs = ceil_div(rows, sizes["TALL"]) * (columns // group)
        constants = sizes | {"KIND": KINDS[weight.dtype], "LIMITED": limits is not None}
        edges = _edges(limits, spoiled)
        launch(_encode_awq, programs, weight, bits(weight), qweight, qzeros, bits(scales), *edges, spoiled, rows, columns, group, **constants)
    return qweight, qzeros, scales, first(spoiled)


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """[rows, columns]; see kernels.int4.decode_awq."""
    rows, columns = scales.shape[1], qweight.shape[0]
    out = torch.empty((rows, columns), dtype=dtype, device=qweight.device)
    if out.numel():
        sizes = tile(rows, min(columns, 64))
        programs = ceil_div(rows, sizes["TALL"]) * ceil_div(columns, sizes["WIDE"])
        parts = qweight.contiguous(), qzeros.contiguous(), bits(scales.contiguous())
        launch(_decode_awq, programs, qweight, *parts, bits(out), rows, columns, group, KIND=KINDS[dtype], **sizes)
    return out


def _divides(by: int, size: int, multiple: int) -> None:
    if size % by or by % multiple:
        raise ValueError(f"groups of {by} do not divide {size} rows or columns, or are no multiple of {multiple}")


def _edges(limits: Limits | None, unused: Tensor) -> tuple[Tensor, Tensor]:
    return (limits[0].float().contiguous(), limits[1].float().contiguous()) if limits else (unused, unused)


@triton.jit
def _group(x, inside, KIND: tl.constexpr):
    """(values with NaN as 0, smallest, largest finite value of each row or 0, which are NaN or Inf)."""
    value = widen(x, KIND)
    magnitude = bits_of(value) & 0x7FFF_FFFF
    finite = inside & (magnitude < INFINITY)
    seen = tl.max(finite.to(tl.int32), 1) > 0
    low, high = tl.min(tl.where(finite, value, float("inf")), 1), tl.max(tl.where(finite, value, float("-inf")), 1)
    value = tl.where(magnitude > INFINITY, 0.0, value)
    return value, tl.where(seen, low, 0.0), tl.where(seen, high, 0.0), magnitude >= INFINITY


@triton.jit
def _asymmetric(low, high, epsilon, most, ceiling, STORED: tl.constexpr, KIND: tl.constexpr):
    """(scale, zero point); kernels.int4._asymmetric says more."""
    scale = tl.minimum(nearest(tl.div_rn(tl.minimum(nearest(high - low, KIND), most), 15.0), STORED), ceiling)
    proper = scale > 0.0
    below = rounded(tl.div_rn(low, tl.where(proper, scale, 1.0)), KIND)
    zero = whole(clamped(rounded(-8.0 - below, KIND), -8.0, 7.0)).to(tl.float32)
    return tl.where(proper, scale, epsilon), tl.where(proper, zero, tl.where(low < 0.0, 7.0, 0.0))


@triton.jit
def _encode_packed(
    weight, packed, scales, zeros, lows, highs, spoiled, rows, columns, group, epsilon, most, ceiling,
    STORED: tl.constexpr, KIND: tl.constexpr, SYMMETRIC: tl.constexpr, LIMITED: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One group of TALL rows."""
    groups = columns // group
    line = (tl.program_id(0) // groups).to(tl.int64) * TALL + tl.arange(0, TALL)
    number, column = tl.program_id(0) % groups, tl.arange(0, WIDE)
    inside = (line < rows)[:, None] & (column < group)[None, :]
    place = line[:, None] * columns + number * group + column[None, :]
    value, low, high, bad = _group(tl.load(weight + place, inside, 0), inside, KIND)
    report(spoiled, bad, place)
    at = line * groups + number
    if LIMITED:
        low, high = nearest(tl.load(lows + at, line < rows, 0.0), KIND), nearest(tl.load(highs + at, line < rows, 0.0), KIND)
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    if SYMMETRIC:
        scale = tl.minimum(nearest(tl.div_rn(tl.maximum(-low, high), 7.5), STORED), ceiling)
        scale, zero = tl.where(scale > 0.0, scale, epsilon), tl.zeros_like(scale)
    else:
        scale, zero = _asymmetric(low, high, epsilon, most, ceiling, STORED, KIND)
        tl.store(zeros + at, zero.to(tl.int8), line < rows)
    tl.store(scales + at, narrow(scale, STORED), line < rows)
    shifted = clamped(rounded(rounded(tl.div_rn(value, scale[:, None]), KIND) + zero[:, None], KIND), -8.0, 7.0)
    nibbles = tl.reshape(whole(shifted) + 8, (TALL, WIDE // EIGHT, EIGHT)) << (4 * tl.arange(0, EIGHT))[None, None, :]
    word = tl.arange(0, WIDE // EIGHT)
    target = line[:, None] * (columns // EIGHT) + number * (group // EIGHT) + word[None, :]
    tl.store(packed + target, tl.sum(nibbles, 2), (line < rows)[:, None] & (word < group // EIGHT)[None, :])


@triton.jit
def _decode_packed(
    packed, scales, zeros, out, rows, columns, words, group,
    STORED: tl.constexpr, KIND: tl.constexpr, SYMMETRIC: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, WIDE)
    line = ((tl.program_id(0) // across).to(tl.int64) * TALL + tl.arange(0, TALL))[:, None]
    column = (tl.program_id(0) % across * WIDE + tl.arange(0, WIDE))[None, :]
    inside = (line < rows) & (column < columns)
    at = line * (columns // group) + column // group
    value = ((tl.load(packed + line * words + column // 8, inside, 0) >> (column % 8 * 4)) & 15) - 8
    if not SYMMETRIC:
        value -= tl.load(zeros + at, inside, 0).to(tl.int32)
    scale = widen(tl.load(scales + at, inside, 0), STORED)
    tl.store(out + line * columns + column, narrow(value.to(tl.float32) * scale, KIND), inside)


@triton.jit
def _words(values, TALL: tl.constexpr, WIDE: tl.constexpr):
    """Eight rows of values below 16 to a word: row 0, 2, 4, 6, 1, 3, 5, 7 from the lowest nibble on. [TALL, WIDE] to [TALL / 8, WIDE]."""
    row = tl.arange(0, EIGHT)
    return tl.sum(tl.reshape(values, (TALL // EIGHT, EIGHT, WIDE)) << (4 * ((row >> 1) + (row & 1) * 4))[None, :, None], 1)


@triton.jit
def _encode_awq(
    weight, qweight, qzeros, scales, lows, highs, spoiled, rows, columns, group,
    KIND: tl.constexpr, LIMITED: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One group of TALL rows, rounded to float16 first."""
    groups = columns // group
    top = (tl.program_id(0) // groups).to(tl.int64) * TALL
    line, number, column = top + tl.arange(0, TALL), tl.program_id(0) % groups, tl.arange(0, WIDE)
    inside = (line < rows)[:, None] & (column < group)[None, :]
    place = line[:, None] * columns + number * group + column[None, :]
    half = to_float16(widen(tl.load(weight + place, inside, 0), KIND)).to(tl.int16)
    value, low, high, bad = _group(half, inside, "float16")
    report(spoiled, bad, place)
    at = line * groups + number
    if LIMITED:
        low, high = nearest(tl.load(lows + at, line < rows, 0.0), "float16"), nearest(tl.load(highs + at, line < rows, 0.0), "float16")
    extent = tl.minimum(nearest(high - low, "float16"), 65504.0)
    scale = nearest(tl.div_rn(tl.maximum(extent, SMALLEST), 15.0), "float16")
    zero = tl.minimum(tl.maximum(-whole(clamped(rounded(tl.div_rn(low, scale), "float16"), -64.0, 64.0)), 0), 15)
    quotient = rounded(tl.div_rn(clamped(value, low[:, None], high[:, None]), scale[:, None]), "float16")
    code = tl.minimum(tl.maximum(whole(clamped(quotient, -64.0, 64.0)) + zero[:, None], 0), 15)
    tl.store(scales + number.to(tl.int64) * rows + line, narrow(scale, "float16"), line < rows)
    word = top // EIGHT + tl.arange(0, TALL // EIGHT)
    full = word < rows // EIGHT
    target = (number.to(tl.int64) * group + column)[None, :] * (rows // EIGHT) + word[:, None]
    tl.store(qweight + target, _words(code, TALL, WIDE), full[:, None] & (column < group)[None, :])
    points = tl.reshape(_words(zero[:, None], TALL, 1), (TALL // EIGHT,))
    tl.store(qzeros + number.to(tl.int64) * (rows // EIGHT) + word, points, full)


@triton.jit
def _decode_awq(
    qweight, qzeros, scales, out, rows, columns, group, KIND: tl.constexpr, TALL: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(columns, WIDE)
    line = ((tl.program_id(0) // across).to(tl.int64) * TALL + tl.arange(0, TALL))[:, None]
    column = (tl.program_id(0) % across * WIDE + tl.arange(0, WIDE))[None, :]
    inside = (line < rows) & (column < columns)
    row = (line % 8).to(tl.int32)
    shift = 4 * ((row >> 1) + (row & 1) * 4)
    number, words = (column // group).to(tl.int64), rows // 8
    value = (tl.load(qweight + column.to(tl.int64) * words + line // 8, inside, 0) >> shift) & 15
    zero = (tl.load(qzeros + number * words + line // 8, inside, 0) >> shift) & 15
    scale = widen(tl.load(scales + number * rows + line, inside, 0), "float16")
    tl.store(out + line * columns + column, narrow((value - zero).to(tl.float32) * scale, KIND), inside)
