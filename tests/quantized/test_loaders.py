"""Quantized outputs in the real loaders: transformers' dequantizing paths and compressed-tensors' decompressors give our decoded bits.

AutoAWQ is not among them. Its last release (0.2.9, a source distribution) imports every model class for `awq.utils.packing_utils`, and with those
`datasets`, without which it stops; with it and torch 2.13 and transformers 5.23 the rest imports. Two functions are not worth what `datasets` needs.
Its vectors stand in (tests/vectors/quant/awq_autoawq.npz), and `dequantize_gemm`, its file loaded alone, gave the bits of our `awq` tensors.
"""

from __future__ import annotations

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from transformers import CompressedTensorsConfig, FineGrainedFP8Config

from glmconv import convert, open_checkpoint
from tests.quantized.models import as_torch, logits, parts_of, tensors_of

DEQUANTIZED = ("fp8", "fp8:ue8m0", "fp8:cuda-compat")
COMPRESSED = ("fp8:channel", "fp8:tensor", "mxfp8", "int4:g32", "int4:g64", "int4:g32:asym", "int4:g128:asym")


@pytest.fixture(scope="module")
def both(made, tmp_path_factory):
    """`both(target)`: the conversion, and what it is dequantized to."""
    root = tmp_path_factory.mktemp("plain")

    def make(target):
        plain = root / target.replace(":", "-")
        if not plain.exists():
            convert(made(target), {"hf": plain})
        return made(target), plain

    return make


@pytest.mark.parametrize("target", DEQUANTIZED)
def test_transformers_dequantizes_blocks_to_our_logits(target, both):
    quantized, plain = both(target)
    wanted = logits(plain, dtype=torch.bfloat16)
    assert torch.equal(logits(quantized, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)), wanted)
    assert torch.equal(logits(quantized, dtype=torch.bfloat16), wanted), "without a GPU it dequantizes by itself"


@pytest.mark.parametrize("target", ["fp8:channel", "int4:g32"])
def test_transformers_decompresses_compressed_tensors_to_our_logits(target, both):
    quantized, plain = both(target)
    found = logits(quantized, dtype=torch.bfloat16, quantization_config=CompressedTensorsConfig(dequantize=True))
    assert torch.equal(found, logits(plain, dtype=torch.bfloat16))


@pytest.mark.parametrize("target", COMPRESSED)
def test_compressed_tensors_decompresses_each_tensor_to_our_bits(target, both):
    quantized, _ = both(target)
    config = QuantizationConfig.model_validate(json.loads((quantized / "config.json").read_text())["quantization_config"])
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme)
    compressor = BaseCompressor.get_value_from_registry(config.format)
    stored = tensors_of(quantized)
    checked = 0
    with open_checkpoint(quantized) as checkpoint:
        for name, tensor in checkpoint:
            parts = parts_of(stored, name)
            if "weight_scale" not in parts:
                assert name not in stored or torch.equal(as_torch(stored[name]), tensor.read())
                continue
            found = compressor.decompress(parts, scheme)["weight"]
            assert torch.equal(found.to(torch.bfloat16), tensor.read()), name
            checked += 1
    assert checked == 3 * 4 + 3 + 2 * (1 + 16) * 3


def test_the_model_still_says_about_the_same(source, both):
    wanted = logits(source, dtype=torch.bfloat16)
    spread = wanted.std()
    for target, limit in (("fp8", 0.15), ("fp8:channel", 0.15), ("int4:g32", 0.6)):
        assert (logits(both(target)[1], dtype=torch.bfloat16) - wanted).std() < limit * spread
