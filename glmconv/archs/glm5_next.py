"""GLM-5.3-Flash: linear attention (KDA) in three of four layers, latent attention without positions and with a pooled indexer in the fourth, residual
streams mixed by hyper-connections, a vision tower.

Sources: transformers' `glm5_next` and its list of renamed weights for names and shapes on disk, the release's config.json for the preset and for
what its FP8 weights leave in bf16, llama.cpp's `glm5-next` for GGUF. No trainer has a Megatron mapping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from glmconv.archs import schedules
from glmconv.archs.glm4_moe import BLOCK, DENSE, MODEL, MOE, MOE_NORM, MOE_RULES, MTP, NORM, hidden, moe_ffn, post_norm, shared
from glmconv.archs.glm4_moe_lite import LATENT_CONFIG, latent_attention, q_rank
from glmconv.archs.glm4v_moe import (
    ASKED,
    BIAS,
    LAYER,
    MERGER,
    PARAMETER,
    STEM,
    VISION_BLOCK,
    VISION_CONFIG,
    VISION_RULES,
    blocks,
    has_vision_bias,
    nested,
    tower,
    v_ffn,
    v_heads,
    v_hidden,
)  # fmt: skip
from glmconv.archs.spec import ArchSpec, Fields, Layers, Preset, Role, Row, Rule, Scope, Sizes, number, sizes

index_heads, index_dim, pool, streams, linear_heads, linear_dim, kernel = sizes("index_heads index_dim pool streams linear_heads linear_dim kernel")
inner = linear_heads * linear_dim
mixes = (streams + number(2)) * streams
PLAIN = Role.PLAIN

# fmt: off
HYPER_CONNECTIONS = tuple(
    Row(f"hc_{block}_{name}", shape, PARAMETER, None, f"hc_{block}_{name}.weight", dtype=dtype, loose=True)
    for block in ("attn", "ffn")
    for name, shape, dtype in (("fn", (mixes, streams * hidden), ""), ("base", (mixes,), "float32"), ("scale", (number(3),), "float32"))
)
INPUT_NORM, *REST = latent_attention()
ATTENTION = tuple(replace(row, role=PLAIN) if "kv_b_proj" in row.name else row for row in REST)  # the release leaves kv_b in bf16
# Names that the release's own list has for parts of linear attention, fused
FUSED = ("self_attn.qkv_proj", "self_attn.fused_qkvbfg_a_proj")
# The release leaves every module of a linear layer in bf16: serving engines fuse most of them into one
LINEAR_ATTENTION = (
    Row("self_attn.q_proj.weight",   (inner, hidden),       PLAIN,      None, "attn_q.weight", asked=FUSED),
    Row("self_attn.k_proj.weight",   (inner, hidden),       PLAIN,      None, "attn_k.weight"),
    Row("self_attn.v_proj.weight",   (inner, hidden),       PLAIN,      None, "attn_v.weight"),
    Row("self_attn.q_conv1d.weight", (inner, number(1), kernel),  PARAMETER, None, "ssm_conv1d_q.weight", loose=True),
    Row("self_attn.k_conv1d.weight", (inner, number(1), kernel),  PARAMETER, None, "ssm_conv1d_k.weight", loose=True),
    Row("self_attn.v_conv1d.weight", (inner, number(1), kernel),  PARAMETER, None, "ssm_conv1d_v.weight", loose=True),
    Row("self_attn.f_a_proj.weight", (linear_dim, hidden),  PLAIN,      None, "ssm_f_a.weight", asked=("self_attn.forget_gate.f_a_proj",)),
    Row("self_attn.f_b_proj.weight", (inner, linear_dim),   PLAIN,      None, "ssm_f_b.weight", asked=("self_attn.forget_gate.f_b_proj",)),
    Row("self_attn.dt_bias",         (inner,),              PARAMETER, None, "ssm_dt.bias", dtype="float32", loose=True),
    Row("self_attn.A_log",           (linear_heads,),       PARAMETER, None, "ssm_a",       dtype="float32", loose=True),
    Row("self_attn.b_proj.weight",   (linear_heads, hidden), PLAIN,     None, "ssm_beta.weight"),
    Row("self_attn.g_a_proj.weight", (linear_dim, hidden),  PLAIN,      None, "ssm_g_a.weight"),
    Row("self_attn.g_b_proj.weight", (inner, linear_dim),   PLAIN,      None, "ssm_g_b.weight"),
    Row("self_attn.o_norm.weight",   (linear_dim,),         NORM,      None, "ssm_norm.weight"),
    Row("self_attn.o_proj.weight",   (hidden, inner),       PLAIN,      None, "attn_output.weight"),
)
INDEXER = (
    Row("self_attn.indexer.wq_b.weight",         (index_heads * index_dim, q_rank), PLAIN, None, "indexer.attn_q_b.weight"),
    Row("self_attn.indexer.wk.weight",           (index_dim, hidden),   PLAIN,      None, "indexer.attn_k.weight"),
    Row("self_attn.indexer.k_norm.weight",       (index_dim,),          NORM,      None, "indexer.k_norm.weight"),
    Row("self_attn.indexer.k_norm.bias",         (index_dim,),          NORM,      None, "indexer.k_norm.bias"),
    Row("self_attn.indexer.weights_proj.weight", (index_heads, hidden), PLAIN,      None, "indexer.proj.weight", loose=True),
    Row("self_attn.indexer.index_kpool_compress_ape",  (pool, index_dim),   PARAMETER, None, "indexer_compressor_ape.weight", loose=True),
    Row("self_attn.indexer.index_kpool_compress_gate", (index_dim, hidden), PARAMETER, None, "indexer_compressor_gate.weight", loose=True),
)
MORE_IN_BLOCKS = (
    tower("attn.q_norm.weight",  (v_hidden // v_heads,), NORM, "attn_q_norm.weight"),
    tower("attn.k_norm.weight",  (v_hidden // v_heads,), NORM, "attn_k_norm.weight"),
    tower("attn.proj.bias",      (v_hidden,), BIAS, "attn_out.bias", has_vision_bias),
    tower("mlp.gate_proj.bias",  (v_ffn,),    BIAS, "ffn_gate.bias", has_vision_bias),
    tower("mlp.up_proj.bias",    (v_ffn,),    BIAS, "ffn_up.bias",   has_vision_bias),
    tower("mlp.down_proj.bias",  (v_hidden,), BIAS, "ffn_down.bias", has_vision_bias),
)
# fmt: on


def every_fourth(s: Sizes, fields: Fields) -> Sequence[int]:
    """transformers' default: three linear layers, then one with attention."""
    return [layer for layer in range(s["layers"]) if layer % 4 != 3]


KINDS = {"linear_attention": True, "indexed_attention": False, "deepseek_sparse_attention": False, "full_attention": False}
linear = schedules.listed("text_config.layer_types", KINDS, every_fourth)
attention = schedules.others(linear)
dense = schedules.listed("text_config.mlp_layer_types", {"dense": True, "sparse": False}, schedules.leading)
LAYERS: dict[str, Layers] = dict(
    decoder=schedules.decoder,
    linear=linear,
    attention=attention,
    indexed=schedules.both(attention, schedules.indexed("text_config.")),
    dense=dense,
    sparse=schedules.others(dense),
    mtp=schedules.mtp,
    indexed_mtp=schedules.mtp,
    blocks=blocks,
)
NORM_AND_MOE = post_norm(MOE_NORM, "ffn_norm.weight") + MOE

TEXT: dict[str, object] = dict(
    attention_bias=False, attention_dropout=0.0, dtype="bfloat16", eos_token_id=[154820, 154827, 154829], first_k_dense_replace=3, hc_eps=1e-06,
    hc_mult=4, hc_sinkhorn_iters=20, head_dim=0, hidden_act="silu", hidden_size=4096, index_head_dim=128, index_kpool=4,
    index_kpool_always_select_tail=True, index_kpool_compress=True, index_n_heads=32, index_share_for_mtp_iteration=True, index_topk=2048,
    indexer_rope_interleave=True, indexer_types=["full"] * 45, initializer_range=0.02, intermediate_size=12288, kv_lora_rank=512,
    layer_types=["deepseek_sparse_attention" if layer % 4 == 3 else "linear_attention" for layer in range(45)],
    linear_attn_config={
        "full_attn_layers": [layer for layer in range(45) if layer % 4 == 3], "gate_lower_bound": -5.0, "head_dim": 128,
        "kda_layers": [layer for layer in range(45) if layer % 4 != 3], "num_heads": 64, "short_conv_kernel_size": 4,
    },
    max_position_embeddings=1048576, mhc=True, mla_use_nope=True, mlp_layer_types=["dense"] * 3 + ["sparse"] * 42, model_type="glm5_next_text",
    moe_intermediate_size=2048, moe_router_dtype="float32", n_group=1, n_routed_experts=288, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=64, num_experts_per_tok=8, num_hidden_layers=45, num_key_value_heads=64, num_nextn_predict_layers=1,
    pad_token_id=154820, q_lora_rank=1536, qk_head_dim=256, qk_nope_head_dim=256, qk_rope_head_dim=0, rms_norm_eps=1e-05,
    routed_scaling_factor=2.5, scoring_func="sigmoid", swiglu_limit=10.0, tie_word_embeddings=False, topk_group=1, topk_method="noaux_tc",
    use_cache=True, v_head_dim=256, vocab_size=154880,
)  # fmt: skip
TOWER: dict[str, object] = dict(
    attention_bias=True, attention_dropout=0.0, depth=24, hidden_act="silu", hidden_size=1024, image_size=448, in_channels=3,
    initializer_range=0.02, intermediate_size=4096, model_type="glm5_next_vision", num_heads=16, out_hidden_size=4096, patch_size=14,
    projection_intermediate_size=10240, rms_norm_eps=1e-05, spatial_merge_size=2, swiglu_limit=10.0, temporal_patch_size=2,
)  # fmt: skip
GLM_5_3_FLASH: dict[str, object] = dict(
    architectures=["Glm5NextForConditionalGeneration"], image_end_token_id=154831, image_start_token_id=154830, image_token_id=154854,
    model_type="glm5_next", text_config=TEXT, tie_word_embeddings=False, transformers_version="5.16.0", video_end_token_id=154833,
    video_start_token_id=154832, video_token_id=154855, vision_config=TOWER,
)  # fmt: skip

SPEC = ArchSpec(
    model_type="glm5_next",
    title="GLM-5.3-Flash",
    config={size: f"text_config.{path}" for size, path in LATENT_CONFIG.items()}
    | VISION_CONFIG
    | dict(
        rope="text_config.qk_rope_head_dim=0",
        first_dense="text_config.first_k_dense_replace=3",
        index_heads="text_config.index_n_heads",
        index_dim="text_config.index_head_dim",
        index_every="text_config.index_topk_freq=1",
        index_offset="text_config.index_skip_topk_offset=2",
        pool="text_config.index_kpool",
        streams="text_config.hc_mult",
        linear_heads="text_config.linear_attn_config.num_heads|text_config.linear_num_heads",
        linear_dim="text_config.linear_attn_config.head_dim|text_config.linear_head_dim",
        kernel="text_config.linear_attn_config.short_conv_kernel_size|text_config.linear_conv_kernel_dim",
        v_ffn="vision_config.intermediate_size",
        v_context="vision_config.projection_intermediate_size",
    ),
    derived=dict(shared_ffn=moe_ffn * shared),
    rules=(
        *MOE_RULES,
        *VISION_RULES,
        Rule("attention_bias is false, as in every release", lambda s: not s["attention_bias"]),
        Rule("qk_rope_head_dim is 0: attention without positions", lambda s: not s["rope"]),
    ),
    layers=LAYERS,
    optional=("mtp", "indexed_mtp"),
    text="text_config",
    asked=ASKED,
    mtp_field="text_config.num_nextn_predict_layers",
    dialects={},
    undialected="no trainer has linear attention with hyper-connections as GLM-5.3-Flash has them",
    scopes=(
        Scope(nested(MODEL[:2]), title="language model"),
        Scope(MODEL[2:], title="head"),
        Scope(STEM[:2], "model.visual.", title="vision tower"),
        Scope(VISION_BLOCK + MORE_IN_BLOCKS, "model.visual.blocks.{block}.", gguf="v.blk.{block}.", layers="blocks", title="vision blocks"),
        Scope(MERGER, "model.visual.", title="vision merger"),
        Scope((INPUT_NORM, *HYPER_CONNECTIONS), LAYER, gguf=BLOCK, layers="decoder", title="all layers"),
        Scope(LINEAR_ATTENTION, LAYER, gguf=BLOCK, layers="linear", title="layers with linear attention"),
        Scope(ATTENTION, LAYER, gguf=BLOCK, layers="attention", title="layers with attention"),
        Scope(INDEXER, LAYER, gguf=BLOCK, layers="indexed", title="layers with an indexer"),
        Scope(post_norm(MOE_NORM, "ffn_norm.weight") + DENSE, LAYER, gguf=BLOCK, layers="dense", title="dense MLPs"),
        Scope(NORM_AND_MOE, LAYER, gguf=BLOCK, layers="sparse", title="MoE MLPs"),
        Scope((INPUT_NORM, *ATTENTION, *NORM_AND_MOE), LAYER, gguf=BLOCK, layers="mtp", title="MTP layers", mtp=True),
        Scope(INDEXER, LAYER, gguf=BLOCK, layers="indexed_mtp", title="MTP layers' indexer", mtp=True),
        Scope(MTP, LAYER, gguf=BLOCK, layers="mtp", title="MTP heads", mtp=True),
    ),
    presets=(Preset("glm5.3-flash-321B", "zai-org/GLM-5.3-Flash", GLM_5_3_FLASH, tensors=38770, mtp_tensors=889, called="glm5.3-flash"),),
    remarks=(
        "Hyper-connections' bases and scales, the decays of linear attention and the routers' biases are float32.",
        "Linear attention, indexer, `kv_b_proj` and the vision tower are never quantized, as in the release's own FP8 weights.",
    ),
)
