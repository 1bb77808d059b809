"""kernels/ggml_decode.py for Triton: ggml's blocks to float32, of the types that are encoded. A value is one lane's work."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels.gpu.floats import real, widen
from glmconv.kernels.gpu.ggml_iq4 import VALUES
from glmconv.kernels.gpu.ggml_layout import LAYOUTS
from glmconv.kernels.gpu.ggml_search import lanes
from glmconv.kernels.gpu.launch import TILE, ceil_div, launch

E2M1 = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)  # doubled
TABLES = {"IQ4_NL": VALUES, "IQ4_XS": VALUES, "MXFP4": E2M1}
NO_FIELD = (-1, 8, 1)


def decode_float(data: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [n, size of a row] of float32, float16 or bfloat16; exact."""
    return data.view(dtype).to(torch.float32)


def decode_blocks(name: str, data: Tensor) -> Tensor:
    """uint8 [n, whole blocks], C order, to as many float32, flat."""
    layout = LAYOUTS[name]
    out = torch.empty(data.numel() // layout.size * layout.values, dtype=torch.float32, device=data.device)
    if out.numel():
        table = torch.tensor(TABLES.get(name, (0.0,)), dtype=torch.float32, device=data.device)
        launch(_decode, ceil_div(len(out), TILE), data, data, table, out, len(out), SIZE=TILE, **constants_of(name))
    return out


def constants_of(name: str) -> dict[str, Any]:
    """What the kernel is compiled with."""
    layout = LAYOUTS[name]
    codes, scales = (tuple(map(tuple, fields)) + (NO_FIELD,) * (2 - len(fields)) for fields in (layout.codes, layout.scales))
    sizes = {"VALUES": layout.values, "BYTES": layout.size, "SUB": layout.sub, "BELOW": layout.below, "SMALL_BELOW": layout.scales_below}
    fields = {"LOW": codes[0], "HIGH": codes[1], "SMALL": scales[0], "SMALL_HIGH": scales[1]}
    return {"NAME": name, "TABLE": name in TABLES, "D": layout.d, "M": layout.m} | sizes | fields


@triton.jit
def _byte(blocks, at):
    return tl.load(blocks + at).to(tl.int32)


@triton.jit
def _half(blocks, at):
    return widen((_byte(blocks, at) | _byte(blocks, at + 1) << 8).to(tl.int16), "float16")


@triton.jit
def _field(blocks, base, i, FIELD: tl.constexpr):
    """Bits of code i."""
    share: tl.constexpr = 8 // FIELD[1]
    byte = _byte(blocks, base + FIELD[0] + i // (FIELD[2] * share) * FIELD[2] + i % FIELD[2])
    return (byte >> (i // FIELD[2] % share * FIELD[1])) & ((1 << FIELD[1]) - 1)


@triton.jit
def _number(blocks, base, i, LOW: tl.constexpr, HIGH: tl.constexpr):
    """Code i; a whole byte is signed."""
    code = _field(blocks, base, i, LOW)
    if HIGH[0] >= 0:
        code |= _field(blocks, base, i, HIGH) << LOW[1]
    return (code ^ 128) - 128 if LOW[1] == 8 else code


@triton.jit
def _digit(blocks, base, i):
    """Digit i base 3 of TQ1_0: the bytes are fractions of 256, whose product with a power of 3 leads with a digit."""
    first, second = i < 160, i < 240
    byte = tl.where(first, i % 32, tl.where(second, 32 + i % 16, 48 + i % 4))
    place = tl.where(first, i // 32, tl.where(second, (i - 160) // 16, (i - 240) // 4))
    power = tl.where(place == 0, 1, tl.where(place == 1, 3, tl.where(place == 2, 9, tl.where(place == 3, 27, 81))))
    return ((_byte(blocks, base + byte) * power) & 255) * 3 >> 8


@triton.jit
def _two_numbers(blocks, base, j, NAME: tl.constexpr):
    """The small scale and minimum of sub-block j."""
    if NAME == "Q2_K":
        byte = _byte(blocks, base + j)
        scale, low = byte & 15, byte >> 4
    else:
        d, m, rest = _byte(blocks, base + 4 + j % 4), _byte(blocks, base + 8 + j % 4), _byte(blocks, base + 12 + j % 4)
        scale = tl.where(j < 4, d & 63, (rest & 15) | ((d >> 2) & 0x30))
        low = tl.where(j < 4, m & 63, (rest >> 4) | ((m >> 2) & 0x30))
    return scale.to(tl.float32), low.to(tl.float32)


@triton.jit
def _decode(
    blocks, table, out, count,
    NAME: tl.constexpr, TABLE: tl.constexpr, D: tl.constexpr, M: tl.constexpr, VALUES: tl.constexpr, BYTES: tl.constexpr, SUB: tl.constexpr,
    BELOW: tl.constexpr, SMALL_BELOW: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, SMALL: tl.constexpr, SMALL_HIGH: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    place, inside = lanes(count, SIZE)
    base, i = place // VALUES * BYTES, (place % VALUES).to(tl.int32)
    code = _digit(blocks, base, i) if NAME == "TQ1_0" else _number(blocks, base, i, LOW, HIGH)
    value = tl.load(table + code) if TABLE else (code - BELOW).to(tl.float32)
    if NAME == "MXFP4":
        e = _byte(blocks, base)
        step = real(tl.where(e < 2, 0x20_0000 << tl.minimum(e, 1), (tl.maximum(e, 1) - 1) << 23))
    else:
        step = _half(blocks, base + D)
    if SMALL[0] >= 0:
        step *= (_number(blocks, base, i // SUB, SMALL, SMALL_HIGH) - SMALL_BELOW).to(tl.float32)
    if M >= 0 and VALUES == 256:
        scale, low = _two_numbers(blocks, base, i // SUB, NAME)
        value = step * scale * value - _half(blocks, base + M) * low
    elif M >= 0:
        value = step * value + _half(blocks, base + M)
    else:
        value = step * value
    tl.store(out + place, value, inside)
