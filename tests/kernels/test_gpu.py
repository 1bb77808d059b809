"""The plain torch functions and the Triton kernels on an accelerator give the bytes that the compiled loops give on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from glmconv.kernels import fp8, int4, reference
from tests.kernels.triton_cases import CASES, array
from tests.kernels.triton_cases_ggml import CASES as BLOCKS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")]
ROWS, COLUMNS = 200, 320


@pytest.fixture
def weight():
    torch.manual_seed(0)
    made = torch.randn(ROWS, COLUMNS) * 10 ** torch.empty(ROWS, 1).uniform_(-6, 2)
    made[:64, :128] = 0
    return made.bfloat16()


@pytest.mark.parametrize("rule", ["division", "reciprocal", "ue8m0"])
@pytest.mark.parametrize("block", [(128, 128), (1, COLUMNS), (64, 32)])
def test_blocks(weight, block, rule):
    codes, scales, _ = reference.encode_block(weight.cuda(), block, rule)
    ours = np.empty((ROWS, COLUMNS), np.uint8), np.empty(tuple(scales.shape), np.float32)
    fp8.encode_block(array(weight), *ours, block, rule)
    assert np.array_equal(array(scales), ours[1])
    assert np.array_equal(array(codes), ours[0])
    values, bad = reference.decode_block(codes, scales, torch.bfloat16, block)
    out = np.empty((ROWS, COLUMNS), np.uint16)
    assert (fp8.decode_block(*ours, out, block, 0), bad) == (-1, -1)
    assert np.array_equal(array(values), out)


def test_mxfp8(weight):
    codes, exponents, _ = reference.encode_mx(weight.cuda())
    ours = np.empty((ROWS, COLUMNS), np.uint8), np.empty((ROWS, COLUMNS // 32), np.uint8)
    fp8.encode_mx(array(weight), *ours)
    assert np.array_equal(array(codes), ours[0])
    assert np.array_equal(array(exponents), ours[1])


@pytest.mark.parametrize("symmetric", [True, False])
def test_pack_quantized(weight, symmetric):
    packed, scales, zeros, _ = reference.encode_packed(weight.cuda(), 32, symmetric=symmetric)
    words, kept = np.empty((ROWS, COLUMNS // 8), np.int32), np.empty((ROWS, COLUMNS // 32), np.uint16)
    offsets = None if symmetric else np.empty((ROWS, COLUMNS // 32), np.int8)
    int4.encode_packed(array(weight), words, kept, offsets, 32)
    assert np.array_equal(array(packed), words)
    assert np.array_equal(array(scales), kept)
    assert offsets is None or np.array_equal(array(zeros), offsets)


def test_awq(weight):
    codes, zeros, scales, _ = reference.encode_awq(weight.cuda(), 32)
    ours = np.empty((COLUMNS, ROWS // 8), np.int32), np.empty((COLUMNS // 32, ROWS // 8), np.int32), np.empty((COLUMNS // 32, ROWS), np.float16)
    int4.encode_awq(array(weight), *ours, 32)
    for theirs, mine in zip((codes, zeros, scales), ours, strict=True):
        assert np.array_equal(array(theirs), mine)


@pytest.mark.parametrize("case", CASES | BLOCKS)
def test_triton_gives_the_bytes_of_the_compiled_loops(case):
    pytest.importorskip("triton", reason="Triton is not installed here")
    (CASES | BLOCKS)[case]("cuda")
