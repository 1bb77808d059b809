"""The codecs' arithmetic in plain torch, on any device: what the fast kernels are held against, bit by bit. Formulas: `fp8.py` and `int4.py`."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0


def _tiles(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """[rows, K] padded with zeros to [row blocks, bn, column blocks, bk]."""
    bn, bk = (max(1, min(by, n)) for by, n in zip(block, weight.shape, strict=True))
    rows, columns = weight.shape
    padded = weight.new_zeros((-(-rows // bn) * bn, -(-columns // bk) * bk))
    padded[:rows, :columns] = weight
    return padded.view(padded.shape[0] // bn, bn, padded.shape[1] // bk, bk)


def codes_of(quotient: Tensor) -> Tensor:
    """float32 to E4M3 codes (uint8), nearest even, saturating."""
    return quotient.clamp(-LARGEST, LARGEST).to(E4M3).view(torch.uint8)


def scales_of(amax: Tensor, rule: str) -> Tensor:
    """float32 scales of blocks with these largest magnitudes, given in the weight's dtype."""
    if rule == "ue8m0":
        raw = amax.float().clamp(min=1e-4) / LARGEST
        bits = raw.view(torch.int32)
        exponent = ((bits >> 23) + ((bits & 0x7FFFFF) != 0)).clamp(1, 254)
        return (exponent << 23).view(torch.float32)
    clamped = amax.clamp(min=1e-12).float()
    return clamped * torch.tensor(1 / LARGEST, dtype=torch.float32) if rule == "reciprocal" else clamped / LARGEST


def encode_block(weight: Tensor, block: tuple[int, int], rule: str) -> tuple[Tensor, Tensor]:
    """(codes uint8 [rows, K], scales float32 [row blocks, column blocks]) of a bfloat16 or float32 weight."""
    tiles = _tiles(weight, block)
    scales = scales_of(tiles.abs().amax(dim=(1, 3)), rule)
    codes = codes_of(tiles.float() / scales[:, None, :, None])
    return codes.reshape(codes.shape[0] * codes.shape[1], -1)[: weight.shape[0], : weight.shape[1]].contiguous(), scales


def decode_block(codes: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Code times scale in float32, rounded once to `dtype`."""
    rows, columns = codes.shape
    bn, bk = (max(1, min(by, n)) for by, n in zip(block, codes.shape, strict=True))
    spread = scales.repeat_interleave(bn, 0)[:rows].repeat_interleave(bk, 1)[:, :columns]
    return (codes.view(E4M3).float() * spread).to(dtype)


def encode_mx(weight: Tensor, group: int = 32) -> tuple[Tensor, Tensor]:
    """(codes uint8 [rows, K], exponents uint8 [rows, K/group], bias 127)."""
    groups = weight.float().reshape(weight.shape[0], -1, group)
    bits = groups.abs().amax(-1).view(torch.int32)
    exponents = ((bits >> 23) + ((bits & 0x7FFFFF) >= 0x600000) - 8).clamp(0, 254)
    scales = torch.where(exponents == 0, 0x400000, exponents << 23).to(torch.int32).view(torch.float32)
    return codes_of(groups / scales[..., None]).reshape(weight.shape), exponents.to(torch.uint8)


def encode_packed(weight: Tensor, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(codes int8 [rows, K] from -8 to 7, scales [rows, K/group], zeros int8 or None), each operation in the weight's dtype."""
    groups = weight.reshape(weight.shape[0], -1, group)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    eps = torch.tensor(torch.finfo(weight.dtype).eps, dtype=weight.dtype, device=weight.device)
    if symmetric:
        scales = torch.maximum(-low, high) / 7.5
        zeros = None
    else:
        scales = (high - low) / 15
        zeros = (-8 - low / scales).clamp(-8, 7).nan_to_num(0).round()
    scales = torch.where(scales == 0, eps, scales)
    codes = groups / scales[..., None]
    if zeros is not None:
        codes = codes + zeros[..., None]
    return codes.clamp(-8, 7).round().to(torch.int8).reshape(weight.shape), scales, None if zeros is None else zeros.to(torch.int8)


def encode_awq(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(codes int32 [rows, K] from 0 to 15, zeros int32 [rows, K/group], scales float16), each operation in float16, quantized twice."""
    groups = weight.half().reshape(weight.shape[0], -1, group)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-(low / scales).round()).clamp(0, 15)
    first = ((groups / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    again = ((first - zeros[..., None]) * scales[..., None] + (zeros * scales)[..., None]) / scales[..., None]
    return again.round().to(torch.int32).reshape(weight.shape), zeros.to(torch.int32), scales
