"""A small GLM-5: latent attention with an indexer that selects the keys of each query, experts, an MTP layer with an indexer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.megatron.glm4_moe_lite import ROPE, LatentShape
from tests.megatron.release import Tensors

INDEX_HEADS, INDEX_DIM = 10, 32
FUSED = ("linear_q_up_proj.layer_norm_weight", "linear_kv_up_proj.layer_norm_weight")
SEPARATE = ("q_layernorm.weight", "kv_layernorm.weight")


@dataclass(frozen=True)
class Dialect:
    """How one family of Megatron trees names GLM-5's tensors: the latent norms, the indexer's four modules, and which rows of a head come first."""

    norms: tuple[str, str]
    indexer: Mapping[str, str]
    rope_first: bool


MCORE_INDEXER = {name: f"core_attention.indexer.{to}" for name, to in
                 dict(wq_b="linear_wq_b", wk="linear_wk", k_norm="k_norm", weights_proj="linear_weights_proj").items()}  # fmt: skip
DIALECTS = {
    "slime": Dialect(FUSED, {name: name for name in MCORE_INDEXER}, rope_first=False),  # slime's and miles' plugin
    "mcore": Dialect(FUSED, MCORE_INDEXER, rope_first=False),  # Megatron-Core 0.16 to 0.18
    "bridge": Dialect(SEPARATE, MCORE_INDEXER, rope_first=True),  # Megatron-Core from 0.19 on, Megatron-Bridge
}


@dataclass(frozen=True, kw_only=True)
class GlmMoeDsa(LatentShape):
    """`top_k` keys are selected for each query. From the second layer on only every `frequency`th has an indexer, the others share its selection.

    `even_query_norm`: q_a_layernorm has one value. Trees with fused norms give their indexer the query before that norm: other keys are selected
    than by transformers, unless the norm only scales.
    """

    model_type = "glm_moe_dsa"
    aliases = False
    dialect: str
    top_k: int
    frequency: int = 1
    even_query_norm: bool = False

    def config(self) -> dict[str, Any]:
        types = ["full" if self.has_indexer(layer) else "shared" for layer in range(self.layers)]
        sharing = dict(index_topk_freq=self.frequency, index_skip_topk_offset=2, indexer_types=types) if self.frequency > 1 else {}
        return self.latent_config() | sharing | dict(
            architectures=["GlmMoeDsaForCausalLM"], dtype=self.dtype, head_dim=ROPE, index_head_dim=INDEX_DIM, index_n_heads=INDEX_HEADS,
            index_topk=self.top_k, indexer_rope_interleave=True, rope_interleave=True, rope_parameters={"rope_theta": 10000, "rope_type": "default"},
            scoring_func="sigmoid", topk_method="noaux_tc",
        )  # fmt: skip

    def megatron_config(self) -> dict[str, Any]:
        return super().megatron_config() | dict(
            experimental_attention_variant="dsa", dsa_indexer_n_heads=INDEX_HEADS, dsa_indexer_head_dim=INDEX_DIM, dsa_indexer_topk=self.top_k
        )

    def adjusted(self, name: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, 0.75) if self.even_query_norm and name.endswith("q_a_layernorm.weight") else tensor

    def has_indexer(self, layer: int) -> bool:
        assert self.layers % self.frequency == 1 % self.frequency  # so that the MTP layer, which is layer `layers`, has one, as GLM-5.2's has
        return max(layer - 1, 0) % self.frequency == 0

    def decoder_layer(self, hf: Mapping[str, Tensor], name: str, key: str, layer: int) -> Tensors:
        dialect = DIALECTS[self.dialect]
        out = self.latent_attention(hf, name, key, *dialect.norms) | self.feed_forward(hf, name, key, layer)
        if not self.has_indexer(layer):
            return out
        indexer = {kind: hf[f"{name}self_attn.indexer.{kind}"] for kind in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias")}
        if not dialect.rope_first:
            indexer = {kind: rope_last(tensor) for kind, tensor in indexer.items()}
        indexer["weights_proj.weight"] = hf[f"{name}self_attn.indexer.weights_proj.weight"]
        return out | {f"{key}self_attention.{dialect.indexer[kind.split('.')[0]]}.{kind.split('.')[1]}": tensor for kind, tensor in indexer.items()}


def rope_last(rows: Tensor) -> Tensor:
    """Each head's rows as [nope | rope]; Hugging Face has them as [rope | nope]."""
    heads = rows.unflatten(0, (-1, INDEX_DIM))
    return torch.cat([heads[:, ROPE:], heads[:, :ROPE]], dim=1).flatten(0, 1)
