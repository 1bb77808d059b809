"""A small GLM-4.7-Flash: multi-head latent attention, experts, an MTP layer. Megatron-Core has all of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tests.megatron.release import HEADS, MoeShape, Tensors

Q_RANK, KV_RANK, NOPE, ROPE, V_DIM = 40, 28, 12, 8, 18  # all different, so that no matrix passes for another or for its own transpose
EPSILON = 1e-6  # the releases say 1e-5, but transformers takes 1e-6 for q_a_layernorm and kv_a_layernorm whatever config.json says


class LatentShape(MoeShape):
    """What the models with latent attention share."""

    def latent_config(self) -> dict[str, Any]:
        return self.moe_config() | dict(
            model_type=self.model_type, attention_bias=False, kv_lora_rank=KV_RANK, num_key_value_heads=HEADS, q_lora_rank=Q_RANK,
            qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, rms_norm_eps=EPSILON, v_head_dim=V_DIM,
        )  # fmt: skip

    def megatron_config(self) -> dict[str, Any]:
        return self.megatron_moe() | dict(
            multi_latent_attention=True, q_lora_rank=Q_RANK, kv_lora_rank=KV_RANK, qk_head_dim=NOPE, qk_pos_emb_head_dim=ROPE, v_head_dim=V_DIM,
            kv_channels=NOPE, rope_type="rope", rotary_base=10000, rotary_percent=1.0, rotary_scaling_factor=1.0, mscale_all_dim=1.0,
            layernorm_epsilon=EPSILON, qk_layernorm=True,
        )  # fmt: skip

    def latent_attention(self, hf: Mapping[str, Tensor], name: str, key: str, q_norm: str, kv_norm: str) -> Tensors:
        """`q_norm`, `kv_norm`: where the norms between the down and up projections are, under `self_attention.`."""
        linears = {
            "linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj", "linear_kv_down_proj": "kv_a_proj_with_mqa",
            "linear_kv_up_proj": "kv_b_proj", "linear_proj": "o_proj",
        }  # fmt: skip
        return {
            f"{key}input_layernorm.weight": hf[f"{name}input_layernorm.weight"],
            f"{key}self_attention.{q_norm}": hf[f"{name}self_attn.q_a_layernorm.weight"],
            f"{key}self_attention.{kv_norm}": hf[f"{name}self_attn.kv_a_layernorm.weight"],
        } | {f"{key}self_attention.{to}.weight": hf[f"{name}self_attn.{linear}.weight"] for to, linear in linears.items()}


@dataclass(frozen=True, kw_only=True)
class Glm4MoeLite(LatentShape):
    model_type = "glm4_moe_lite"

    def config(self) -> dict[str, Any]:
        return self.latent_config() | dict(
            architectures=["Glm4MoeLiteForCausalLM"], dtype=self.dtype, partial_rotary_factor=1.0, rope_scaling=None, rope_theta=10000,
            topk_method="noaux_tc",
        )  # fmt: skip

    def decoder_layer(self, hf: Mapping[str, Tensor], name: str, key: str, layer: int) -> Tensors:
        fused = ("linear_q_up_proj.layer_norm_weight", "linear_kv_up_proj.layer_norm_weight")
        return self.latent_attention(hf, name, key, *fused) | self.feed_forward(hf, name, key, layer)
