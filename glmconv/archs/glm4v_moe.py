"""GLM-4.5V and GLM-4.6V: GLM-4.5-Air's language model under `model.language_model`, and a vision tower.

Sources: transformers' `glm4v_moe` for names and shapes, the releases' config.json for the presets, Megatron-Bridge for the Megatron names
(docs/torch_dist.md), llama.cpp's `glm4moe` and mmproj for GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from glmconv.archs.glm4_moe import (
    BLOCK,
    CONFIG,
    DENSE_LAYER,
    LAYERS,
    MODEL,
    MTP,
    MTP_ALIASES,
    NORM,
    RULES,
    SPARSE_LAYER,
    moe_ffn,
    shared,
)  # fmt: skip
from glmconv.archs.spec import ArchSpec, Fields, Frames, Place, Preset, Role, Row, Rule, Scope, Size, Sizes, always, sizes

v_hidden, v_heads, v_ffn, v_out, v_context = sizes("v_hidden v_heads v_ffn v_out v_context")
image, patch, frames, channels, merge = sizes("image patch frames channels merge")
positions = (image // patch) * (image // patch)
patches = Frames(("v.patch_embd.weight", "v.patch_embd.weight.1"))
VISION, PARAMETER, BIAS, EMBEDDING = Role.VISION, Role.PARAMETER, Role.BIAS, Role.EMBEDDING


def has_vision_bias(s: Sizes) -> bool:
    return bool(s["v_bias"])


def tower(name: str, shape: tuple[Size, ...], role: Role, gguf: Place, when: Callable[[Sizes], bool] = always) -> Row:
    """A row of the vision tower, which Megatron-Bridge keeps as transformers has it, names and all."""
    return Row(name, shape, role, name, gguf, when)


# fmt: off
STEM = (
    tower("patch_embed.proj.weight",              (v_hidden, channels, frames, patch, patch), PARAMETER, patches),
    tower("patch_embed.proj.bias",                (v_hidden,),             BIAS,      "v.patch_embd.bias"),
    tower("embeddings.position_embedding.weight", (positions, v_hidden),   EMBEDDING, "v.position_embd.weight"),
    tower("post_conv_layernorm.weight",           (v_hidden,),             NORM,      "v.norm_embd.weight"),
)
VISION_BLOCK = (
    tower("norm1.weight",         (v_hidden,),               NORM,   "ln1.weight"),
    tower("norm2.weight",         (v_hidden,),               NORM,   "ln2.weight"),
    tower("attn.qkv.weight",      (3 * v_hidden, v_hidden),  VISION, "attn_qkv.weight"),
    tower("attn.qkv.bias",        (3 * v_hidden,),           BIAS,   "attn_qkv.bias", when=has_vision_bias),
    tower("attn.proj.weight",     (v_hidden, v_hidden),      VISION, "attn_out.weight"),
    tower("mlp.gate_proj.weight", (v_ffn, v_hidden),         VISION, "ffn_gate.weight"),
    tower("mlp.up_proj.weight",   (v_ffn, v_hidden),         VISION, "ffn_up.weight"),
    tower("mlp.down_proj.weight", (v_hidden, v_ffn),         VISION, "ffn_down.weight"),
)
MERGER = (
    tower("post_layernorm.weight",              (v_hidden,),                      NORM,      "v.post_ln.weight"),
    tower("downsample.weight",                  (v_out, v_hidden, merge, merge),  PARAMETER, "mm.patch_merger.weight"),
    tower("downsample.bias",                    (v_out,),                         BIAS,      "mm.patch_merger.bias"),
    tower("merger.proj.weight",                 (v_out, v_out),                   VISION,    "mm.model.fc.weight"),
    tower("merger.post_projection_norm.weight", (v_out,),                         NORM,      "mm.post_norm.weight"),
    tower("merger.post_projection_norm.bias",   (v_out,),                         NORM,      "mm.post_norm.bias"),
    tower("merger.gate_proj.weight",            (v_context, v_out),               VISION,    "mm.gate.weight"),
    tower("merger.up_proj.weight",              (v_context, v_out),               VISION,    "mm.up.weight"),
    tower("merger.down_proj.weight",            (v_out, v_context),               VISION,    "mm.down.weight"),
)
# fmt: on
LANGUAGE, MEGATRON = "model.language_model.", "language_model."
ASKED = {LANGUAGE: "model.", "model.visual.": "visual."}  # SGLang's names, which the lists of the releases' own FP8 weights have
LAYER, DECODER = LANGUAGE + "layers.{layer}.", MEGATRON + "decoder.layers.{layer}."
MTP_LAYER = MEGATRON + "mtp.layers.{mtp}."
MTP_DECODER = MTP_LAYER + "transformer_layer."


def nested(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Rows of a language model that lies one module deeper."""
    return tuple(replace(row, name=deeper(row.name), alias=deeper(row.alias)) for row in rows)


def deeper(name: str) -> str:
    return LANGUAGE + name.removeprefix("model.") if name.startswith("model.") else name


def blocks(s: Sizes, fields: Fields) -> Sequence[int]:
    return range(s["v_depth"])


TEXT_CONFIG = {size: f"text_config.{path}" for size, path in CONFIG.items()}
VISION_CONFIG = dict(
    v_hidden="vision_config.hidden_size",
    v_depth="vision_config.depth",
    v_heads="vision_config.num_heads",
    v_ffn="vision_config.out_hidden_size",
    v_context="vision_config.intermediate_size",
    v_out="vision_config.out_hidden_size",
    v_bias="vision_config.attention_bias=0",
    image="vision_config.image_size",
    patch="vision_config.patch_size",
    frames="vision_config.temporal_patch_size",
    channels="vision_config.in_channels=3",
    merge="vision_config.spatial_merge_size",
)
VISION_RULES = (
    Rule("vision_config.out_hidden_size is text_config.hidden_size", lambda s: s["v_out"] == s["hidden"]),
    Rule("vision_config.hidden_size is a multiple of num_heads", lambda s: s["v_hidden"] % s["v_heads"] == 0),
    Rule("vision_config.image_size is at least patch_size", lambda s: s["image"] >= s["patch"]),
)

TEXT: dict[str, object] = dict(
    attention_bias=True, attention_dropout=0.0, dtype="bfloat16", eos_token_id=[151329, 151336, 151338], first_k_dense_replace=1, head_dim=128,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=10944, max_position_embeddings=65536,
    model_type="glm4v_moe_text", moe_intermediate_size=1408, n_group=1, n_routed_experts=128, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=96, num_experts_per_tok=8, num_hidden_layers=46, num_key_value_heads=8, pad_token_id=151329, partial_rotary_factor=0.5,
    rms_norm_eps=1e-05, rope_scaling={"mrope_section": [8, 12, 12], "rope_type": "default"}, rope_theta=10000.0, routed_scaling_factor=1.0,
    topk_group=1, use_cache=True, use_qk_norm=False, vocab_size=151552,
)  # fmt: skip
VISION_TOWER: dict[str, object] = dict(
    attention_bias=False, attention_dropout=0.0, depth=24, hidden_act="silu", hidden_size=1536, image_size=336, in_channels=3,
    initializer_range=0.02, intermediate_size=10944, model_type="glm4v_moe_vision", num_heads=12, out_hidden_size=4096, patch_size=14,
    rms_norm_eps=1e-05, spatial_merge_size=2, temporal_patch_size=2,
)  # fmt: skip
GLM_4_5V: dict[str, object] = dict(
    architectures=["Glm4vMoeForConditionalGeneration"], image_end_token_id=151340, image_start_token_id=151339, image_token_id=151363,
    model_type="glm4v_moe", text_config=TEXT, tie_word_embeddings=False, transformers_version="4.57.1", video_end_token_id=151342,
    video_start_token_id=151341, video_token_id=151364, vision_config=VISION_TOWER,
)  # fmt: skip
GLM_4_6V = GLM_4_5V | dict(text_config=TEXT | dict(max_position_embeddings=131072, num_nextn_predict_layers=0, rope_theta=500000.0))

SPEC = ArchSpec(
    model_type="glm4v_moe",
    title="GLM-4.5V, GLM-4.6V",
    config=TEXT_CONFIG | VISION_CONFIG,
    derived=dict(shared_ffn=moe_ffn * shared),
    rules=(*RULES, *VISION_RULES),
    layers=LAYERS | dict(blocks=blocks),
    optional=("mtp",),
    text="text_config",
    asked=ASKED,
    mtp_field="text_config.num_nextn_predict_layers",
    dialects=dict(bridge="te"),
    undialected="slime, miles and Megatron-Core have no vision tower",
    scopes=(
        Scope(nested(MODEL[:2]), megatron=MEGATRON, title="language model"),
        Scope(MODEL[2:], megatron=MEGATRON, title="head"),
        Scope(STEM, "model.visual.", "visual.", title="vision tower"),
        Scope(VISION_BLOCK, "model.visual.blocks.{block}.", "visual.blocks.{block}.", "v.blk.{block}.", "blocks", title="vision blocks"),
        Scope(MERGER, "model.visual.", "visual.", title="vision merger"),
        Scope(DENSE_LAYER, LAYER, DECODER, BLOCK, "dense", title="dense layers"),
        Scope(SPARSE_LAYER, LAYER, DECODER, BLOCK, "sparse", title="MoE layers"),
        Scope(SPARSE_LAYER, LAYER, MTP_DECODER, BLOCK, "mtp", title="MTP layers", mtp=True),
        Scope(MTP + nested(MTP_ALIASES), LAYER, MTP_LAYER, BLOCK, "mtp", title="MTP heads", mtp=True),
    ),
    presets=(
        Preset("glm4.5v-108B-A12B", "zai-org/GLM-4.5V", GLM_4_5V, tensors=18106, called="glm4.5v-106B-A12B"),
        Preset("glm4.6v-108B-A12B", "zai-org/GLM-4.6V", GLM_4_6V, tensors=18106, called="glm4.6v-106B-A12B"),
    ),
    remarks=("The vision tower is never quantized. Of the trainers only Megatron-Bridge has it.",),
)
