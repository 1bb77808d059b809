"""The Triton kernels beside the compiled loops, byte by byte: by test_gpu.py on a device, by test_triton.py in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.kernels.triton_cases CASE...
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import numpy as np
import torch

from glmconv.kernels import fp8, int4

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def array(tensor: torch.Tensor) -> np.ndarray:
    """As the loops take it: bfloat16 as uint16."""
    plain = tensor.cpu().contiguous()
    return plain.view(torch.int16).numpy().view(np.uint16) if plain.dtype == torch.bfloat16 else plain.numpy()


def same(theirs: torch.Tensor, ours: np.ndarray) -> None:
    """The same bytes: of NaN and of zeros too."""
    found = array(theirs)
    assert (found.dtype, found.shape) == (ours.dtype, ours.shape)
    np.testing.assert_array_equal(found.view(f"u{found.itemsize}"), ours.view(f"u{ours.itemsize}"))


def plain(rows: int, columns: int, dtype: torch.dtype, seed: int, powers: tuple[int, int] = (-150, 130)) -> torch.Tensor:
    """Rows of normal values and of heavy tails, each of its own size (subnormals too) and mean, with zeros of both signs."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=source) + 2 * torch.randn((rows, 1), generator=source)
    weight[::3] *= torch.rand(weight[::3].shape, generator=source) ** -2
    weight = (weight * torch.exp2(torch.randint(*powers, (rows, 1), generator=source))).clamp(-3e38, 3e38)
    weight[rows // 2], weight[rows // 2 + 1] = 0.0, -0.0
    weight[1], weight[2] = weight[1].abs(), -weight[2].abs()
    return (weight.clamp(-65504, 65504) if dtype == torch.float16 else weight).to(dtype)


def spoiled(weight: torch.Tensor) -> torch.Tensor:
    """With NaN of both signs, Inf of both signs, and 32 NaN in a row."""
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, -torch.nan]).to(weight.dtype)
    for number, value in enumerate(values):
        weight[5 + number, number::7] = value
    weight[4, :32] = torch.nan
    return weight


def weights(rows: int, columns: int, *powers: tuple[int, int]) -> Iterator[torch.Tensor]:
    for seed, dtype in enumerate(DTYPES):
        yield plain(rows, columns, dtype, seed, *powers)
        yield spoiled(plain(rows, columns, dtype, seed + 10, *powers))


def each_value(device: str) -> None:
    """Every bfloat16 and float16 under scales of every size, subnormal ones too."""
    from glmconv.kernels.gpu import fp8 as triton_fp8

    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(256, 256)
        codes, there = np.empty(weight.shape, np.uint8), weight.to(device)
        for scale in (2.0**-149, 2.0**-127, *np.geomspace(1e-20, 1e20, 11, dtype=np.float32)):
            fp8.encode_scaled(array(weight), codes, scale)
            same(triton_fp8.encode(there, torch.tensor(scale, dtype=torch.float32, device=device)), codes)


def each_code(device: str) -> None:
    """Every code times scales from the smallest subnormal on."""
    from glmconv.kernels.gpu import fp8 as triton_fp8

    codes = torch.arange(256, dtype=torch.uint8).repeat_interleave(60).reshape(256, 60)
    scales = np.geomspace(2.0**-149, 3e38, 60, dtype=np.float32).reshape(1, 60)
    for dtype in DTYPES:
        found, bad = triton_fp8.decode_block(codes.to(device), torch.from_numpy(scales).to(device), dtype, (256, 1))
        out = array(torch.empty(codes.shape, dtype=dtype))
        assert fp8.decode_block(codes.numpy(), scales, out, (256, 1), 0) == bad == 127 * 60
        same(found, out)


def blocks(device: str) -> None:
    """Blocks whole and ragged, rows and tensors, by every rule, and the way back from a row in the middle."""
    from glmconv.kernels.gpu import fp8 as triton_fp8

    grids = (("division", (128, 128)), ("reciprocal", (64, 100)), ("ue8m0", (2**62, 2**62)), ("division", (1, 300)), ("ue8m0", (7, 64)))
    for weight in weights(21, 300, (-150, 120)):
        for rule, block in grids:
            codes, scales, bad = triton_fp8.encode_block(weight.to(device), block, rule)
            ours = np.empty(weight.shape, np.uint8), np.empty(tuple(scales.shape), np.float32)
            assert fp8.encode_block(array(weight), *ours, block, rule) == bad
            same(scales, ours[1])
            same(codes, ours[0])
            found, bad = triton_fp8.decode_block(codes[9:], scales, weight.dtype, block, 9)
            out = np.empty_like(array(weight)[9:])
            assert fp8.decode_block(ours[0][9:], ours[1], out, block, 9) == bad
            same(found, out)
        for rule in fp8.RULES:
            assert triton_fp8.largest(weight.to(device), rule) == fp8.largest(array(weight), rule)
    tall = plain(300, 257, torch.bfloat16, 3, (-10, 5))
    codes, scales, _ = triton_fp8.encode_block(tall.to(device), (128, 128), "division")
    ours = np.empty(tall.shape, np.uint8), np.empty((3, 3), np.float32)
    fp8.encode_block(array(tall), *ours, (128, 128), "division")
    same(scales, ours[1])
    same(codes, ours[0])


def mx(device: str) -> None:
    """Groups whole and ragged."""
    from glmconv.kernels.gpu import fp8 as triton_fp8

    for weight in weights(150, 72):
        codes, exponents, bad = triton_fp8.encode_mx(weight.to(device))
        ours = np.empty(weight.shape, np.uint8), np.empty((150, 3), np.uint8)
        assert fp8.encode_mx(array(weight), *ours) == bad
        same(exponents, ours[1])
        same(codes, ours[0])


def limits_of(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    shape = weight.shape[0], weight.shape[1] // group
    return torch.full(shape, -0.3), torch.full(shape, 0.2)


def packed(device: str) -> None:
    """pack-quantized, symmetric or not, in groups of powers of two and others, within limits or not."""
    from glmconv.kernels.gpu import int4 as triton_int4

    for number, weight in enumerate((*weights(21, 96), *weights(21, 96, (-12, 4)))):
        there = weight.to(device)
        for group, symmetric, limited in ((32, True, False), (24, False, False), (48, False, True), (8, True, True))[number % 2 :: 2]:
            limits = limits_of(weight, group) if limited else None
            edges = limits and tuple(edge.to(device) for edge in limits)
            stored = DTYPES[number % 2] if weight.dtype == torch.float32 else weight.dtype
            words, scales, zeros, bad = triton_int4.encode_packed(there, group, edges, symmetric=symmetric, stored=stored)
            kept, points = array(torch.empty(scales.shape, dtype=stored)), None if symmetric else np.empty(tuple(scales.shape), np.int8)
            ours = np.empty(tuple(words.shape), np.int32)
            assert int4.encode_packed(array(weight), ours, kept, points, group, limits and tuple(edge.numpy() for edge in limits)) == bad
            same(scales, kept)
            same(zeros, np.zeros(kept.shape, np.int8) if points is None else points)
            same(words, ours)
            out = array(torch.empty(weight.shape, dtype=DTYPES[number % 3]))
            int4.decode_packed(ours, kept, points, out, group)
            same(triton_int4.decode_packed(words, scales, None if symmetric else zeros, DTYPES[number % 3], group), out)


def awq(device: str) -> None:
    """AutoAWQ's layout, in groups of powers of two and others, within limits or not."""
    from glmconv.kernels.gpu import int4 as triton_int4

    for number, weight in enumerate((*weights(40, 96, (-30, 16)), *weights(40, 96, (-12, 4)))):
        for group, limited in ((32, False), (48, True)):
            limits = limits_of(weight, group) if limited else None
            edges = limits and tuple(edge.to(device) for edge in limits)
            *parts, bad = triton_int4.encode_awq(weight.to(device), group, edges)
            ours = np.empty((96, 5), np.int32), np.empty((96 // group, 5), np.int32), np.empty((96 // group, 40), np.float16)
            assert int4.encode_awq(array(weight), *ours, group, limits and tuple(edge.numpy() for edge in limits)) == bad
            for theirs, mine in zip(parts, ours, strict=True):
                same(theirs, mine)
            out = array(torch.empty(weight.shape, dtype=DTYPES[number % 3]))
            int4.decode_awq(*ours, out, group)
            same(triton_int4.decode_awq(*parts, DTYPES[number % 3], group), out)


def nothing(device: str) -> None:
    """No rows and no columns."""
    from glmconv.kernels.gpu import fp8 as triton_fp8
    from glmconv.kernels.gpu import int4 as triton_int4

    for shape in ((0, 32), (8, 0)):
        weight = torch.empty(shape, dtype=torch.bfloat16, device=device)
        codes, scales, bad = triton_fp8.encode_block(weight, (128, 128), "division")
        assert (codes.shape, bad) == (weight.shape, -1)
        assert triton_fp8.decode_block(codes, scales, weight.dtype, (128, 128))[0].shape == weight.shape
        assert triton_fp8.largest(weight, "ue8m0") == (float(np.float32(1e-4)), -1)
        assert triton_fp8.encode_mx(weight)[2] == -1
        words, scales, zeros, bad = triton_int4.encode_packed(weight, 32, symmetric=False)
        assert triton_int4.decode_packed(words, scales, zeros, weight.dtype, 32).shape == weight.shape
        *parts, bad = triton_int4.encode_awq(weight, 32)
        assert triton_int4.decode_awq(*parts, weight.dtype, 32).shape == weight.shape


CASES: dict[str, Callable[[str], None]] = {case.__name__: case for case in (each_value, each_code, blocks, mx, packed, awq, nothing)}

if __name__ == "__main__":
    for name in sys.argv[1:]:
        CASES[name]("cpu")
