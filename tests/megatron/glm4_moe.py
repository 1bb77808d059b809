"""A small GLM-4.5: grouped-query attention, experts, an MTP layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.megatron.release import MoeShape, Tensors, grouped

GROUPS, HEAD_DIM = 2, 32


@dataclass(frozen=True, kw_only=True)
class Glm4Moe(MoeShape):
    """`qk_norm`: as GLM-4.5 has it and Air has not."""

    model_type = "glm4_moe"
    qk_norm: bool

    def config(self) -> dict[str, Any]:
        return self.moe_config() | dict(
            architectures=["Glm4MoeForCausalLM"], model_type=self.model_type, attention_bias=True, head_dim=HEAD_DIM, num_key_value_heads=GROUPS,
            partial_rotary_factor=0.5, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000, torch_dtype=self.dtype, use_qk_norm=self.qk_norm,
        )  # fmt: skip

    def megatron_config(self) -> dict[str, Any]:
        return self.megatron_moe() | dict(
            num_query_groups=GROUPS, kv_channels=HEAD_DIM, layernorm_epsilon=1e-5, add_qkv_bias=True, qk_layernorm=self.qk_norm
        )

    def decoder_layer(self, hf: Mapping[str, Tensor], name: str, key: str, layer: int) -> Tensors:
        attention = f"{key}self_attention."
        out = {
            f"{attention}linear_qkv.layer_norm_weight": hf[f"{name}input_layernorm.weight"],
            f"{attention}linear_qkv.weight": grouped(hf, name, GROUPS, "weight"),
            f"{attention}linear_qkv.bias": grouped(hf, name, GROUPS, "bias"),
            f"{attention}linear_proj.weight": hf[f"{name}self_attn.o_proj.weight"],
        }
        if self.qk_norm:
            out |= {f"{attention}{p}_layernorm.weight": hf[f"{name}self_attn.{p}_norm.weight"] for p in ("q", "k")}
        return out | self.feed_forward(hf, name, key, layer)
