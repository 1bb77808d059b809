"""How the kernels are started: tensors as their bits, one number per program, and where NaN or Inf stands."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

KINDS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
CARRIERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
NONE = 1 << 62  # no index: beyond any tensor
TILE = 4096  # values that a program holds at once
LANES = 128  # ggml's blocks that a program works on, one in each lane


def bits(values: Tensor) -> Tensor:
    """The bits of contiguous `values`, as the signed integers that kernels take."""
    return values.view(CARRIERS[values.dtype])


def launch(kernel: Any, programs: int, weight: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` that many times beside each other on the device of `weight`, no product fused into a sum."""
    with torch.cuda.device_of(weight):
        kernel[(programs,)](*arguments, **constants, enable_fp_fusion=False)


def launch_lanes(kernel: Any, count: int, weight: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run `kernel` on `weight`, the other arguments and `count`, with a lane for each of so many blocks or sub-blocks."""
    launch(kernel, ceil_div(count, LANES), weight, weight, *arguments, count, SIZE=LANES, **constants)


def beside(flat: Tensor, n: int) -> Tensor:
    """[n, blocks] of float32 values that lie block after block of n: the blocks' first values side by side, then the second ones."""
    return flat.reshape(-1, n).t().contiguous()


def unspoiled(weight: Tensor) -> Tensor:
    """Where kernels put the smallest index of a NaN or Inf."""
    return torch.full((1,), NONE, dtype=torch.int64, device=weight.device)


def first(spoiled: Tensor) -> int:
    """What kernels put there, or -1; waits for the device."""
    found = int(spoiled.item())
    return -1 if found == NONE else found


def ceil_div(size: int, by: int) -> int:
    return -(-size // by)


def tile(rows: int, columns: int) -> dict[str, int]:
    """Powers of two for a tile of at most TILE values, or one row: as wide as `columns` may need, no taller than `rows` need."""
    wide = triton.next_power_of_2(columns)
    return {"TALL": min(triton.next_power_of_2(rows), max(TILE // wide, 1)), "WIDE": wide}
