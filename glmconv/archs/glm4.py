"""GLM-4-9B-0414 and GLM-4-32B-0414: dense, with norms behind attention and MLP, gate and up in one weight.

Sources: transformers' `glm4` for names and shapes, the releases' config.json for the presets, slime's and miles' patch of Megatron-Core for the
Megatron names (docs/torch_dist.md), llama.cpp's `glm4` for GGUF.
"""

from __future__ import annotations

from glmconv.archs import schedules
from glmconv.archs.glm4_moe import ATTENTION, BLOCK, DECODER, FUSED_NORM, LAYER, LINEAR, MODEL, NORM, ffn, hidden
from glmconv.archs.spec import ArchSpec, Preset, Row, Rule, Scope

# fmt: off
MLP = (
    Row("post_attention_layernorm.weight", (hidden,),         NORM,   FUSED_NORM,                          "ffn_norm.weight"),
    Row("mlp.gate_up_proj.weight",         (2 * ffn, hidden), LINEAR, "mlp.linear_fc1.weight",             "ffn_up.weight", stacked=2),
    Row("mlp.down_proj.weight",            (hidden, ffn),     LINEAR, "mlp.linear_fc2.weight",             "ffn_down.weight", parallel="row"),
    Row("post_self_attn_layernorm.weight", (hidden,),         NORM,   "post_self_attn_layernorm.weight",   "post_attention_norm.weight"),
    Row("post_mlp_layernorm.weight",       (hidden,),         NORM,   "post_mlp_layernorm.weight",         "post_ffw_norm.weight"),
)
# fmt: on

GLM_4_9B: dict[str, object] = dict(
    architectures=["Glm4ForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=[151329, 151336, 151338], head_dim=128,
    hidden_act="silu", hidden_size=4096, initializer_range=0.02, intermediate_size=13696, max_position_embeddings=32768, model_type="glm4",
    num_attention_heads=32, num_hidden_layers=40, num_key_value_heads=2, pad_token_id=151329, partial_rotary_factor=0.5, rms_norm_eps=1e-05,
    rope_theta=10000.0, tie_word_embeddings=False, torch_dtype="bfloat16", transformers_version="4.52.0.dev0", use_cache=True, vocab_size=151552,
)  # fmt: skip
GLM_4_32B = GLM_4_9B | dict(
    attention_bias=False, hidden_size=6144, intermediate_size=23040, num_attention_heads=48, num_hidden_layers=61, num_key_value_heads=2
)

SPEC = ArchSpec(
    model_type="glm4",
    title="GLM-4-9B-0414, GLM-4-32B-0414",
    config=dict(
        hidden="hidden_size",
        layers="num_hidden_layers",
        heads="num_attention_heads",
        groups="num_key_value_heads",
        head_dim="head_dim=hidden//heads",
        vocab="vocab_size",
        ffn="intermediate_size",
        attention_bias="attention_bias=0",
        use_qk_norm="use_qk_norm=0",
    ),
    rules=(
        Rule("num_attention_heads is a multiple of num_key_value_heads", lambda s: s["heads"] % s["groups"] == 0),
        Rule("attention_bias is true or false, use_qk_norm false", lambda s: s["attention_bias"] <= 1 and not s["use_qk_norm"]),
    ),
    layers=dict(decoder=schedules.decoder),
    dialects=dict(slime="te", miles="te"),
    undialected="neither Megatron-Core nor Megatron-Bridge has a layer with norms behind attention and MLP",
    megatron_args={"rotary_interleaved": True},
    megatron_flags=("--spec slime_plugins.models.glm4 get_glm_spec", "--post-self-attn-layernorm", "--post-mlp-layernorm", "--no-rope-fusion"),
    stacked=True,
    scopes=(Scope(MODEL, title="model"), Scope(ATTENTION + MLP, LAYER, DECODER, BLOCK, "decoder", title="layers")),
    presets=(
        Preset("glm4-9B-0414", "zai-org/GLM-4-9B-0414", GLM_4_9B, tensors=523, called="glm4-9B"),
        Preset("glm4-32B-0414", "zai-org/GLM-4-32B-0414", GLM_4_32B, tensors=613, called="glm4-32B"),
    ),
    remarks=("Megatron keeps all layers of one kind of weight in one tensor; slime's and miles' patch of Megatron-Core is needed to load it.",),
)
