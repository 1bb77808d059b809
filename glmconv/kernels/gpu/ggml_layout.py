"""Where ggml's blocks keep what: codes and scales as fields of bytes, for encoding and decoding. Bytes are put together by torch, in integers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Field(NamedTuple):
    """`width` bits of each code from byte `at` on: of every 8 / width runs of codes the first run's lie lowest."""

    at: int
    width: int
    run: int


class Layout(NamedTuple):
    """`values` in `size` bytes: codes, lower bits first, stored `below` above what they stand for; float16 at `d`, `m`; small scales alike."""

    values: int
    size: int
    codes: tuple[Field, ...]
    below: int = 0
    d: int = 0
    m: int = -1
    scales: tuple[Field, ...] = ()
    scales_below: int = 0
    sub: int = 32


LAYOUTS: Mapping[str, Layout] = {
    "Q8_0": Layout(32, 34, (Field(2, 8, 1),)),
    "Q4_0": Layout(32, 18, (Field(2, 4, 16),), 8),
    "Q4_1": Layout(32, 20, (Field(4, 4, 16),), m=2),
    "Q5_0": Layout(32, 22, (Field(6, 4, 16), Field(2, 1, 1)), 16),
    "Q5_1": Layout(32, 24, (Field(8, 4, 16), Field(4, 1, 1)), m=2),
    "MXFP4": Layout(32, 17, (Field(1, 4, 16),), d=-1),
    "Q2_K": Layout(256, 84, (Field(16, 2, 32),), d=80, m=82, sub=16),
    "Q3_K": Layout(256, 110, (Field(32, 2, 32), Field(0, 1, 32)), 4, 108, -1, (Field(96, 4, 8), Field(104, 2, 4)), 32, 16),
    "Q4_K": Layout(256, 144, (Field(16, 4, 32),), m=2),
    "Q5_K": Layout(256, 176, (Field(48, 4, 32), Field(16, 1, 32)), m=2),
    "Q6_K": Layout(256, 210, (Field(0, 4, 64), Field(128, 2, 32)), 32, 208, -1, (Field(192, 8, 1),), 0, 16),
    "IQ4_NL": Layout(32, 18, (Field(2, 4, 16),)),
    "IQ4_XS": Layout(256, 136, (Field(8, 4, 16),), scales=(Field(4, 4, 1), Field(2, 2, 1)), scales_below=32),
    "TQ1_0": Layout(256, 54, (), 1, 52),
    "TQ2_0": Layout(256, 66, (Field(0, 2, 32),), 1, 64),
}


def blocks_of(layout: Layout, codes: Tensor) -> Tensor:
    """uint8 [blocks, size] with the codes in place. codes: uint8 [n, values / n * blocks], value i of the sub-blocks of n values in row i."""
    codes = codes.t().reshape(-1, layout.values)
    out = torch.zeros((len(codes), layout.size), dtype=torch.uint8, device=codes.device)
    put(out, codes, layout.codes)
    return out


def put(out: Tensor, codes: Tensor, fields: Sequence[Field]) -> None:
    """uint8 codes [blocks, n] into their bytes, each field with the bits above those of the one before."""
    shift = 0
    for at, width, run in fields:
        parts = ((codes >> shift) & (2**width - 1)).reshape(len(codes), -1, 8 // width, run)
        part = parts[:, :, 0]
        for number in range(1, 8 // width):
            part = part | parts[:, :, number] << (number * width)
        part = part.reshape(len(codes), codes.shape[1] * width // 8)
        out[:, at : at + part.shape[1]] = part
        shift += width


def put_bytes(out: Tensor, at: int, numbers: Tensor) -> None:
    """Each block's numbers [blocks, n] as their bytes, little-endian."""
    data = numbers.contiguous().view(torch.uint8)
    out[:, at : at + data.shape[1]] = data


def put_six_bits(out: Tensor, scales: Tensor, minima: Tensor) -> None:
    """Eight scales and eight minima below 64, uint8 [blocks, 8], into the 12 bytes from 4 on, as Q4_K and Q5_K have them."""
    out[:, 4:8] = scales[:, :4] | scales[:, 4:] >> 4 << 6
    out[:, 8:12] = minima[:, :4] | minima[:, 4:] >> 4 << 6
    out[:, 12:16] = scales[:, 4:] & 15 | minima[:, 4:] << 4
