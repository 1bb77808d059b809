"""FP8 kernels against the peers' own bytes, against plain torch, and against the format's definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.kernels import fp8, reference

VECTORS = Path(__file__).resolve().parents[1] / "vectors" / "quant"
CASES = ("edge200x300", "tiles256", "ties128x256", "small128", "signed128")
WHOLE = 1 << 62
BLOCK, ROW, ALL = (128, 128), (1, WHOLE), (WHOLE, WHOLE)


def vector(file: str, case: str) -> dict[str, np.ndarray]:
    loaded = np.load(VECTORS / f"{file}.npz")
    return {key.removeprefix(f"{case}."): loaded[key] for key in loaded.files if key.startswith(f"{case}.")}


def weight_of(case: str, dtype: str = "bf16") -> np.ndarray:
    bits = vector("fp8_inputs", case)["bf16"]
    return bits if dtype == "bf16" else (bits.astype(np.uint32) << 16).view(np.float32)


def encoded(weight: np.ndarray, block: tuple[int, int], rule: str) -> tuple[np.ndarray, np.ndarray, int]:
    grid = tuple(-(-n // max(1, min(by, n))) for n, by in zip(weight.shape, block, strict=True))
    codes, scales = np.full(weight.shape, 0x55, np.uint8), np.full(grid, np.nan, np.float32)
    bad = fp8.encode_block(weight, codes, scales, block, rule)
    return codes, scales, bad


def decoded(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], kind: type = np.uint16) -> np.ndarray:
    out = np.zeros(codes.shape, kind)
    assert fp8.decode_block(codes, scales, out, block, 0) == -1
    return out


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().view(np.uint16)


def tensor_of(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("file", "block", "rule", "dtype"),
    [
        ("fp8_slime_block_fp8", BLOCK, "division", "bf16"),
        ("fp8_slime_block_fp8_fp32in", BLOCK, "division", "fp32"),
        ("fp8_slime_channel_fp8", ROW, "division", "bf16"),
        ("fp8_EMULATED_slime_block_on_cuda", BLOCK, "reciprocal", "bf16"),
        ("fp8_deepgemm_per_block_ue8m0", BLOCK, "ue8m0", "bf16"),
    ],
)
def test_the_bytes_are_the_peers(file, block, rule, dtype, case):
    expected = vector(file, case)
    codes, scales, bad = encoded(weight_of(case, dtype), block, rule)
    assert bad == -1
    assert np.array_equal(codes, expected["codes"])
    assert np.array_equal(scales.ravel(), expected["scale"].ravel())
    if "dequant" in expected:
        assert np.array_equal(decoded(codes, scales, block), expected["dequant"])


def test_mxfp8_is_compressed_tensors():
    expected = vector("ct_fp4_mx", "mxfp8")
    codes, exponents = np.zeros_like(expected["weight"]), np.zeros_like(expected["weight_scale"])
    assert fp8.encode_mx(expected["input"], codes, exponents) == -1
    assert np.array_equal(codes, expected["weight"])
    assert np.array_equal(exponents, expected["weight_scale"])
    assert np.array_equal(decoded(codes, fp8.exponents_to_scales(exponents), (1, 32)), expected["dequant"])


@pytest.mark.parametrize("case", CASES[1:])
def test_what_transformers_encoded_is_decoded_as_it_decodes_it(case):
    expected = vector("fp8_transformers_float", case)
    assert np.array_equal(decoded(expected["codes"], np.atleast_2d(expected["scale"]).astype(np.float32), BLOCK), expected["dequant"])


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_scales_of_a_channel_are_decoded_as_compressed_tensors_does(case):
    expected = vector("fp8_ct_channel_bf16", case)
    scales = (expected["scale"].astype(np.uint32) << 16).view(np.float32)
    assert np.array_equal(decoded(expected["codes"], scales, ROW), expected["dequant"])


def test_compressed_tensors_quotient_in_bfloat16_is_not_ours():
    """A bf16 quotient and scale (its way with bf16 weights) put 3 % of the codes elsewhere; ours divides in float32."""
    codes, scales, _ = encoded(weight_of("edge200x300"), BLOCK, "division")
    theirs = vector("fp8_ct_block_bf16", "edge200x300")
    differing = np.mean(codes != theirs["codes"])
    assert 0.005 < differing < 0.2
    exact = (weight_of("edge200x300", "fp32").astype(np.float64) - decoded(codes, scales, BLOCK, np.float32)) ** 2
    assert np.sqrt(exact.mean()) < 0.03 * np.sqrt((weight_of("edge200x300", "fp32").astype(np.float64) ** 2).mean())


def test_the_clamp_of_deepgemm_loses_tiny_weights_and_ours_keeps_them():
    weight = (weight_of("small128") & 0x807F) | 0x2E80  # 2**-34 to 2**-33: an unused expert's, say
    assert not (encoded(weight, BLOCK, "ue8m0")[0] & 0x7F).any()
    codes, scales, _ = encoded(weight, BLOCK, "division")
    plain = (weight.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    error = np.sqrt(((decoded(codes, scales, BLOCK, np.float32) - plain) ** 2).mean() / (plain**2).mean())
    assert error < 0.03


@pytest.mark.parametrize("rule", ["division", "reciprocal", "ue8m0"])
@pytest.mark.parametrize("exponent", [-120, -60, -14, -1, 0, 3, 40, 100])
def test_every_bfloat16_value_is_encoded_as_plain_torch_does(rule, exponent):
    every = np.arange(1 << 16, dtype=np.uint32).astype(np.uint16)
    plain = (every.astype(np.uint32) << 16).view(np.float32)
    limit = np.float32(2.0**exponent)
    weight = every[np.isfinite(plain) & (np.abs(plain) <= limit)]
    weight = np.resize(weight, (-(-len(weight) // 256), 256)).astype(np.uint16)
    for block in (BLOCK, ROW, (32, 64)):
        codes, scales, bad = encoded(weight, block, rule)
        wanted, wanted_scales = reference.encode_block(tensor_of(weight), block, rule)
        assert bad == -1
        assert np.array_equal(scales, wanted_scales.numpy())
        assert np.array_equal(codes, wanted.numpy())


@pytest.mark.parametrize("scale", [2.0**-126, 1e-30, 2.2363e-15, 1e-3, 1.0, 3.7, 1e20, 7e35])
@pytest.mark.parametrize(("kind", "dtype"), [(np.uint16, torch.bfloat16), (np.float32, torch.float32), (np.float16, torch.float16)])
def test_every_code_is_decoded_as_plain_torch_does(scale, kind, dtype):
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8).reshape(1, -1)
    scales = np.array([[scale]], np.float32)
    wanted = reference.decode_block(torch.from_numpy(codes), torch.from_numpy(scales), ALL, dtype)
    found = decoded(codes, scales, ALL, kind)
    assert np.array_equal(found.view(np.uint8), wanted.contiguous().view(torch.uint8).numpy())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 70), columns=st.integers(1, 90), bn=st.sampled_from([1, 3, 16, 32, 128, WHOLE]), bk=st.sampled_from([1, 5, 32, 128, WHOLE]),
    rule=st.sampled_from(["division", "reciprocal", "ue8m0"]), narrow=st.booleans(), seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_any_shape_and_block_is_encoded_and_decoded_as_plain_torch_does(rows, columns, bn, bk, rule, narrow, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * 10 ** torch.empty(rows, 1).uniform_(-8, 3)
    weight[torch.rand(rows, columns) < 0.1] = 0
    given_as = weight.bfloat16() if narrow else weight
    codes, scales, _ = encoded(bits_of(given_as) if narrow else weight.numpy(), (bn, bk), rule)
    wanted, wanted_scales = reference.encode_block(given_as, (bn, bk), rule)
    assert np.array_equal(scales, wanted_scales.numpy())
    assert np.array_equal(codes, wanted.numpy())
    back = reference.decode_block(wanted, wanted_scales, (bn, bk), torch.bfloat16)
    assert np.array_equal(decoded(codes, scales, (bn, bk)), bits_of(back))


def test_rows_are_decoded_from_wherever_they_begin():
    codes, scales, _ = encoded(weight_of("edge200x300"), BLOCK, "division")
    whole = decoded(codes, scales, BLOCK)
    for start, stop in ((0, 1), (1, 130), (127, 129), (128, 200), (199, 200)):
        out = np.zeros((stop - start, 300), np.uint16)
        fp8.decode_block(codes[start:stop], scales, out, BLOCK, start)
        assert np.array_equal(out, whole[start:stop])


def test_a_block_of_zeros_has_codes_zero_and_a_scale_above_zero():
    weight = np.zeros((128, 256), np.uint16)
    weight[:, 128:] = 0x8000  # -0
    for rule in fp8.RULES:
        codes, scales, _ = encoded(weight, BLOCK, rule)
        assert (scales > 0).all()
        assert not codes[:, :128].any()
        assert (codes[:, 128:] == 0x80).all()


def test_what_is_not_finite_is_found_and_kept_as_documented():
    weight = np.full((130, 140), 0x3F80, np.uint16)
    clean, clean_scales, _ = encoded(weight, BLOCK, "division")
    weight[129, 3], weight[5, 139], weight[7, 7] = 0x7FC0, 0x7F80, 0xFF80
    codes, scales, bad = encoded(weight, BLOCK, "division")
    assert bad == 5 * 140 + 139
    assert np.array_equal(scales, clean_scales)
    assert (codes[129, 3] & 0x7F, codes[5, 139], codes[7, 7]) == (0x7F, 0x7E, 0xFE)
    weight[129, 3], weight[5, 139], weight[7, 7] = (0x3F80,) * 3
    assert np.array_equal(encoded(weight, BLOCK, "division")[0], clean)
    assert fp8.largest(np.array([[1, 0x7FC0]], np.uint16), "division")[1] == 1


def test_a_code_that_is_nan_is_found():
    codes = np.zeros((3, 5), np.uint8)
    codes[2, 1], codes[1, 4] = 0x7F, 0xFF
    assert fp8.decode_block(codes, np.ones((1, 1), np.float32), np.zeros((3, 5), np.uint16), ALL, 0) == 9


def test_one_scale_for_a_tensor_that_is_seen_in_pieces():
    weight = weight_of("edge200x300")
    top = max(fp8.largest(weight[:90], "division")[0], fp8.largest(weight[90:], "division")[0])
    scale = fp8.scale_of(top, "division")
    codes, scales, _ = encoded(weight, ALL, "division")
    assert scales.item() == scale
    pieces = np.zeros(weight.shape, np.uint8)
    fp8.encode_scaled(weight[:90], pieces[:90], scale)
    fp8.encode_scaled(weight[90:], pieces[90:], scale)
    assert np.array_equal(pieces, codes)


@pytest.mark.parametrize("case", ["edge200x300", "ties128x256", "signed128"])
@pytest.mark.parametrize("block", [BLOCK, ROW])
def test_encoding_what_was_decoded_changes_nothing(case, block):
    codes, scales, _ = encoded(weight_of(case), block, "division")
    again, again_scales, _ = encoded(decoded(codes, scales, block), block, "division")
    assert np.array_equal(codes, again)
    assert np.array_equal(scales, again_scales)


def test_exponents_are_powers_of_two_and_back():
    every = np.arange(255, dtype=np.uint8)
    scales = fp8.exponents_to_scales(every)
    assert np.array_equal(scales.astype(np.float64), 2.0 ** (every.astype(np.float64) - 127))
    assert np.array_equal(fp8.scales_to_exponents(scales), every)
    assert np.isnan(fp8.exponents_to_scales(np.array([255], np.uint8))).all()
    assert torch.equal(torch.from_numpy(scales), torch.from_numpy(every).view(torch.float8_e8m0fnu).float())
    with pytest.raises(ValueError, match="power of two"):
        fp8.scales_to_exponents(np.array([3.0], np.float32))
