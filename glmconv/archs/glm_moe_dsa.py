"""GLM-5, 5.1, 5.2 and 5.3: latent attention with a sparse-attention indexer; its MLPs and MTP head are glm4_moe's.

Sources: transformers' `glm_moe_dsa` for names, shapes and schedules, the releases' config.json for the presets, Megatron-Core, slime's plugin and
Megatron-Bridge for the Megatron names (docs/torch_dist.md), llama.cpp's `glm-dsa` for GGUF.
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
    MTP,
    MTP_ALIASES,
    MTP_DECODER,
    MTP_LAYER,
    NORM,
    hidden,
    moe_ffn,
    post_norm,
    shared,
)  # fmt: skip
from glmconv.archs.glm4_moe_lite import KV_NORM, LATENT_ARGS, LATENT_CONFIG, LATENT_RULES, LAYERS, Q_NORM, latent_attention, q_rank, rope
from glmconv.archs.spec import ArchSpec, Place, Preset, Role, Row, Rule, Scope, Split, record, sizes

index_heads, index_dim = sizes("index_heads index_dim")
DIALECTS = dict(slime="slime", miles="slime", mcore="mcore", bridge="bridge")
q_norm: dict[str, Place] = dict(slime=Q_NORM, mcore=Q_NORM, bridge="self_attention.q_layernorm.weight")
kv_norm: dict[str, Place] = dict(slime=KV_NORM, mcore=KV_NORM, bridge="self_attention.kv_layernorm.weight")


def indexer(name: str) -> dict[str, Place]:
    """slime's plugin and Megatron-Core up to 0.18 keep an indexer head as [nope | rope]; Hugging Face, Megatron-Core from 0.19 on and Bridge as
    [rope | nope], the latter two under the same names.
    """
    later = f"self_attention.core_attention.indexer.{'' if 'norm' in name else 'linear_'}{name}"

    def swapped(key: str) -> Split:
        there = record(key, nope=index_dim - rope, rope=rope)
        return Split(record("", rope=rope, nope=index_dim - rope), {"rope": there.rope, "nope": there.nope})

    return dict(slime=swapped(f"self_attention.{name}"), mcore=swapped(later), bridge=later)


weights_proj: dict[str, Place] = dict.fromkeys(("mcore", "bridge"), "self_attention.core_attention.indexer.linear_weights_proj.weight")
weights_proj["slime"] = "self_attention.weights_proj.weight"

NONE = "none"
# fmt: off
INDEXER = (
    Row("self_attn.indexer.wq_b.weight", (index_heads * index_dim, q_rank), LINEAR, indexer("wq_b.weight"), "indexer.attn_q_b.weight", parallel=NONE),
    Row("self_attn.indexer.wk.weight",   (index_dim, hidden),               LINEAR, indexer("wk.weight"),   "indexer.attn_k.weight",   parallel=NONE),
    Row("self_attn.indexer.k_norm.weight", (index_dim,),                      NORM,   indexer("k_norm.weight"), "indexer.k_norm.weight"),
    Row("self_attn.indexer.k_norm.bias",   (index_dim,),                      NORM,   indexer("k_norm.bias"),   "indexer.k_norm.bias"),
    Row("self_attn.indexer.weights_proj.weight", (index_heads, hidden),  Role.PLAIN,   weights_proj,             "indexer.proj.weight", loose=True),
)
# fmt: on
ATTENTION = latent_attention(q_norm, kv_norm)
DENSE_LAYER = ATTENTION + post_norm(FUSED_NORM, "ffn_norm.weight") + DENSE
SPARSE_LAYER = ATTENTION + post_norm(MOE_NORM, "ffn_norm.weight") + MOE

GLM_5: dict[str, object] = dict(
    architectures=["GlmMoeDsaForCausalLM"], attention_bias=False, attention_dropout=0.0, dtype="bfloat16", ep_size=1,
    eos_token_id=[154820, 154827, 154829], first_k_dense_replace=3, head_dim=64, hidden_act="silu", hidden_size=6144,
    index_head_dim=128, index_n_heads=32, index_topk=2048,
    indexer_rope_interleave=True, initializer_range=0.02, intermediate_size=12288, kv_lora_rank=512, max_position_embeddings=202752,
    model_type="glm_moe_dsa", moe_intermediate_size=2048, moe_layer_freq=1, n_group=1, n_routed_experts=256, n_shared_experts=1,
    norm_topk_prob=True, num_attention_heads=64, num_experts_per_tok=8, num_hidden_layers=78, num_key_value_heads=64, num_nextn_predict_layers=1,
    pad_token_id=154820, pretraining_tp=1, q_lora_rank=2048, qk_head_dim=256, qk_nope_head_dim=192, qk_rope_head_dim=64, rms_norm_eps=1e-05,
    rope_interleave=True, rope_parameters={"rope_theta": 1000000, "rope_type": "default"}, routed_scaling_factor=2.5, scoring_func="sigmoid",
    tie_word_embeddings=False, topk_group=1, topk_method="noaux_tc", transformers_version="5.0.2.dev0", use_cache=True, v_head_dim=256,
    vocab_size=154880,
)  # fmt: skip
GLM_5_1 = GLM_5 | dict(transformers_version="5.4.0")
GLM_5_2 = GLM_5 | dict(
    head_dim=192, index_share_for_mtp_iteration=True, index_skip_topk_offset=3, index_topk_freq=4, index_topk_pattern=None,
    indexer_types=["shared" if max(layer - 2, 0) % 4 else "full" for layer in range(78)], max_position_embeddings=1048576,
    mlp_layer_types=["dense"] * 3 + ["sparse"] * 75, moe_router_dtype="float32",
    rope_parameters={"rope_theta": 8000000, "rope_type": "default"}, transformers_version="5.12.0",
)  # fmt: skip
GLM_5_3 = GLM_5_2 | dict(transformers_version="5.15.0")  # as its bf16 copy has it; the release itself is block FP8

SPEC = ArchSpec(
    model_type="glm_moe_dsa",
    title="GLM-5, 5.1, 5.2, 5.3",
    config=LATENT_CONFIG
    | dict(
        first_dense="first_k_dense_replace=3",
        index_heads="index_n_heads",
        index_dim="index_head_dim",
        index_every="index_topk_freq=1",
        index_offset="index_skip_topk_offset=2",
    ),
    derived=dict(shared_ffn=moe_ffn * shared),
    rules=(*LATENT_RULES, Rule("index_head_dim is more than qk_rope_head_dim", lambda s: s["index_dim"] > s["rope"])),
    layers=LAYERS | dict(indexed=schedules.indexed(), indexed_mtp=schedules.mtp),
    optional=("mtp", "indexed_mtp"),
    dialects=DIALECTS,
    megatron_args=LATENT_ARGS,
    megatron_flags=("--spec slime_plugins.models.glm5.glm5 get_glm5_spec", "--make-vocab-size-divisible-by 16", "--enable-experimental"),
    scopes=(
        Scope(MODEL, title="model"),
        Scope(DENSE_LAYER, LAYER, DECODER, BLOCK, "dense", title="dense layers"),
        Scope(SPARSE_LAYER, LAYER, DECODER, BLOCK, "sparse", title="MoE layers"),
        Scope(INDEXER, LAYER, DECODER, BLOCK, "indexed", title="layers with an indexer"),
        Scope(SPARSE_LAYER, LAYER, MTP_DECODER, BLOCK, "mtp", title="MTP layers", mtp=True),
        Scope(INDEXER, LAYER, MTP_DECODER, BLOCK, "indexed_mtp", title="MTP layers' indexer", mtp=True),
        Scope(MTP + MTP_ALIASES, LAYER, MTP_LAYER, BLOCK, "mtp", title="MTP heads", mtp=True),
    ),
    presets=(
        Preset("glm5-744B-A40B", "zai-org/GLM-5", GLM_5, tensors=59870, mtp_tensors=791),
        Preset("glm5.1-744B-A40B", "zai-org/GLM-5.1", GLM_5_1, tensors=59870, mtp_tensors=791),
        Preset("glm5.2-744B-A40B", "zai-org/GLM-5.2", GLM_5_2, tensors=59585, mtp_tensors=791),
        Preset("glm5.3-744B-A40B", "zai-org/GLM-5.3", GLM_5_3, tensors=59585, mtp_tensors=791),
    ),
    remarks=(
        "Megatron dialects differ in the order of an indexer head's rows; slime's is written unless another is asked for.",
        "GLM-5.2 and 5.3 have an indexer in layers 0, 1, 2, 6, 10, ... 74 and in the MTP layer; the others share the one before.",
    ),
)
