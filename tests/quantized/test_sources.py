"""Quantized sources: every form that releases and peers write is read alike, a broken one is refused by name, and requantizing rounds once."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from glmconv import Options, convert, open_checkpoint, verify
from glmconv.check.verify import verify_same
from glmconv.kernels import reference
from tests.quantized.models import as_torch, parts_of, relative_rmse, tensors_of
from tests.roundtrip.shards import MANIFEST, Stored, copied, marks, reindexed, release, save

NAME = "model.layers.1.mlp.experts.3.gate_proj.weight"
BASE = NAME.removesuffix(".weight")


def rewritten(folder: Path, target: Path, change: Callable[[dict[str, Stored]], None], **config: object) -> Path:
    """A copy in two files, with other tensors and other fields of quantization_config; None takes one out."""
    copied(folder, target)
    stored = tensors_of(folder)
    change(stored)
    for file in target.glob("*.safetensors"):
        file.unlink()
    names = list(stored)
    for number, part in enumerate((names[::2], names[1::2]), 1):  # a weight and its scale lie in different shards
        save(target / f"model-{number:05d}-of-00002.safetensors", {name: stored[name] for name in part})
    reindexed(target)
    value = json.loads((target / "config.json").read_text())
    if config:
        fields = value["quantization_config"] | config
        value["quantization_config"] = {key: field for key, field in fields.items() if field is not None}
    (target / "config.json").write_text(json.dumps(value))
    return target


def same_weights(a: Path, b: Path) -> bool:
    with open_checkpoint(a) as left, open_checkpoint(b) as right:
        return all(torch.equal(tensor.read(), right[name].read()) for name, tensor in left)


def each_scale(change: Callable[[Stored], Stored]) -> Callable[[dict[str, Stored]], None]:
    def do(stored: dict[str, Stored]) -> None:
        for name in [name for name in stored if "_scale" in name]:
            stored[name] = change(stored[name])

    return do


def floats(stored: Stored) -> np.ndarray:
    return np.frombuffer(stored.data, np.float32)


def as_bfloat16(stored: Stored) -> Stored:
    bits = floats(stored).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return Stored("BF16", stored.shape, (bits >> 16).astype(np.uint16).tobytes())


def as_exponents(dtype: str) -> Callable[[Stored], Stored]:
    return lambda stored: Stored(dtype, stored.shape, (floats(stored).view(np.uint32) >> 23).astype(np.uint8).tobytes())


def renamed(old: str, new: str) -> Callable[[dict[str, Stored]], None]:
    def do(stored: dict[str, Stored]) -> None:
        for name in [name for name in stored if name.endswith(old)]:
            stored[name.removesuffix(old) + new] = stored.pop(name)

    return do


@pytest.mark.parametrize(
    ("target", "change", "config"),
    [
        ("fp8", lambda stored: None, {}),
        ("fp8", lambda stored: None, {"weight_block_size": None, "activation_scheme": None, "fmt": None}),
        ("fp8", lambda stored: None, {"modules_to_not_convert": ["model.layers.1.self_attn.indexers_proj"]}),
        ("fp8", renamed("weight_scale_inv", "weight_scale"), {}),
        ("fp8:ue8m0", each_scale(as_bfloat16), {}),
        ("fp8:ue8m0", each_scale(as_exponents("F8_E8M0")), {}),
        ("fp8:ue8m0", each_scale(as_exponents("U8")), {}),
        ("fp8:channel", each_scale(lambda s: Stored(s.dtype, s.shape[:1], s.data)), {}),
        ("fp8:tensor", each_scale(lambda s: Stored(s.dtype, [], s.data)), {}),
        ("fp8:tensor", each_scale(lambda s: Stored(s.dtype, [1, 1], s.data)), {}),
        ("fp8:64x64", lambda stored: None, {}),
        ("mxfp8", renamed("weight_scale", "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [1, 32]}),
        ("int4:g32", lambda stored: None, {"config_groups": {"W4A16": {}}}),
        ("awq:g32", lambda stored: None, {"modules_to_not_convert": None}),
    ],
)
def test_each_form_is_read_alike(target, change, config, made, tmp_path):
    other = rewritten(made(target), tmp_path / "other", change, **config)
    assert same_weights(made(target), other)
    convert(other, {"hf": tmp_path / "plain"})
    assert verify(other, tmp_path / "plain").same
    assert same_weights(made(target), tmp_path / "plain")


def test_an_official_release_per_channel_becomes_blocks_no_worse_than_float64_would(source, made, tmp_path):
    """Channel scales in bfloat16, as llm-compressor writes them, quantized anew in blocks: through float32 once."""

    def coarse(stored: dict[str, Stored]) -> None:
        for name in [name for name in stored if name.endswith("weight_scale")]:
            bits = floats(stored[name]).view(np.uint32) >> 16
            stored[name] = Stored("BF16", stored[name].shape, bits.astype(np.uint16).tobytes())

    official = rewritten(made("fp8:channel"), tmp_path / "official", coarse)
    convert(official, {"fp8": tmp_path / "blocks"})
    before, after = parts_of(tensors_of(official), NAME), parts_of(tensors_of(tmp_path / "blocks"), NAME)
    exact = before["weight"].double() * before["weight_scale"].double()
    tiles = exact.reshape(1, 128, 2, 128)
    scale = tiles.abs().amax(dim=(1, 3)) / 448
    ideal = (tiles / scale[:, None, :, None]).float().to(torch.float8_e4m3fn).double() * scale[:, None, :, None]
    ours = after["weight"].double().reshape(1, 128, 2, 128) * after["weight_scale_inv"].double()[:, None, :, None]
    wanted = as_torch(tensors_of(source)[NAME])
    assert relative_rmse(ours.reshape(128, 256), wanted) <= relative_rmse(ideal.reshape(128, 256), wanted) * 1.001
    assert verify_same(official, tmp_path / "blocks").same
    assert verify_same(source, tmp_path / "blocks").same


def nearest_codes(exact: torch.Tensor, target: str) -> torch.Tensor:
    """What 4 bits in groups of 32 make of float64 values: all in float64, but for the scale, which is rounded to its stored dtype."""
    groups = exact.reshape(-1, 32)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    if target == "int4:g32":
        scale = (torch.maximum(-low, high) / 7.5).bfloat16().double()
        return ((groups / scale).clamp(-8, 7).round() * scale).reshape(exact.shape)
    scale = ((high - low) / 15).to(torch.float16 if target == "awq:g32" else torch.bfloat16).double()
    zero = (-low / scale).round().clamp(0, 15)
    return ((((groups / scale) + zero).round().clamp(0, 15) - zero) * scale).reshape(exact.shape)


@pytest.mark.parametrize("target", ["int4:g32", "int4:g32:asym", "awq:g32"])
def test_fp8_becomes_four_bits_through_float32_once_no_worse_than_float64_would(target, made, tmp_path):
    convert(made("fp8"), {target: tmp_path / "four"})
    before, after = parts_of(tensors_of(made("fp8")), NAME), parts_of(tensors_of(tmp_path / "four"), NAME)
    scale = before["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    exact, wide = before["weight"].double() * scale.double(), before["weight"].float() * scale
    if target == "awq:g32":
        words, zeros, scales, _ = reference.encode_awq(wide, 32)
        assert torch.equal(after["qweight"], words)
        assert torch.equal(after["qzeros"], zeros)
        assert torch.equal(after["scales"], scales)
        values = reference.decode_awq(words, zeros, scales, torch.float32, 32)
    else:
        words, scales, zeros, _ = reference.encode_packed(wide, 32, symmetric=target == "int4:g32", stored=torch.bfloat16)
        assert torch.equal(after["weight_packed"], words)
        assert torch.equal(after["weight_scale"], scales)
        values = reference.decode_packed(words, scales, zeros, torch.float32, 32)
    assert relative_rmse(values, exact) <= relative_rmse(nearest_codes(exact, target), exact) * 1.002


@pytest.mark.parametrize("target", ["fp8", "fp8:channel", "fp8:tensor", "mxfp8", "awq:g32", "int4:g32", "int4:g64:asym"])
def test_codes_and_scales_that_are_in_the_targets_form_pass_unchanged(target, made, tmp_path):
    done = convert(made(target), {target: tmp_path / "again"})
    assert any("pass unchanged" in note for note in done.notes)
    assert {n: t.data for n, t in tensors_of(tmp_path / "again").items()} == {n: t.data for n, t in tensors_of(made(target)).items()}
    result = verify_same(made(target), tmp_path / "again")
    assert result.same
    assert not result.losses


@pytest.mark.parametrize(("first", "second"), [("fp8:channel", "fp8"), ("fp8", "awq:g32"), ("awq:g32", "int4:g32:asym"), ("fp8", "fp8:ue8m0")])
def test_another_form_is_quantized_anew_and_said_so(first, second, made, tmp_path):
    done = convert(made(first), {second: tmp_path / "again"})
    assert any("quantized anew" in note for note in done.notes)
    assert verify_same(made(first), tmp_path / "again").same


def bad_scale(value: float, at: int = 0) -> Callable[[dict[str, Stored]], None]:
    def do(stored: dict[str, Stored]) -> None:
        data = bytearray(stored[f"{NAME}_scale_inv"].data)
        data[4 * at : 4 * at + 4] = struct.pack("<f", value)
        stored[f"{NAME}_scale_inv"].data = bytes(data)

    return do


def bad_code(stored: dict[str, Stored]) -> None:
    data = bytearray(stored[NAME].data)
    data[256 * 5 + 9] = 0xFF
    stored[NAME].data = bytes(data)


def without(suffix: str) -> Callable[[dict[str, Stored]], None]:
    return lambda stored: stored.pop(f"{BASE}.{suffix}")


def with_part(suffix: str, dtype: str, shape: list[int], size: int) -> Callable[[dict[str, Stored]], None]:
    return lambda stored: stored.__setitem__(f"{BASE}.{suffix}", Stored(dtype, shape, b"\1" * size))


BAD = [
    ("a scale that is NaN", "fp8", bad_scale(float("nan")), "scale that is NaN"),
    ("a scale that is infinite", "fp8", bad_scale(float("inf"), 1), "infinite"),
    ("a scale of zero", "fp8", bad_scale(0.0), "zero"),
    ("a negative scale", "fp8", bad_scale(-1e-3), "negative"),
    ("a NaN code", "fp8", bad_code, "row 5, column 9"),
    ("no scale", "fp8", without("weight_scale_inv"), "has no scale"),
    ("a scale without its weight", "fp8", without("weight"), "but not all"),
    ("two scales", "fp8", with_part("weight_scale", "F32", [1], 4), "two scales"),
    ("a scale of another shape", "fp8", with_part("weight_scale_inv", "F32", [3, 2], 24), "under scales of [3, 2]"),
    ("a scale of integers", "fp8", with_part("weight_scale_inv", "I64", [1, 2], 16), "scales of int64"),
    ("a weight of another shape", "fp8", with_part("weight", "F8_E4M3", [64, 256], 64 * 256), "the config needs"),
    ("codes of the other FP8", "fp8", with_part("weight", "F8_E5M2", [128, 256], 128 * 256), "but not all"),
    ("a norm in FP8", "fp8", lambda stored: stored.__setitem__("model.norm.weight", Stored("F8_E4M3", [256], bytes(256))), "no scale"),
    ("no zeros", "awq:g32", without("qzeros"), "has no qzeros"),
    ("no codes", "awq:g32", without("qweight"), "but not all"),
    ("zeros of another shape", "awq:g32", with_part("qzeros", "I32", [4, 16], 256), "qzeros of int32"),
    ("a group that does not divide", "awq:g32", with_part("scales", "F16", [7, 128], 7 * 256), "7 groups"),
    ("GPTQ's order", "awq:g32", with_part("g_idx", "I32", [256], 1024), "GPTQ"),
    ("no shape", "int4:g32", without("weight_shape"), "has no weight_shape"),
    ("a shape that is another", "int4:g32", with_part("weight_shape", "I64", [2], 16), "weight_shape of ["),
    ("reordered columns", "int4:g32", with_part("weight_g_idx", "I32", [256], 1024), "another order"),
    ("zeros of another layout", "int4:g32:asym", with_part("weight_zero_point", "I32", [8, 16], 512), "weight_zero_point of int32"),
]


@pytest.mark.parametrize(("target", "change", "says"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
@pytest.mark.parametrize("to", ["hf", "fp8"])
def test_a_broken_one_is_refused_by_name_and_nothing_is_finished(target, change, says, to, made, tmp_path, glmconv):
    broken = rewritten(made(target), tmp_path / "broken", change)
    before = marks(broken)
    answer = glmconv("convert", broken, tmp_path / "there", "--to", to)
    assert answer.code == 5
    (line,) = answer.errors
    assert says in line
    assert BASE in line or "model.norm.weight" in line
    assert not (tmp_path / "there" / MANIFEST).exists()
    assert marks(broken) == before


@pytest.mark.parametrize("to", ["fp8", "fp8:tensor", "awq:g32", "int4:g32", "mxfp8"])
def test_nan_and_inf_are_refused_with_their_place_or_kept(to, source, tmp_path, glmconv):
    stored = tensors_of(source)
    data = bytearray(stored[NAME].data)
    data[2 * (256 * 77 + 200) : 2 * (256 * 77 + 200) + 2] = b"\xc0\x7f"
    stored[NAME].data = bytes(data)
    bad = copied(source, tmp_path / "bad")
    for file in bad.glob("*.safetensors"):
        file.unlink()
    save(bad / "model.safetensors", stored)
    (bad / "model.safetensors.index.json").unlink()
    answer = glmconv("convert", bad, tmp_path / "there", "--to", to)
    assert answer.code == 5
    assert f"{NAME}: is NaN or Inf in row 77, column 200" in answer.errors[0]
    kept = glmconv("convert", bad, tmp_path / "kept", "--to", to, "--nonfinite", "keep", "--verify", "none")
    assert kept.code == 0, kept.err
    assert "hold NaN or Inf" in kept.err


def test_one_bit_of_a_scale_and_a_block_of_zeros_are_found(source, made, tmp_path, glmconv):
    assert glmconv("verify", source, made("fp8"), "--exact").code == 0
    for number, change in enumerate((lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: bytes(len(data) // 2) + data[len(data) // 2 :])):
        there = tmp_path / f"there-{number}"
        convert(source, {"fp8": there})
        file = next(path for path in there.glob("*.safetensors") if f"{NAME}_scale_inv".encode() in path.read_bytes())
        raw = bytearray(file.read_bytes())
        stored = tensors_of(there)
        old = stored[f"{NAME}_scale_inv" if number == 0 else NAME].data
        assert raw.count(old) == 1
        at = raw.index(old)
        raw[at : at + len(old)] = change(old)
        file.write_bytes(raw)
        answer = glmconv("verify", source, there, "--exact")
        assert answer.code == 1
        assert NAME in answer.out
    assert glmconv("verify", source, tmp_path / "there-1").code == 1, "half of a tensor is gone"


def test_the_release_is_what_comes_back_in_names_and_side_files(source, made, tmp_path):
    (tmp_path / "made").mkdir()
    convert(made("awq:g32"), {"hf": tmp_path / "back"}, options=Options())
    assert set(tensors_of(tmp_path / "back")) == set(tensors_of(source))
    before, after = release(source), release(tmp_path / "back")
    assert json.loads(before["config.json"]) == json.loads(after["config.json"])


def test_a_quantized_copy_of_the_head_is_dropped_for_megatron_and_comes_back_whole(toy, tmp_path):
    """The official GLM-4.5-FP8 quantizes `shared_head.head`, a copy of `lm_head`, which it leaves in bfloat16."""
    convert(toy("glm4.5-355B-A32B"), {"fp8:channel": tmp_path / "made"})
    copy = "model.layers.4.shared_head.head.weight"

    def quantize(stored: dict[str, Stored]) -> None:
        head = as_torch(stored[copy]).float()
        scale = head.abs().amax(1, keepdim=True) / 448
        codes = (head / scale).to(torch.float8_e4m3fn).view(torch.uint8)
        stored[copy] = Stored("F8_E4M3", list(head.shape), codes.numpy().tobytes())
        stored[f"{copy}_scale"] = Stored("F32", list(scale.shape), scale.numpy().tobytes())

    official = rewritten(tmp_path / "made", tmp_path / "official", quantize)
    convert(official, {"torch_dist": tmp_path / "td", "hf": tmp_path / "plain"})
    assert verify(official, tmp_path / "plain").same
    result = verify_same(official, tmp_path / "td")
    assert result.same
    assert [loss.tensor for loss in result.losses] == [copy]
    convert(tmp_path / "td", {"hf": tmp_path / "back"})
    back = tensors_of(tmp_path / "back")
    assert back[copy].data == back["lm_head.weight"].data
