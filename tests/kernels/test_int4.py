"""Four-bit kernels against the peers' own bytes, against plain torch, and against their own unpacking functions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.kernels import int4, reference

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "quant"
PACKED = [f"{dtype}_g{group}_{kind}" for dtype in ("bf16", "fp32") for group in (32, 128) for kind in ("sym", "asym")]


def vector(file: str, case: str) -> dict[str, np.ndarray]:
    loaded = np.load(VECTORS / f"{file}.npz")
    return {key.removeprefix(f"{case}."): loaded[key] for key in loaded.files if key.startswith(f"{case}.")}


def packed(weight: np.ndarray, group: int, symmetric: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, int]:
    rows, columns = weight.shape
    words, scales = np.zeros((rows, columns // 8), np.int32), np.zeros((rows, columns // group), weight.dtype)
    zeros = None if symmetric else np.zeros((rows, columns // group), np.int8)
    return words, scales, zeros, int4.encode_packed(weight, words, scales, zeros, group)


def awq(weight: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    rows, columns = weight.shape
    codes, zeros = np.zeros((columns, rows // 8), np.int32), np.zeros((columns // group, rows // 8), np.int32)
    scales = np.zeros((columns // group, rows), np.float16)
    return codes, zeros, scales, int4.encode_awq(weight, codes, zeros, scales, group)


def unpacked_awq(words: np.ndarray) -> np.ndarray:
    """AutoAWQ's words [n, c] as codes [n, 8c], by its order as published."""
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # where the nibble of column i of eight stands
    nibbles = np.stack([(words.view(np.uint32) >> np.uint32(4 * at)) & np.uint32(15) for at in order], axis=-1)
    return nibbles.reshape(words.shape[0], -1)


@pytest.mark.parametrize("case", PACKED)
def test_pack_quantized_is_compressed_tensors_byte_for_byte(case):
    expected = vector("ct_pack_quantized", case)
    group, symmetric = int(case.split("_")[1][1:]), case.endswith("_sym")
    words, scales, zeros, bad = packed(expected["weight"], group, symmetric)
    assert bad == -1
    assert np.array_equal(words, expected["weight_packed"])
    assert np.array_equal(scales, expected["weight_scale"])
    if zeros is not None:
        assert np.array_equal(zeros, expected["zero_point_unpacked"])
        assert np.array_equal(int4.pack_zeros(zeros), expected["weight_zero_point"])
        assert np.array_equal(int4.unpack_zeros(expected["weight_zero_point"]), zeros)
    out = np.zeros_like(expected["dequant"])
    int4.decode_packed(words, scales, zeros, out, group)
    assert np.array_equal(out, expected["dequant"])


@pytest.mark.parametrize("case", ["fp16_g128", "fp16_g32"])
def test_awq_is_autoawq_byte_for_byte(case):
    expected = vector("awq_autoawq", case)
    group = int(case.split("_g")[1])
    codes, zeros, scales, bad = awq(expected["weight"], group)
    assert bad == -1
    assert np.array_equal(codes, expected["qweight"])
    assert np.array_equal(zeros, expected["qzeros"])
    assert np.array_equal(scales, expected["scales"])
    out = np.zeros(expected["weight"].shape, np.float16)
    int4.decode_awq(codes, zeros, scales, out, group)
    assert np.array_equal(out.T, expected["dequant_in_out"])


def test_awqs_order_of_nibbles_is_the_peers():
    known = vector("awq_autoawq", "known")
    assert np.array_equal(unpacked_awq(known["qweight"]), known["ints_out_in"].T)
    out = np.zeros(known["ints_out_in"].shape, np.float32)
    int4.decode_awq(known["qweight"], known["qzeros"], known["scales"], out, 16)
    assert np.array_equal(out, (known["ints_out_in"] - 3).astype(np.float32))


def test_packed_words_are_what_the_peers_functions_unpack():
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((24, 256)) * 0.02).astype(np.float32)
    words, scales, zeros, _ = packed(weight, 32, symmetric=False)
    assert zeros is not None
    codes = unpack_from_int32(torch.from_numpy(words), 4, torch.Size(weight.shape))
    wanted, wanted_scales, wanted_zeros = reference.encode_packed(torch.from_numpy(weight), 32, symmetric=False)
    assert torch.equal(codes, wanted)
    assert np.array_equal(scales, wanted_scales.numpy())
    assert wanted_zeros is not None
    assert np.array_equal(zeros, wanted_zeros.numpy())
    assert np.array_equal(int4.pack_zeros(zeros), pack_to_int32(torch.from_numpy(zeros), 4, packed_dim=0).numpy())


def random_weight(seed: int, rows: int, columns: int) -> torch.Tensor:
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 10 ** torch.empty(rows, 1).uniform_(-4, 2)
    weight[torch.rand(rows, columns) < 0.05] = 0
    weight[0, : columns // 2] = 0
    return weight


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 12), groups=st.integers(1, 5), group=st.sampled_from([8, 16, 32, 40, 128]), symmetric=st.booleans(), narrow=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_shape_and_group_is_packed_as_plain_torch_does(rows, groups, group, symmetric, narrow, seed):
    weight = random_weight(seed, rows, groups * group)
    given_as = weight.bfloat16() if narrow else weight
    array = given_as.view(torch.int16).numpy().view(np.uint16) if narrow else weight.numpy()
    words, scales, zeros, _ = packed(array, group, symmetric)
    wanted, wanted_scales, wanted_zeros = reference.encode_packed(given_as, group, symmetric)
    assert torch.equal(unpack_from_int32(torch.from_numpy(words), 4, wanted.shape), wanted)
    found = torch.from_numpy(scales.view(np.int16) if narrow else scales)
    assert torch.equal(found.view(torch.bfloat16) if narrow else found, wanted_scales)
    assert (zeros is None and wanted_zeros is None) or np.array_equal(zeros, wanted_zeros.numpy())


@settings(max_examples=40, deadline=None)
@given(words=st.integers(1, 20), groups=st.integers(1, 4), group=st.sampled_from([8, 32, 64]), narrow=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_any_shape_and_group_is_awq_as_plain_torch_does(words, groups, group, narrow, seed):
    weight = random_weight(seed, 8 * words, groups * group)
    given_as = weight.bfloat16() if narrow else weight.half()
    array = given_as.view(torch.int16).numpy().view(np.uint16) if narrow else given_as.numpy()
    codes, zeros, scales, bad = awq(array, group)
    wanted, wanted_zeros, wanted_scales = reference.encode_awq(given_as, group)
    assert bad == -1
    assert np.array_equal(unpacked_awq(codes), wanted.numpy().T)
    assert np.array_equal(unpacked_awq(zeros), wanted_zeros.numpy().T)
    assert np.array_equal(scales, wanted_scales.numpy().T)


@pytest.mark.parametrize("symmetric", [True, False])
def test_given_limits_take_the_place_of_min_and_max(symmetric):
    weight = random_weight(1, 8, 128).numpy()
    low, high = (np.full((8, 4), value, np.float32) for value in (-0.5, 0.75))
    words, scales, zeros = np.zeros((8, 16), np.int32), np.zeros((8, 4), np.float32), None if symmetric else np.zeros((8, 4), np.int8)
    int4.encode_packed(weight, words, scales, zeros, 32, (low, high))
    assert np.allclose(scales, 0.75 / 7.5 if symmetric else 1.25 / 15)
    codes = [np.zeros(shape, np.int32) for shape in ((128, 1), (4, 1))]
    halves = np.zeros((4, 8), np.float16)
    int4.encode_awq(weight, codes[0], codes[1], halves, 32, (low, high))
    assert np.allclose(halves, 1.25 / 15, rtol=1e-3)


def test_what_is_not_finite_is_found():
    weight = np.full((16, 64), 0x3F80, np.uint16)
    weight[9, 33], weight[3, 40] = 0x7FC0, 0xFF80
    assert packed(weight, 32, True)[3] == 3 * 64 + 40
    assert awq(weight, 32)[3] == 3 * 64 + 40
    beyond = np.full((8, 32), 70000.0, np.float32)
    assert awq(beyond, 32)[3] == 0, "float16 ends at 65504"
