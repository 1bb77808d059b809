"""float8 kernels: what other projects made of the same weights, the plain torch reference for all else, and the facts that callers rely on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.kernels import fp8, reference

VECTORS = Path(__file__).parent.parent / "vectors" / "quant"
CASES = ("edge200x300", "tiles256", "ties128x256", "small128", "signed128")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TENSOR = (2**62, 2**62)
INPUTS = np.load(VECTORS / "fp8_inputs.npz")


def array(tensor: torch.Tensor) -> np.ndarray:
    """As kernels take it: bfloat16 as uint16."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def tensor(values: np.ndarray) -> torch.Tensor:
    found = torch.from_numpy(np.ascontiguousarray(values))
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def encoded(weight: np.ndarray, block: tuple[int, int], rule: str = "division") -> tuple[np.ndarray, np.ndarray, int]:
    codes, scales = np.full(weight.shape, 0xAA, np.uint8), np.full(grid(weight.shape, block), np.nan, np.float32)
    return codes, scales, fp8.encode_block(weight, codes, scales, block, rule)


def decoded(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], dtype: torch.dtype = torch.bfloat16, first_row: int = 0) -> np.ndarray:
    out = array(torch.zeros(codes.shape, dtype=dtype))
    assert fp8.decode_block(codes, scales, out, block, first_row) == -1
    return out


def agrees(weight: torch.Tensor, block: tuple[int, int], rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Encode by the kernel and by plain torch: the same bytes and the same first NaN or Inf."""
    ours, expected = encoded(array(weight), block, rule), reference.encode_block(weight, block, rule)
    np.testing.assert_array_equal(ours[0], expected[0].numpy())
    np.testing.assert_array_equal(ours[1].view(np.uint32), expected[1].numpy().view(np.uint32))
    assert ours[2] == expected[2]
    return ours[:2]


def all_values(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit dtype, 256 to a row."""
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(256, 256)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("file", "block", "rule"),
    [
        ("fp8_slime_block_fp8", (128, 128), "division"),
        ("fp8_slime_block_fp8_fp32in", (128, 128), "division"),
        ("fp8_slime_channel_fp8", (1, 300), "division"),
        ("fp8_EMULATED_slime_block_on_cuda", (128, 128), "reciprocal"),
        ("fp8_deepgemm_per_block_ue8m0", (128, 128), "ue8m0"),
    ],
)
def test_codes_scales_and_values_are_those_of_the_peer(file, block, rule, case):
    peer, weight = np.load(VECTORS / f"{file}.npz"), INPUTS[f"{case}.bf16"]
    codes, scales, _ = encoded(array(tensor(weight).float()) if "fp32in" in file else weight, block, rule)
    np.testing.assert_array_equal(codes, peer[f"{case}.codes"])
    np.testing.assert_array_equal(scales, peer[f"{case}.scale"])
    if f"{case}.dequant" in peer:
        np.testing.assert_array_equal(decoded(codes, scales, block), peer[f"{case}.dequant"])


def test_mx_is_what_compressed_tensors_writes_and_reads():
    peer = np.load(VECTORS / "ct_fp4_mx.npz")
    codes, exponents = np.empty((32, 128), np.uint8), np.empty((32, 4), np.uint8)
    assert fp8.encode_mx(peer["mxfp8.input"], codes, exponents) == -1
    np.testing.assert_array_equal(exponents, peer["mxfp8.weight_scale"])
    np.testing.assert_array_equal(codes, peer["mxfp8.weight"])
    np.testing.assert_array_equal(decoded(codes, fp8.exponents_to_scales(exponents), (1, 32)), peer["mxfp8.dequant"])


@pytest.mark.parametrize("case", CASES)
def test_values_of_other_encoders_are_read_as_they_read_them(case):
    channel = np.load(VECTORS / "fp8_ct_channel_bf16.npz")
    scales = np.ascontiguousarray(array(tensor(channel[f"{case}.scale"]).float()))
    np.testing.assert_array_equal(decoded(channel[f"{case}.codes"], scales, (1, 2**62)), channel[f"{case}.dequant"])
    block = np.load(VECTORS / "fp8_transformers_float.npz")
    if f"{case}.codes" in block:
        np.testing.assert_array_equal(decoded(block[f"{case}.codes"], block[f"{case}.scale"], (128, 128)), block[f"{case}.dequant"])


def test_where_peers_differ_from_the_format_ours_keeps_the_weight():
    """Facts of other encoders that are not imitated; each would be equal if the peer's formula were used."""
    codes, scales, _ = encoded(np.zeros((128, 128), np.uint16), (128, 128))
    assert not codes.any()  # miles divides by 0: NaN
    assert scales[0, 0] > 0
    tiny = array(torch.full((128, 128), 1e-11, dtype=torch.bfloat16))
    assert encoded(tiny, (128, 128))[0].all()
    assert not encoded(tiny, (128, 128), "ue8m0")[0].any()  # DeepGEMM's clamp at 1e-4, with which this rule comes, leaves nothing of it
    weight = INPUTS["edge200x300.bf16"]
    bf16, fp32 = (np.load(VECTORS / f"fp8_ct_block_{name}.npz")["edge200x300.codes"] for name in ("bf16", "fp32in"))
    np.testing.assert_array_equal(encoded(weight, (128, 128))[0], fp32)
    assert (bf16 != fp32).mean() > 0.01  # compressed-tensors rounds scale and quotient of bf16 weights to bf16


def test_each_bfloat16_and_float16_value_over_scales_of_every_size():
    for dtype in (torch.bfloat16, torch.float16):
        weight = all_values(dtype)
        codes = np.empty(weight.shape, np.uint8)
        for scale in np.geomspace(1e-20, 1e20, 21, dtype=np.float32):
            first = fp8.encode_scaled(array(weight), codes, scale)
            np.testing.assert_array_equal(codes, reference.encode(weight, torch.tensor(scale)).numpy())
            assert first == reference.first(~weight.isfinite())


def test_each_float32_near_a_code_or_a_tie_is_rounded_to_even():
    values = torch.arange(256, dtype=torch.uint8).view(reference.E4M3).float()
    values = values[values.isfinite()].sort().values.unique()
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([values, ties, torch.tensor([2.0**-10, 2.0**-126, 2.0**-149, 464.0, 480.0, 3e38])])
    near = torch.cat([near, torch.nextafter(near, torch.tensor(torch.inf)), torch.nextafter(near, torch.tensor(-torch.inf))]).repeat(2)
    weight = (near * torch.tensor([1.0, -1.0]).repeat_interleave(len(near) // 2)).reshape(1, -1)
    codes = np.empty(weight.shape, np.uint8)
    assert fp8.encode_scaled(array(weight), codes, 1.0) == -1
    np.testing.assert_array_equal(codes, reference.encode(weight, torch.tensor(1.0)).numpy())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 70), st.integers(1, 150)),
    block=st.tuples(st.sampled_from([1, 2, 7, 16, 64, 2**62]), st.sampled_from([1, 3, 8, 32, 64, 2**62])),
    dtype=st.sampled_from(DTYPES),
    rule=st.sampled_from(fp8.RULES),
    seed=st.integers(0, 2**32),
    spoiled=st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])), max_size=4),
)
def test_any_shape_block_dtype_and_rule_is_the_reference(shape, block, dtype, rule, seed, spoiled):
    source = torch.Generator().manual_seed(seed)
    weight = (torch.randn(shape, generator=source) * torch.exp2(torch.randint(-40, 15, (shape[0], 1), generator=source))).to(dtype)
    for at, value in spoiled:
        weight.view(-1)[at % weight.numel()] = value
    codes, scales = agrees(weight, block, rule)
    for out_dtype in DTYPES:
        begin = shape[0] // 2
        out = array(torch.zeros((shape[0] - begin, shape[1]), dtype=out_dtype))
        first = fp8.decode_block(codes[begin:], scales, out, block, begin)
        expected, expected_first = reference.decode_block(torch.from_numpy(codes[begin:]), torch.from_numpy(scales), out_dtype, block, begin)
        assert first == expected_first
        np.testing.assert_array_equal(out, array(expected))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 20), st.integers(1, 200), st.sampled_from([8, 16, 32]), st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_mx_of_any_shape_is_the_reference(rows, columns, group, dtype, seed):
    source = torch.Generator().manual_seed(seed)
    weight = (torch.randn((rows, columns), generator=source) * torch.exp2(torch.randint(-140, 120, (rows, 1), generator=source))).to(dtype)
    codes, exponents = np.empty((rows, columns), np.uint8), np.empty(grid((rows, columns), (1, group)), np.uint8)
    first = fp8.encode_mx(array(weight), codes, exponents, group)
    expected = reference.encode_mx(weight, group)
    np.testing.assert_array_equal(exponents, expected[1].numpy())
    np.testing.assert_array_equal(codes, expected[0].numpy())
    assert first == expected[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_code_decodes_to_its_value_times_the_scale_rounded_once(dtype):
    codes = np.arange(256, dtype=np.uint8).repeat(60).reshape(256, 60)
    scales = np.geomspace(2.0**-149, 3e38, 60, dtype=np.float32).reshape(1, 60)
    out = array(torch.zeros(codes.shape, dtype=dtype))
    assert fp8.decode_block(codes, scales, out, (256, 1), 0) == 127 * 60
    expected, _ = reference.decode_block(torch.from_numpy(codes), torch.from_numpy(scales), dtype, (256, 1))
    np.testing.assert_array_equal(out.view(f"u{out.itemsize}"), array(expected).view(f"u{out.itemsize}"))


@pytest.mark.parametrize("block", [(128, 128), (1, 256), (1, 32), TENSOR])
def test_decoded_bfloat16_encodes_to_the_same_codes_and_scales(block):
    weight = tensor(INPUTS["ties128x256.bf16"])
    codes, scales = agrees(weight, block, "division")
    again = encoded(decoded(codes, scales, block), block)
    np.testing.assert_array_equal(again[0], codes)
    np.testing.assert_array_equal(again[1], scales)


def test_a_second_pass_with_power_of_two_scales_may_change_bytes_but_no_value():
    weight = INPUTS["ties128x256.bf16"]
    codes, scales, _ = encoded(weight, (128, 128), "ue8m0")
    values = decoded(codes, scales, (128, 128))
    again = encoded(values, (128, 128), "ue8m0")
    assert (again[1] != scales).any()  # the largest code was 224: half the scale would do
    np.testing.assert_array_equal(decoded(again[0], again[1], (128, 128)), values)


@pytest.mark.parametrize("case", ["ties128x256", "small128"])
@pytest.mark.parametrize(("engine", "dtype"), [("sglang", torch.bfloat16), ("vllm", torch.float32)])
def test_what_engines_requantize_blocks_to_on_load_is_what_ours_give(engine, dtype, case):
    """On Blackwell both make power-of-two scales of a block checkpoint: SGLang by way of bfloat16, vLLM of float32."""
    peer = np.load(VECTORS / "fp8_requant_on_load.npz")
    codes, scales, _ = encoded(INPUTS[f"{case}.bf16"], (128, 128))
    again = encoded(decoded(codes, scales, (128, 128), dtype), (128, 128), "ue8m0")
    np.testing.assert_array_equal(again[1], peer[f"{case}.{engine}.scale"])
    np.testing.assert_array_equal(again[0], peer[f"{case}.{engine}.codes"])


def test_stored_scales_give_the_codes_back():
    weight = INPUTS["edge200x300.bf16"]
    codes, scales, _ = encoded(weight, (128, 128))
    for dtype in (torch.bfloat16, torch.float32):
        values = tensor(decoded(codes, scales, (128, 128), dtype))
        np.testing.assert_array_equal(reference.encode(values, reference.spread(torch.from_numpy(scales), (128, 128), values.shape)).numpy(), codes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", fp8.RULES)
def test_zeros_of_either_sign_are_kept_and_their_scale_is_above_zero(dtype, rule):
    weight = torch.zeros(5, 40, dtype=dtype)
    weight[1] = -0.0
    codes, scales = agrees(weight, (2, 16), rule)
    assert set(codes[1]) == {0x80}
    assert not np.delete(codes, 1, axis=0).any()
    assert (scales > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_in_pieces_is_the_tensor_in_one(dtype):
    weight = torch.randn(90, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    pieces = [array(piece) for piece in weight.split(32)]
    found = [fp8.largest(piece, "division") for piece in pieces]
    scale = fp8.scale_of(max(amax for amax, _ in found), "division")
    assert isinstance(scale, np.float32)
    assert [first for _, first in found] == [-1] * len(pieces)
    codes = [np.empty(piece.shape, np.uint8) for piece in pieces]
    for piece, code in zip(pieces, codes, strict=True):
        assert fp8.encode_scaled(piece, code, scale) == -1
    expected = encoded(array(weight), TENSOR)
    np.testing.assert_array_equal(np.concatenate(codes), expected[0])
    assert scale == expected[1]


def test_nan_and_inf_are_reported_where_they_stand_and_leave_the_rest_alone():
    weight = torch.randn(150, 300, generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    clean = encoded(array(weight), (128, 128))
    weight[140, 7], weight[3, 290], weight[3, 299] = torch.nan, -torch.inf, torch.tensor(0xFFC1, dtype=torch.uint16).view(torch.bfloat16)
    codes, scales, first = encoded(array(weight), (128, 128))
    assert first == 3 * 300 + 290
    assert [codes[140, 7], codes[3, 290], codes[3, 299]] == [0x7F, 0xFE, 0xFF]
    touched = ~weight.isfinite().numpy()
    np.testing.assert_array_equal(scales, clean[1])  # none of the three was its block's largest
    np.testing.assert_array_equal(codes[~touched], clean[0][~touched])
    assert fp8.largest(array(weight), "division") == reference.largest(weight, "division")
    assert fp8.decode_block(codes, scales, np.empty_like(array(weight)), (128, 128), 0) == 3 * 300 + 299


def test_no_rows_and_no_columns_are_no_fault():
    for shape in ((0, 8), (8, 0)):
        weight = np.empty(shape, np.uint16)
        assert encoded(weight, (128, 128))[2] == -1
        assert fp8.largest(weight, "ue8m0") == (float(np.float32(1e-4)), -1)
        assert fp8.encode_scaled(weight, np.empty(shape, np.uint8), 1.0) == -1
        assert fp8.decode_block(np.empty(shape, np.uint8), np.ones((1, 1), np.float32), weight, (128, 128), 0) == -1


def test_unaligned_and_read_only_weights_are_taken():
    weight = INPUTS["edge200x300.bf16"]
    shifted = np.frombuffer(b"\0" + weight.tobytes(), np.uint8)[1:].view(np.uint16).reshape(weight.shape)
    np.testing.assert_array_equal(encoded(shifted, (128, 128))[0], encoded(weight, (128, 128))[0])


def test_e8m0_bytes_are_powers_of_two():
    exponents = np.arange(256, dtype=np.uint8)
    scales = fp8.exponents_to_scales(exponents)
    np.testing.assert_array_equal(scales, torch.from_numpy(exponents).view(torch.float8_e8m0fnu).float().numpy())


def test_what_is_too_small_for_the_loops_is_refused():
    weight, codes, scales = np.zeros((130, 200), np.uint16), np.zeros((130, 200), np.uint8), np.ones((2, 2), np.float32)
    for bad in (
        lambda: fp8.encode_block(weight, codes[:-1], scales, (128, 128), "division"),
        lambda: fp8.encode_block(weight, codes, scales[:1], (128, 128), "division"),
        lambda: fp8.encode_block(weight, codes, scales.astype(np.float64), (128, 128), "division"),
        lambda: fp8.encode_scaled(weight, codes[:, 1:], 1.0),
        lambda: fp8.encode_mx(weight, codes, np.zeros((130, 6), np.uint8)),
        lambda: fp8.decode_block(codes, scales, weight, (128, 128), 127),
        lambda: fp8.decode_block(codes, scales, weight[1:], (128, 128), 0),
    ):
        with pytest.raises(ValueError, match="is needed"):
            bad()
