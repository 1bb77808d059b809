"""Errors of a key map that keep every name and shape. Only logits can tell them: the tests see that they do."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from tests.megatron import glm4, glm4_moe
from tests.megatron.glm4 import Glm4
from tests.megatron.glm4_moe_lite import ROPE, V_DIM, Glm4MoeLite
from tests.megatron.glm_moe_dsa import DIALECTS, INDEX_HEADS, GlmMoeDsa
from tests.megatron.release import HEADS, TOKENS, Shape, Tensors

Mistake = Callable[[Tensors], Tensors]


def rolled(key: str, *, heads: int, by: int) -> Mistake:
    """Of every tensor whose key contains `key`, each head's rows rolled."""

    def roll(tensor: Tensor) -> Tensor:
        axis = max(tensor.dim() - 2, 0)  # rows; in front of them there may be an axis of layers
        return tensor.unflatten(axis, (heads, -1)).roll(by, axis + 1).flatten(axis, axis + 1)

    return lambda tensors: tensors | {name: roll(tensor) for name, tensor in tensors.items() if key in name}


def exchanged(a: str, b: str) -> Mistake:
    """Every tensor named `a` for the one named `b`, and the reverse."""
    return lambda tensors: {name.replace(a, b) if a in name else name.replace(b, a): tensor for name, tensor in tensors.items()}


def in_turn(*steps: Mistake) -> Mistake:
    def all_of_them(tensors: Tensors) -> Tensors:
        for step in steps:
            tensors = step(tensors)
        return tensors

    return all_of_them


def another_order(shape: GlmMoeDsa) -> Mistake:
    """The indexer's rows as in a dialect that has the other half of a head first."""
    dialect = DIALECTS[shape.dialect]
    by = -ROPE if dialect.rope_first else ROPE
    heads = dict(wq_b=INDEX_HEADS, wk=1, k_norm=1)
    return in_turn(*(rolled(f"self_attention.{dialect.indexer[name]}.", heads=number, by=by) for name, number in heads.items()))


def mistakes(shape: Shape) -> dict[str, Mistake]:
    if isinstance(shape, Glm4MoeLite):
        return {
            "rotated rows first": rolled("linear_q_up_proj.weight", heads=HEADS, by=ROPE),
            "values before keys": rolled("linear_kv_up_proj.weight", heads=HEADS, by=V_DIM),
        }
    if isinstance(shape, GlmMoeDsa):
        return {"another dialect's order of rows": another_order(shape)} if shape.top_k < TOKENS else {}
    if isinstance(shape, Glm4):
        return {
            "post norms exchanged": exchanged("post_self_attn_layernorm", "post_mlp_layernorm"),
            "heads in another order": rolled("linear_qkv.weight", heads=1, by=glm4.HEAD_DIM),
        }
    return {"heads in another order": rolled("linear_qkv.weight", heads=1, by=glm4_moe.HEAD_DIM)}
