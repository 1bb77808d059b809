"""4-bit kernels: the peers' vectors, compressed-tensors itself, and the plain torch reference for all else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from glmconv.kernels import int4, reference

VECTORS = Path(__file__).parent.parent / "vectors" / "quant"
PACKED = np.load(VECTORS / "ct_pack_quantized.npz")
AWQ = np.load(VECTORS / "awq_autoawq.npz")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CARRIED = {torch.bfloat16: np.dtype(np.uint16), torch.float16: np.dtype(np.float16), torch.float32: np.dtype(np.float32)}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
Limits = tuple[torch.Tensor, torch.Tensor] | None


def array(tensor: torch.Tensor) -> np.ndarray:
    """As kernels take it: bfloat16 as uint16."""
    tensor = tensor.contiguous()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def tensor(values: np.ndarray) -> torch.Tensor:
    found = torch.from_numpy(values)
    return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found


def arrays(limits: Limits) -> tuple[np.ndarray, np.ndarray] | None:
    return limits and (limits[0].numpy(), limits[1].numpy())


def packed(weight: np.ndarray, group: int, *, symmetric: bool, limits: Limits = None, stored: np.dtype | None = None):
    """(packed, scales, zeros, first) from the kernel; zeros None if symmetric."""
    rows, columns = weight.shape
    words, scales = np.full((rows, -(-columns // 8)), 7, np.int32), np.empty((rows, columns // group), stored or weight.dtype)
    zeros = None if symmetric else np.full(scales.shape, 99, np.int8)
    return words, scales, zeros, int4.encode_packed(weight, words, scales, zeros, group, arrays(limits))


def awq(weight: np.ndarray, group: int, limits: Limits = None):
    """(qweight, qzeros, scales, first), written into slices of the columns of larger arrays."""
    rows, columns = weight.shape
    qweight, qzeros = np.full((columns, rows // 8 + 3), 7, np.int32), np.full((columns // group, rows // 8 + 3), 7, np.int32)
    scales = np.full((columns // group, rows + 3), 7, np.float16)
    first = int4.encode_awq(weight, qweight[:, 1:-2], qzeros[:, 1:-2], scales[:, 1:-2], group, arrays(limits))
    for whole in (qweight, qzeros, scales):
        assert (whole[:, 0] == 7).all()
        assert (whole[:, -2:] == 7).all()
    return qweight[:, 1:-2], qzeros[:, 1:-2], scales[:, 1:-2], first


def values_of(words, scales, zeros, group) -> np.ndarray:
    out = np.empty((words.shape[0], scales.shape[1] * group), scales.dtype)
    int4.decode_packed(words, scales, zeros, out, group)
    return out


@pytest.mark.parametrize("case", sorted({key.split(".")[0] for key in PACKED} - {"known"}))
def test_packed_words_scales_zeros_and_values_are_those_of_compressed_tensors(case):
    _, group, kind = case.split("_")
    words, scales, zeros, first = packed(PACKED[f"{case}.weight"], int(group[1:]), symmetric=kind == "sym")
    np.testing.assert_array_equal(words, PACKED[f"{case}.weight_packed"])
    np.testing.assert_array_equal(scales, PACKED[f"{case}.weight_scale"])
    np.testing.assert_array_equal(values_of(words, scales, zeros, int(group[1:])), PACKED[f"{case}.dequant"])
    assert first == -1
    if zeros is not None:
        np.testing.assert_array_equal(int4.pack_zeros(zeros), PACKED[f"{case}.weight_zero_point"])
        np.testing.assert_array_equal(int4.unpack_zeros(PACKED[f"{case}.weight_zero_point"]), zeros)


def test_zeros_are_packed_along_the_rows_as_compressed_tensors_packs():
    np.testing.assert_array_equal(int4.pack_zeros(PACKED["known.int8"]), PACKED["known.packed_dim0"])
    np.testing.assert_array_equal(int4.unpack_zeros(PACKED["known.packed_dim0"]), PACKED["known.int8"])
    five = PACKED["known.int8"][:5]
    np.testing.assert_array_equal(int4.unpack_zeros(int4.pack_zeros(five), 5), five)


@pytest.mark.parametrize("group", [32, 128])
def test_awq_words_scales_and_values_are_those_of_autoawq(group):
    case = f"fp16_g{group}"
    qweight, qzeros, scales, first = awq(AWQ[f"{case}.weight"], group)
    np.testing.assert_array_equal(qweight, AWQ[f"{case}.qweight"])
    np.testing.assert_array_equal(qzeros, AWQ[f"{case}.qzeros"])
    np.testing.assert_array_equal(scales, AWQ[f"{case}.scales"])
    out = np.empty((64, 256), np.float16)
    int4.decode_awq(qweight, qzeros, scales, out, group)
    np.testing.assert_array_equal(out.T, AWQ[f"{case}.dequant_in_out"])
    assert first == -1


def test_awq_integers_lie_where_autoawq_puts_them():
    out = np.empty(AWQ["known.ints_out_in"].shape, np.float32)
    int4.decode_awq(AWQ["known.qweight"], AWQ["known.qzeros"], AWQ["known.scales"], out, 16)
    np.testing.assert_array_equal(out, AWQ["known.ints_out_in"] - 3)


def spoil(weight: torch.Tensor, spoiled: list[tuple[int, float]]) -> torch.Tensor:
    for at, value in spoiled:
        weight.view(-1)[at % weight.numel()] = value
    return weight


def normals(rows: int, columns: int, dtype: torch.dtype, seed: int, powers: tuple[int, int]) -> torch.Tensor:
    """Normal values, each row with a size and a mean of its own; of other sizes than float16 can hold, they end at its largest."""
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn((rows, columns), generator=source) + 2 * torch.randn((rows, 1), generator=source)
    weight = weight * torch.exp2(torch.randint(*powers, (rows, 1), generator=source))
    return weight.clamp(-65504, 65504).to(dtype) if dtype == torch.float16 else weight.to(dtype)


SPOILED = st.lists(st.tuples(st.integers(0, 10_000), st.sampled_from([torch.nan, torch.inf, -torch.inf, 0.0, -0.0])), max_size=3)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 20),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 8, 12, 32, 64]),
    dtype=st.sampled_from(DTYPES),
    stored=st.sampled_from(DTYPES),
    symmetric=st.booleans(),
    limited=st.booleans(),
    seed=st.integers(0, 2**32),
    spoiled=SPOILED,
)
def test_packed_of_any_shape_and_dtype_is_the_reference(rows, groups, group, dtype, stored, symmetric, limited, seed, spoiled):
    stored = stored if dtype == torch.float32 else dtype
    weight = spoil(normals(rows, groups * group, dtype, seed, (-150, 130)), spoiled)
    weight[-1, :group] = 0
    limits = (torch.full((rows, groups), -0.3), torch.full((rows, groups), 0.2)) if limited else None
    words, scales, zeros, first = packed(array(weight), group, symmetric=symmetric, limits=limits, stored=CARRIED[stored])
    expected = reference.encode_packed(weight, group, limits, symmetric=symmetric, stored=stored)
    np.testing.assert_array_equal(scales, array(expected[1]))
    if zeros is not None:
        np.testing.assert_array_equal(zeros, expected[2].numpy())
    np.testing.assert_array_equal(words, expected[0].numpy())
    assert first == expected[3]
    for out_dtype in DTYPES:
        out = array(torch.zeros(weight.shape, dtype=out_dtype))
        int4.decode_packed(words, scales, zeros, out, group)
        np.testing.assert_array_equal(out, array(reference.decode_packed(expected[0], expected[1], expected[2], out_dtype, group)))


@settings(max_examples=60, deadline=None)
@given(
    eights=st.integers(1, 20),
    groups=st.integers(1, 5),
    group=st.sampled_from([1, 8, 12, 32, 128, 700]),
    dtype=st.sampled_from(DTYPES),
    limited=st.booleans(),
    seed=st.integers(0, 2**32),
    spoiled=SPOILED,
)
def test_awq_of_any_shape_and_dtype_is_the_reference(eights, groups, group, dtype, limited, seed, spoiled):
    weight = spoil(normals(eights * 8, groups * group, dtype, seed, (-30, 16)), spoiled)
    weight[-1, :group] = 0
    limits = (torch.full((eights * 8, groups), -0.3), torch.full((eights * 8, groups), 0.2)) if limited else None
    found, expected = awq(array(weight), group, limits), reference.encode_awq(weight, group, limits)
    for ours, theirs in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(ours, theirs.numpy())
    assert found[3] == expected[3]
    for out_dtype in DTYPES:
        out = array(torch.zeros(weight.shape, dtype=out_dtype))
        int4.decode_awq(*found[:3], out, group)
        np.testing.assert_array_equal(out, array(reference.decode_awq(*expected[:3], out_dtype, group)))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), group=st.sampled_from([8, 32, 128]))
def test_awq_integers_are_what_autoawq_reads_back_from_its_fake_quantized_weight(seed, group):
    """AutoAWQ quantizes, dequantizes, and quantizes once more to pack; ours leaves out the way there and back."""
    weight = normals(16, 2 * group, torch.float16, seed, (-24, 12))
    assume(bool((weight.float().amax() - weight.float().amin()) < 60000))
    groups, low, high = reference.grouped(weight, group, None)
    scales = (high - low).clamp(min=1e-5) / 15
    zeros = (-torch.round(low / scales)).clamp_(0, 15)
    scales, zeros = scales[..., None], zeros[..., None]
    fake = (torch.clamp(torch.round(groups / scales) + zeros, 0, 15) - zeros) * scales
    integers = torch.round((fake + zeros * scales) / scales).to(torch.int32).flatten(1)
    np.testing.assert_array_equal(awq(array(weight), group)[0], reference.awq_words(integers).numpy())


def compressor(group: int, *, symmetric: bool):
    """compressed-tensors' pack-quantized compressor and its scheme of four bits in groups."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=4, type="int", symmetric=symmetric, strategy="group", group_size=group)
    return BaseCompressor.get_value_from_registry("pack-quantized"), QuantizationScheme(targets=["Linear"], weights=weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
def test_compressed_tensors_computes_packs_and_reads_the_same(dtype, symmetric):
    from compressed_tensors.quantization.utils import calculate_qparams

    group, weight = 32, normals(24, 96, dtype, 5, (-6, 4))
    weight[3, 32:64] = 0
    weight[4] = weight[4].abs()
    ties = torch.arange(-7, 8) / (512 if dtype == torch.float16 else 64)  # scale 1, zero -8: the sum lies between two values of the dtype
    weight[5, :32] = torch.cat([0.5 + ties, 1.5 + ties, torch.tensor([0.0, 15.0])])
    peer, scheme = compressor(group, symmetric=symmetric)
    groups = weight.reshape(24, 3, group)
    scale, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights)
    state = peer.compress({"weight": weight, "weight_scale": scale, "weight_zero_point": zero}, scheme)
    words, scales, zeros, _ = packed(array(weight), group, symmetric=symmetric)
    np.testing.assert_array_equal(scales, array(scale))
    np.testing.assert_array_equal(words, state["weight_packed"].numpy())
    mine = {"weight_packed": torch.from_numpy(words), "weight_scale": tensor(scales), "weight_shape": torch.tensor(weight.shape)}
    if zeros is not None:
        np.testing.assert_array_equal(zeros, zero.numpy())
        mine["weight_zero_point"] = torch.from_numpy(int4.pack_zeros(zeros))
    np.testing.assert_array_equal(values_of(words, scales, zeros, group), array(peer.decompress(mine, scheme)["weight"]))


def test_scales_of_fewer_bits_than_the_weight_are_rounded_once_and_used_as_stored():
    """compressed-tensors divides a float32 weight by a bfloat16 scale in float32."""
    weight = normals(24, 96, torch.float32, 6, (-6, 4))
    peer, scheme = compressor(32, symmetric=True)
    scale = (weight.reshape(24, 3, 32).abs().amax(-1) / 7.5).bfloat16()
    state = peer.compress({"weight": weight, "weight_scale": scale}, scheme)
    words, scales, _, _ = packed(array(weight), 32, symmetric=True, stored=CARRIED[torch.bfloat16])
    np.testing.assert_array_equal(scales, array(scale))
    np.testing.assert_array_equal(words, state["weight_packed"].numpy())


def test_a_zero_group_has_a_scale_above_zero_and_decodes_to_zeros():
    for dtype in DTYPES:
        weight = torch.zeros(8, 64, dtype=dtype)
        for symmetric in (True, False):
            words, scales, zeros, _ = packed(array(weight), 32, symmetric=symmetric)
            assert (tensor(scales) == torch.finfo(dtype).eps).all()  # as compressed-tensors has it
            assert not values_of(words, scales, zeros, 32).any()
        qweight, qzeros, scales, _ = awq(array(weight), 32)
        assert (scales > 0).all()
        out = np.empty((8, 64), np.float16)
        int4.decode_awq(qweight, qzeros, scales, out, 32)
        assert not out.any()


def test_what_float16_cannot_hold_is_reported_as_inf_in_awq():
    weight = torch.zeros(8, 32)
    weight[2, 5] = 65519.0
    assert awq(array(weight), 32)[3] == -1
    weight[2, 5] = 65520.0
    assert awq(array(weight), 32)[3] == 2 * 32 + 5
    assert awq(array(weight.bfloat16()), 32)[3] == 2 * 32 + 5


def test_decoded_weights_encode_to_the_same_words_within_the_limits_of_their_scales():
    weight = tensor(PACKED["fp32_g32_asym.weight"])
    words, scales, zeros, _ = packed(array(weight), 32, symmetric=False)
    limits = tuple(((edge - torch.from_numpy(zeros)) * tensor(scales)).float() for edge in (-8, 7))
    again = packed(values_of(words, scales, zeros, 32), 32, symmetric=False, limits=limits)
    np.testing.assert_array_equal(again[0], words)


def test_no_rows_and_no_columns_are_no_fault():
    for shape in ((0, 32), (8, 0)):
        weight = np.empty(shape, np.uint16)
        words, scales, zeros, first = packed(weight, 32, symmetric=False)
        assert first == -1
        assert values_of(words, scales, zeros, 32).shape == shape
        *parts, first = awq(weight, 32)
        assert first == -1
        int4.decode_awq(*parts, weight, 32)


def test_what_is_too_small_for_the_loops_is_refused():
    weight = np.zeros((8, 64), np.uint16)
    words, scales, zeros, _ = packed(weight, 32, symmetric=False)
    parts = awq(weight, 32)[:3]
    limits = np.zeros((8, 1), np.float32), np.zeros((8, 1), np.float32)
    for bad in (
        lambda: int4.encode_packed(weight, words[:, 1:], scales, zeros, 32),
        lambda: int4.encode_packed(weight, words, scales, zeros[1:], 32),
        lambda: int4.encode_packed(weight, words, scales.view(np.float16), zeros, 32),
        lambda: int4.encode_packed(weight, words, scales, zeros, 32, limits),
        lambda: int4.encode_packed(weight, words, scales, zeros, 24),
        lambda: int4.decode_packed(words, scales, zeros, weight, 16),
        lambda: int4.encode_awq(weight[:7], *parts, 32),
        lambda: int4.encode_awq(weight, *parts, 32, limits),
        lambda: int4.decode_awq(parts[0], parts[1], parts[2][:1], weight, 32),
    ):
        with pytest.raises(ValueError, match=r"is needed|do not divide"):
            bad()
