"""A small GLM-4-0414: dense, with a norm behind the attention and one behind the feed-forward beside the usual two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.megatron.release import FFN, HEADS, HIDDEN, VOCAB, Shape, Tensors, grouped

GROUPS, HEAD_DIM = 2, 32


@dataclass(frozen=True, kw_only=True)
class Glm4(Shape):
    """`bias`: of queries, keys and values; the 9B has one, the 32B has none."""

    model_type = "glm4"
    mtp = 0
    bias: bool

    def config(self) -> dict[str, Any]:
        return dict(
            architectures=["Glm4ForCausalLM"], model_type=self.model_type, attention_bias=self.bias, attention_dropout=0.0, eos_token_id=[1],
            head_dim=HEAD_DIM, hidden_act="silu", hidden_size=HIDDEN, initializer_range=0.02, intermediate_size=FFN, max_position_embeddings=128,
            num_attention_heads=HEADS, num_hidden_layers=self.layers, num_key_value_heads=GROUPS, pad_token_id=0, partial_rotary_factor=0.5,
            rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False, torch_dtype=self.dtype, use_cache=True, vocab_size=VOCAB,
        )  # fmt: skip

    def megatron_config(self) -> dict[str, Any]:
        return dict(num_query_groups=GROUPS, kv_channels=HEAD_DIM, layernorm_epsilon=1e-5, add_qkv_bias=self.bias, rotary_interleaved=True)

    def decoder_layer(self, hf: Mapping[str, Tensor], name: str, key: str, layer: int) -> Tensors:
        attention = f"{key}self_attention."
        out = {
            f"{attention}linear_qkv.layer_norm_weight": hf[f"{name}input_layernorm.weight"],
            f"{attention}linear_qkv.weight": grouped(hf, name, GROUPS, "weight"),
            f"{attention}linear_proj.weight": hf[f"{name}self_attn.o_proj.weight"],
            f"{key}post_self_attn_layernorm.weight": hf[f"{name}post_self_attn_layernorm.weight"],
            f"{key}mlp.linear_fc1.layer_norm_weight": hf[f"{name}post_attention_layernorm.weight"],
            f"{key}mlp.linear_fc1.weight": hf[f"{name}mlp.gate_up_proj.weight"],
            f"{key}mlp.linear_fc2.weight": hf[f"{name}mlp.down_proj.weight"],
            f"{key}post_mlp_layernorm.weight": hf[f"{name}post_mlp_layernorm.weight"],
        }
        return out | ({f"{attention}linear_qkv.bias": grouped(hf, name, GROUPS, "bias")} if self.bias else {})

    def megatron_tensors(self, hf: Mapping[str, Tensor]) -> Tensors:
        """Both forms at once: a tensor per layer, and stacked along an axis of layers, as Megatron-Core saves layers that are all alike."""
        out = super().megatron_tensors(hf)
        first = "decoder.layers.0."
        names = [key.removeprefix(first) for key in out if key.startswith(first)]
        return out | {f"decoder.layers.{name}": torch.stack([out[f"decoder.layers.{i}.{name}"] for i in range(self.layers)]) for name in names}
