"""The weights of ggml's searches, float32 [n, sub-blocks] as the values x that they belong to (`launch.beside`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from glmconv.kernels.gpu.ggml_search import lanes, squares
from glmconv.kernels.gpu.launch import beside, launch_lanes


def weighed(rows: Tensor, x: Tensor, importance: Tensor, length: int, by: int) -> Tensor:
    """importance * sqrt(mean + x * x), float32 [n, sub-blocks] like `x`; mean: the sum of squares of each `length` values of a row, by `by`."""
    means = torch.empty(rows.numel() // length, dtype=torch.float32, device=rows.device)
    launch_lanes(_means, len(means), rows, means, length, float(by))
    q, w = beside(importance, len(x)), torch.empty_like(x)
    launch_lanes(_weighed, x.shape[1], x, q, means, w, q.shape[1], length // len(x), N=len(x))
    return w


def raised(x: Tensor) -> Tensor:
    """|x| and the root of the mean square of its sub-block."""
    w = torch.empty_like(x)
    launch_lanes(_raised, x.shape[1], x, w, N=len(x))
    return w


def repeated(x: Tensor, importance: Tensor) -> Tensor:
    """The importance itself, for each row."""
    q = beside(importance, len(x))
    return q.repeat(1, x.shape[1] // q.shape[1])


@triton.jit
def _means(rows, means, length, by, count, SIZE: tl.constexpr):
    at, inside = lanes(count, SIZE)
    tl.store(means + at, tl.div_rn(squares(rows, at * length, 1, length), by), inside)


@triton.jit
def _weighed(x, q, means, w, span, share, count, N: tl.constexpr, SIZE: tl.constexpr):
    """`share` sub-blocks have one mean; the importance repeats after `span` of them."""
    at, inside = lanes(count, SIZE)
    mean, heavy = tl.load(means + at // share), at % span
    for _ in range(N):
        v = tl.load(x + at)
        tl.store(w + at, tl.load(q + heavy) * tl.sqrt_rn(mean + v * v), inside)
        at += count
        heavy += span


@triton.jit
def _raised(x, w, count, N: tl.constexpr, SIZE: tl.constexpr):
    at, inside = lanes(count, SIZE)
    mean = tl.sqrt_rn(tl.div_rn(squares(x, at, count, N), N * 1.0))
    for _ in range(N):
        tl.store(w + at, mean + tl.abs(tl.load(x + at)), inside)
        at += count
