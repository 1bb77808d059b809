"""GLM-5's attention in each dialect, from Megatron-Core 0.16.1's own DSAttention, DSAIndexer and MLASelfAttention.

mcore   all of it is Megatron-Core's own: names, order of rows, arithmetic.
slime   Megatron-Core's own arithmetic, which is that of slime's plugin (rows [nope | rope], a query that is not normed), under the plugin's names.
        The plugin itself is GPU kernels and does not run here.
bridge  Megatron-Core's own arithmetic, with the norms and the order of rows, [rope | nope], that it has from 0.19 on.

Made here for all three: layers that share a selection (no Megatron-Core 0.16 has them), and the Hadamard transform, whose package needs a GPU.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.models.gpt.experimental_attention_variant_module_specs import get_dsa_module_spec_for_backend
from megatron.core.transformer.experimental_attention_variant import dsa
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from tests.megatron.glm_moe_dsa import DIALECTS, MCORE_INDEXER, GlmMoeDsa


def hadamard(x: Tensor) -> Tensor:
    """Sylvester's orthogonal transform of the last axis, of any dtype. Queries and keys are both transformed: their products stay what they were."""
    for stride in (1 << bit for bit in range(x.shape[-1].bit_length() - 1)):
        a, b = x.unflatten(-1, (-1, 2, stride)).unbind(-2)
        x = torch.stack([a + b, a - b], dim=-2).flatten(-3)
    return x * x.shape[-1] ** -0.5


dsa.rotate_activation = hadamard
latest: list[Tensor] = []  # what the last indexer that ran selected


class Indexer(dsa.DSAIndexer):
    """Megatron-Core's own; remembers its selection for the layers that share it."""

    def forward_with_scores(self, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        scores, selected = super().forward_with_scores(*arguments, **options)
        latest[:] = [selected]
        return scores, selected


class RopeFirst(Indexer):
    """As from Megatron-Core 0.19 on: the rows that are rotated come first."""

    def _apply_rope(self, x: Tensor, rotary_pos_emb: Tensor, mscale: float) -> Tensor:
        rope, nope = x.split([self.qk_pos_emb_head_dim, self.index_head_dim - self.qk_pos_emb_head_dim], dim=-1)
        rotated = apply_rotary_pos_emb(rope, rotary_pos_emb, config=self.config, mscale=mscale, cp_group=self.pg_collection.cp)
        return torch.cat([rotated, nope], dim=-1)


class SharedSelection(MegatronModule):
    """In place of the indexer of a layer that has none."""

    def __init__(self, config: TransformerConfig, pg_collection: Any) -> None:
        super().__init__(config)

    def forward_with_scores(self, *_: Any, **__: Any) -> tuple[None, Tensor]:
        return None, latest[0]


def layer_spec(spec: ModuleSpec, shape: GlmMoeDsa, config: TransformerConfig, layer: int) -> ModuleSpec:
    """`spec`, a layer with latent attention, with the attention of this shape's dialect."""
    dialect, backend = DIALECTS[shape.dialect], TESpecProvider()
    attention = get_dsa_module_spec_for_backend(config, backend)
    indexer = attention.submodules.core_attention.submodules.indexer
    indexer.module = RopeFirst if dialect.rope_first else Indexer
    if not shape.has_indexer(layer):
        attention.submodules.core_attention.submodules.indexer = SharedSelection
    if shape.dialect == "bridge":
        attention.submodules.linear_q_up_proj = attention.submodules.linear_kv_up_proj = backend.column_parallel_linear()
        attention.submodules.q_layernorm = attention.submodules.kv_layernorm = backend.layer_norm(rms_norm=True, for_qk=True)
    made = copy.copy(spec)
    made.submodules = copy.copy(spec.submodules)
    made.submodules.self_attention = attention
    made.submodules.sharded_state_dict_keys_map = {
        f"self_attention.{MCORE_INDEXER[name]}.": f"self_attention.{to}." for name, to in dialect.indexer.items() if to != MCORE_INDEXER[name]
    }
    return made
