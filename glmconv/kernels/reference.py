"""What fp8.py and int4.py compute, in plain torch: the formulas as they are read, on any device, with the same bytes.

Slow on a CPU (bench/fp8.py, bench/int4.py). Each encoder also returns the index of the first NaN or Inf, or -1.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
Limits = tuple[Tensor, Tensor]


def encode_block(weight: Tensor, block: tuple[int, int], rule: str) -> tuple[Tensor, Tensor, int]:
    """(codes uint8 [rows, columns], scales float32, first NaN or Inf); see fp8.encode_block."""
    scales = scale_of(largest_of_blocks(weight, block).clamp(min=floor_of(weight.dtype, rule)), rule)
    return encode(weight, spread(scales, block, weight.shape)), scales, first(~weight.isfinite())


def largest(weight: Tensor, rule: str) -> tuple[float, int]:
    amax = largest_of_blocks(weight, (weight.shape[0], weight.shape[1])).max()
    return max(amax.item(), floor_of(weight.dtype, rule)), first(~weight.isfinite())


def encode_mx(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor, int]:
    """(codes, exponents uint8, first NaN or Inf); see fp8.encode_mx."""
    amax = largest_of_blocks(weight, (1, group))
    exponents = (((amax.view(torch.int32) + (1 << 21)) >> 23) - 8).clamp(min=0).to(torch.uint8)
    return encode(weight, spread(exponents_to_scales(exponents), (1, group), weight.shape)), exponents, first(~weight.isfinite())


def decode_block(codes: Tensor, scales: Tensor, dtype: torch.dtype, block: tuple[int, int], first_row: int = 0) -> tuple[Tensor, int]:
    """(values, first NaN code); see fp8.decode_block."""
    values = codes.view(E4M3).to(torch.float32)
    out = (values * spread(scales, block, codes.shape, first_row)).to(dtype)
    signs = 1.0 - 2.0 * (codes >> 7).to(dtype)
    return torch.where(values.isnan(), torch.copysign(torch.full_like(out, torch.nan), signs), out), first(values.isnan())


def encode(weight: Tensor, scales: Tensor) -> Tensor:
    """cast(clamp(w / s)) with one scale per value: Inf saturates, NaN keeps its sign."""
    codes = (weight.to(torch.float32) / scales).clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)
    return torch.where(weight.isnan(), 0x7F + 0x80 * weight.signbit().to(torch.uint8), codes)


def scale_of(amax: Tensor, rule: str) -> Tensor:
    if rule == "reciprocal":
        return amax * torch.tensor(1 / LARGEST, dtype=torch.float32, device=amax.device)
    scales = divided(amax, LARGEST)
    if rule == "division":
        return scales
    bits = scales.view(torch.int32)
    exponents = (bits >> 23) + ((bits & 0x7F_FFFF) != 0).to(torch.int32)
    return (exponents.clamp(1, 254) << 23).view(torch.float32)


def divided(values: Tensor, by: float) -> Tensor:
    """A true division on every device: torch divides by a Python number on CUDA as it multiplies with the rounded reciprocal."""
    return values / torch.full_like(values, by)


def floor_of(dtype: torch.dtype, rule: str) -> float:
    """The clamp of amax, rounded to the weight's dtype where that leaves more than 0 (float16 has no 1e-12)."""
    floor = torch.tensor(1e-4 if rule == "ue8m0" else 1e-12, dtype=torch.float32)
    return (floor.to(dtype) if rule != "ue8m0" and dtype == torch.bfloat16 else floor).item()


def largest_of_blocks(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """float32 [ceil(rows / block[0]), ceil(columns / block[1])]: the largest finite magnitude of each block; what an edge block lacks counts as 0."""
    (rows, columns), (height, length) = weight.shape, (min(b, max(n, 1)) for b, n in zip(block, weight.shape, strict=True))
    magnitudes = torch.where(weight.isfinite(), weight.abs(), torch.zeros_like(weight)).to(torch.float32)
    padded = functional.pad(magnitudes, (0, -columns % length, 0, -rows % height))
    tall, wide = padded.shape[0] // height, padded.shape[1] // length
    return padded.reshape(tall, height, wide, length).amax((1, 3))


def spread(scales: Tensor, block: tuple[int, int], shape: torch.Size, first_row: int = 0) -> Tensor:
    """The scale of each value of rows that begin at `first_row`."""
    rows, columns = (torch.arange(size, device=scales.device) for size in shape)
    return scales[(rows + first_row) // block[0]][:, columns // block[1]]


def exponents_to_scales(exponents: Tensor) -> Tensor:
    scales = (exponents.to(torch.int32) << 23).view(torch.float32)
    scales = torch.where(exponents == 0, 2.0**-127, scales)
    return torch.where(exponents == 255, torch.nan, scales)


def encode_packed(
    weight: Tensor, group: int, limits: Limits | None = None, *, symmetric: bool, stored: torch.dtype | None = None
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(packed int32, scales, zeros int8, first NaN or Inf); see int4.encode_packed. Zeros are 0 if symmetric.

    `stored`: the scales' dtype, if not the weight's.
    """
    stored = stored or weight.dtype
    groups, low, high = grouped(weight, group, limits)
    low, high = low.clamp(max=0), high.clamp(min=0)
    if symmetric:
        scales, zeros = divided(torch.maximum(-low, high), 7.5), torch.zeros_like(low)
    else:
        scales = divided((high - low).clamp(max=torch.finfo(weight.dtype).max), 15)
    scales = scales.clamp(max=torch.finfo(stored).max).to(stored).to(weight.dtype)
    if not symmetric:
        zeros = (-8 - low / scales).nan_to_num(0.0).clamp(-8, 7).round()
    scales = torch.where(scales == 0, torch.finfo(stored).eps, scales)
    values = (groups.nan_to_num(0.0, torch.inf, -torch.inf) / scales[..., None] + zeros[..., None]).clamp(-8, 7).round().flatten(1)
    return pack(values.to(torch.int32) + 8), scales.to(stored), zeros.to(torch.int8), first(~weight.isfinite())


def decode_packed(packed: Tensor, scales: Tensor, zeros: Tensor | None, dtype: torch.dtype, group: int) -> Tensor:
    """See int4.decode_packed."""
    values = (unpack(packed) - 8)[:, : scales.shape[1] * group].reshape(*scales.shape, group)
    shifted = values if zeros is None else values - zeros[..., None]
    return (shifted * scales[..., None].to(torch.float32)).to(dtype).flatten(1)


def encode_awq(weight: Tensor, group: int, limits: Limits | None = None) -> tuple[Tensor, Tensor, Tensor, int]:
    """(qweight, qzeros, scales, first NaN or Inf); see int4.encode_awq."""
    weight = weight.to(torch.float16)
    groups, low, high = grouped(weight, group, limits)
    scales = divided((high - low).clamp(1e-5, 65504), 15)
    zeros = (-torch.round(low / scales)).clamp(0, 15)
    clipped = torch.minimum(torch.maximum(groups.nan_to_num(0.0, torch.inf, -torch.inf), low[..., None]), high[..., None])
    values = (torch.round(clipped / scales[..., None]) + zeros[..., None]).clamp(0, 15).flatten(1)
    return awq_words(values), awq_words(zeros), scales.T.contiguous(), first(~weight.isfinite())


def decode_awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, dtype: torch.dtype, group: int) -> Tensor:
    """[rows, columns]; see int4.decode_awq."""
    order = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()

    def nibbles(words: Tensor) -> Tensor:
        return unpack(words).reshape(*words.shape, 8)[..., order].flatten(1)

    zeros, factors = (part.repeat_interleave(group, 0) for part in (nibbles(qzeros), scales.to(torch.float32)))
    return ((nibbles(qweight) - zeros) * factors).to(dtype).T.contiguous()


def grouped(weight: Tensor, group: int, limits: Limits | None) -> tuple[Tensor, Tensor, Tensor]:
    """[rows, groups, group], and each group's smallest and largest finite value (0 if it has none) or what `limits` says."""
    groups = weight.reshape(weight.shape[0], -1, group)
    if limits:
        return groups, limits[0].to(weight.dtype), limits[1].to(weight.dtype)
    finite = groups.isfinite()
    low, high = torch.where(finite, groups, torch.inf).amin(-1), torch.where(finite, groups, -torch.inf).amax(-1)
    none = ~finite.any(-1)
    return groups, low.masked_fill(none, 0), high.masked_fill(none, 0)


def pack(values: Tensor) -> Tensor:
    """Integers 0..15 to nibbles of int32 words, eight neighbours in a row each, the first lowest."""
    eights = functional.pad(values, (0, -values.shape[1] % 8)).reshape(values.shape[0], -1, 8).to(torch.int64)
    return (eights << shifts(values)).sum(-1).to(torch.int32)


def unpack(words: Tensor) -> Tensor:
    return ((words[..., None] >> shifts(words)) & 15).flatten(1)


def shifts(like: Tensor) -> Tensor:
    return torch.arange(0, 32, 4, device=like.device)


def awq_words(values: Tensor) -> Tensor:
    """[rows, n] to int32 [n, rows / 8]."""
    eights = values.T.to(torch.int32).reshape(values.shape[1], -1, 8)
    return pack(eights[..., AWQ_ORDER].flatten(1))


def first(found: Tensor) -> int:
    """Flat index of the first True, or -1."""
    return int(found.flatten().to(torch.uint8).argmax()) if bool(found.any()) else -1
