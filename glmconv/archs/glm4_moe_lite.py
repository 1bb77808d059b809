"""GLM-4.7-Flash: multi-head latent attention; its MLPs and MTP head are glm4_moe's.

Sources: transformers' `glm4_moe_lite` for names and shapes, the release's config.json for the preset, Megatron-Core's MLASelfAttention for the
Megatron names (docs/torch_dist.md), llama.cpp's `deepseek2` for GGUF.
"""

from __future__ import annotations

from glmconv.archs import schedules
from glmconv.archs.glm4_moe import (
    BLOCK,
    DECODER,
    DENSE,
    FUSED_NORM,
    LAYER,
    LINEAR,
    MODEL,
    MOE,
    MOE_NORM,
    MOE_RULES,
    MTP,
    MTP_ALIASES,
    MTP_DECODER,
    MTP_LAYER,
    NORM,
    heads,
    hidden,
    moe_ffn,
    post_norm,
    shared,
)  # fmt: skip
from glmconv.archs.spec import ArchSpec, Layers, Place, Preset, Row, Rule, Scope, Split, record, sizes

q_rank, kv_rank, nope, rope, v_dim = sizes("q_rank kv_rank nope rope v_dim")
kv_b = Split(record("", k=nope, v=v_dim), {"k": "attn_k_b.weight", "v": "attn_v_b.weight"}, transposed=frozenset("k"))
Q_NORM, KV_NORM = "self_attention.linear_q_up_proj.layer_norm_weight", "self_attention.linear_kv_up_proj.layer_norm_weight"


def latent_attention(q_norm: Place | dict[str, Place] = Q_NORM, kv_norm: Place | dict[str, Place] = KV_NORM) -> tuple[Row, ...]:
    """Queries, keys and values through low ranks; the norms' places in Megatron are a dialect's."""
    attention = "self_attention."
    # fmt: off
    return (
        Row("input_layernorm.weight",              (hidden,),                         NORM,   "input_layernorm.weight", "attn_norm.weight"),
        Row("self_attn.q_a_proj.weight",           (q_rank, hidden),                  LINEAR, attention + "linear_q_down_proj.weight",
            "attn_q_a.weight", parallel="none", fused="fused_qkv_a_proj"),
        Row("self_attn.q_a_layernorm.weight",      (q_rank,),                         NORM,   q_norm, "attn_q_a_norm.weight"),
        Row("self_attn.q_b_proj.weight",           (heads * (nope + rope), q_rank),   LINEAR, attention + "linear_q_up_proj.weight",
            "attn_q_b.weight"),
        Row("self_attn.kv_a_proj_with_mqa.weight", (kv_rank + rope, hidden),          LINEAR, attention + "linear_kv_down_proj.weight",
            "attn_kv_a_mqa.weight", parallel="none", fused="fused_qkv_a_proj"),
        Row("self_attn.kv_a_layernorm.weight",     (kv_rank,),                        NORM,   kv_norm, "attn_kv_a_norm.weight"),
        Row("self_attn.kv_b_proj.weight",          (heads * (nope + v_dim), kv_rank), LINEAR, attention + "linear_kv_up_proj.weight", kv_b),
        Row("self_attn.o_proj.weight",             (hidden, heads * v_dim),           LINEAR, attention + "linear_proj.weight",
            "attn_output.weight", parallel="row"),
    )
    # fmt: on


LATENT_CONFIG = dict(
    hidden="hidden_size",
    layers="num_hidden_layers",
    heads="num_attention_heads",
    vocab="vocab_size",
    q_rank="q_lora_rank",
    kv_rank="kv_lora_rank",
    nope="qk_nope_head_dim",
    rope="qk_rope_head_dim",
    v_dim="v_head_dim",
    ffn="intermediate_size",
    experts="n_routed_experts",
    top_k="num_experts_per_tok",
    moe_ffn="moe_intermediate_size",
    shared="n_shared_experts",
    mtp="num_nextn_predict_layers=0",
    attention_bias="attention_bias=0",
)
LATENT_RULES = (*MOE_RULES, Rule("attention_bias is false, as in every release", lambda s: not s["attention_bias"]))
# slime launches models with latent attention without position embeddings of Megatron's own, and compares
LATENT_ARGS = {"multi_latent_attention": True, "group_query_attention": False, "qk_layernorm": True, "add_position_embedding": False}
dense = schedules.listed("mlp_layer_types", {"dense": True, "sparse": False}, schedules.leading)
LAYERS: dict[str, Layers] = dict(dense=dense, sparse=schedules.others(dense), mtp=schedules.mtp)
LATENT_DENSE = latent_attention() + post_norm(FUSED_NORM, "ffn_norm.weight") + DENSE
LATENT_SPARSE = latent_attention() + post_norm(MOE_NORM, "ffn_norm.weight") + MOE

FLASH: dict[str, object] = dict(
    architectures=["Glm4MoeLiteForCausalLM"], attention_bias=False, attention_dropout=0.0, dtype="bfloat16",
    eos_token_id=[154820, 154827, 154829], first_k_dense_replace=1, hidden_act="silu", hidden_size=2048, intermediate_size=10240,
    kv_lora_rank=512, max_position_embeddings=202752,
    model_type="glm4_moe_lite", moe_intermediate_size=1536, n_group=1, n_routed_experts=64, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=20, num_experts_per_tok=4, num_hidden_layers=47, num_key_value_heads=20, num_nextn_predict_layers=1, pad_token_id=154820,
    partial_rotary_factor=1.0, q_lora_rank=768, qk_nope_head_dim=192, qk_rope_head_dim=64, rms_norm_eps=1e-05, rope_scaling=None,
    rope_theta=1000000, routed_scaling_factor=1.8, tie_word_embeddings=False, topk_group=1, topk_method="noaux_tc",
    transformers_version="5.0.0rc0", v_head_dim=256, vocab_size=154880,
)  # fmt: skip

SPEC = ArchSpec(
    model_type="glm4_moe_lite",
    title="GLM-4.7-Flash",
    config=LATENT_CONFIG | dict(first_dense="first_k_dense_replace=1"),
    derived=dict(shared_ffn=moe_ffn * shared),
    rules=LATENT_RULES,
    layers=LAYERS,
    optional=("mtp",),
    megatron_args=LATENT_ARGS,
    bridge_provider="megatron.bridge.models.mla_provider.MLAModelProvider",
    megatron_flags=("--make-vocab-size-divisible-by 64", "--no-rope-fusion"),
    scopes=(
        Scope(MODEL, title="model"),
        Scope(LATENT_DENSE, LAYER, DECODER, BLOCK, "dense", title="dense layers"),
        Scope(LATENT_SPARSE, LAYER, DECODER, BLOCK, "sparse", title="MoE layers"),
        Scope(LATENT_SPARSE, LAYER, MTP_DECODER, BLOCK, "mtp", title="MTP layers", mtp=True),
        Scope(MTP + MTP_ALIASES, LAYER, MTP_LAYER, BLOCK, "mtp", title="MTP heads", mtp=True),
    ),
    presets=(Preset("glm4.7-flash-30B-A3B", "zai-org/GLM-4.7-Flash", FLASH, aliases=True, tensors=9703, mtp_tensors=212, called="glm4.7-30B-A3B"),),
    remarks=("`kv_b_proj` is split by heads: at TP 4 in 128x128 blocks it stays bf16 (20 heads x 448 rows = 70 tiles).",),
)
