"""NaN and Inf are found wherever they stand, in whatever form, and nothing else is taken for one."""

from __future__ import annotations

import pytest
import torch

from glmconv.kernels.nonfinite import BLOCK, first_nonfinite

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name)
def test_each_16_bit_value_is_judged_as_torch_judges_it(dtype):
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    finite = torch.isfinite(values)
    assert first_nonfinite(raw(values[finite]), name(dtype)) is None
    for value in values[~finite][::97]:
        assert first_nonfinite(raw(value.reshape(1)), name(dtype)) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_first_is_named_in_whichever_block_it_stands(dtype, value):
    count = 2 * BLOCK // dtype.itemsize + 5
    for at in (0, 1, BLOCK // dtype.itemsize - 1, BLOCK // dtype.itemsize, count - 1):
        values = torch.full((count,), torch.finfo(dtype).max, dtype=dtype)
        values[at:] = value
        assert first_nonfinite(raw(values), name(dtype)) == at


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_unaligned_bytes_and_none_at_all_are_fine(dtype):
    values = raw(torch.tensor([1.0, -2.0, float("inf")], dtype=dtype))
    assert first_nonfinite(memoryview(b"\xff" + values)[1:], name(dtype)) == 2
    assert first_nonfinite(b"", name(dtype)) is None


def test_integers_have_no_such_values():
    assert first_nonfinite(b"\xff" * 64, "int64") is None
