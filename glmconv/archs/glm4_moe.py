"""GLM-4.5, 4.5-Air, 4.6 and 4.7.

Sources: transformers' `glm4_moe` for names and shapes, the releases' config.json for the presets, Megatron-Core with Transformer Engine
for the Megatron names (docs/torch_dist.md), llama.cpp's `glm4moe` for GGUF.
"""

from __future__ import annotations

from glmconv.archs import schedules
from glmconv.archs.spec import ArchSpec, Layers, Place, Preset, Role, Row, Rule, Scope, Size, Sizes, record, sizes

hidden, heads, groups, head_dim, vocab = sizes("hidden heads groups head_dim vocab")
ffn, experts, moe_ffn, shared, shared_ffn = sizes("ffn experts moe_ffn shared shared_ffn")
LINEAR, EXPERT, NORM, BIAS, ROUTER = Role.LINEAR, Role.EXPERT, Role.NORM, Role.BIAS, Role.ROUTER

group: dict[str, Size] = dict(q=heads // groups * head_dim, k=head_dim, v=head_dim)
qkv = record("self_attention.linear_qkv.weight", "", **group)
qkv_bias = record("self_attention.linear_qkv.bias", "", **group)
fc1 = record("mlp.linear_fc1.weight", gate=ffn, up=ffn)
shared_fc1 = record("mlp.shared_experts.linear_fc1.weight", gate=shared_ffn, up=shared_ffn)
shared_fc2 = "mlp.shared_experts.linear_fc2.weight"
experts_fc1 = record("mlp.experts.experts.linear_fc1.weight", per="expert", gate=moe_ffn, up=moe_ffn)
experts_fc2 = record("mlp.experts.experts.linear_fc2.weight", per="expert", down=hidden)
stacked = {p: record(f"ffn_{p}_exps.weight", per="expert", **{p: hidden if p == "down" else moe_ffn}) for p in ("gate", "up", "down")}


def has_bias(s: Sizes) -> bool:
    return bool(s["attention_bias"])


def has_qk_norm(s: Sizes) -> bool:
    return bool(s["use_qk_norm"])


# fmt: off
MODEL = (
    Row("model.embed_tokens.weight", (vocab, hidden), Role.EMBEDDING, "embedding.word_embeddings.weight", "token_embd.weight"),
    Row("model.norm.weight",         (hidden,),       NORM,           "decoder.final_layernorm.weight",   "output_norm.weight"),
    Row("lm_head.weight",            (vocab, hidden), Role.HEAD,      "output_layer.weight",              "output.weight"),
)
ATTENTION = (
    Row("input_layernorm.weight",  (hidden,),                   NORM,   "self_attention.linear_qkv.layer_norm_weight", "attn_norm.weight"),
    Row("self_attn.q_proj.weight", (heads * head_dim, hidden),  LINEAR, qkv.q, "attn_q.weight", fused="qkv_proj"),
    Row("self_attn.k_proj.weight", (groups * head_dim, hidden), LINEAR, qkv.k, "attn_k.weight", fused="qkv_proj", parallel="kv"),
    Row("self_attn.v_proj.weight", (groups * head_dim, hidden), LINEAR, qkv.v, "attn_v.weight", fused="qkv_proj", parallel="kv"),
    Row("self_attn.q_proj.bias",   (heads * head_dim,),         BIAS,   qkv_bias.q, "attn_q.bias", when=has_bias),
    Row("self_attn.k_proj.bias",   (groups * head_dim,),        BIAS,   qkv_bias.k, "attn_k.bias", when=has_bias),
    Row("self_attn.v_proj.bias",   (groups * head_dim,),        BIAS,   qkv_bias.v, "attn_v.bias", when=has_bias),
    Row("self_attn.q_norm.weight", (head_dim,), NORM, "self_attention.q_layernorm.weight", "attn_q_norm.weight", when=has_qk_norm),
    Row("self_attn.k_norm.weight", (head_dim,), NORM, "self_attention.k_layernorm.weight", "attn_k_norm.weight", when=has_qk_norm),
    Row("self_attn.o_proj.weight", (hidden, heads * head_dim),  LINEAR, "self_attention.linear_proj.weight", "attn_output.weight", parallel="row"),
)


def post_norm(megatron: Place, gguf: str) -> tuple[Row, ...]:
    """The norm before the MLP: fused into a dense layer's fc1, a module of its own before experts."""
    return (Row("post_attention_layernorm.weight", (hidden,), NORM, megatron, gguf),)


FUSED_NORM, MOE_NORM = "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
DENSE = (
    Row("mlp.gate_proj.weight", (ffn, hidden), LINEAR, fc1.gate,                "ffn_gate.weight", fused="mlp.gate_up_proj"),
    Row("mlp.up_proj.weight",   (ffn, hidden), LINEAR, fc1.up,                  "ffn_up.weight",   fused="mlp.gate_up_proj"),
    Row("mlp.down_proj.weight", (hidden, ffn), LINEAR, "mlp.linear_fc2.weight", "ffn_down.weight", parallel="row"),
)
MOE = (
    Row("mlp.gate.weight",                       (experts, hidden), ROUTER, "mlp.router.weight",      "ffn_gate_inp.weight"),
    Row("mlp.gate.e_score_correction_bias",      (experts,),        ROUTER, "mlp.router.expert_bias", "exp_probs_b.bias", dtype="float32"),
    Row("mlp.experts.{expert}.gate_proj.weight", (moe_ffn, hidden), EXPERT, experts_fc1.gate,         stacked["gate"].gate),
    Row("mlp.experts.{expert}.up_proj.weight",   (moe_ffn, hidden), EXPERT, experts_fc1.up,           stacked["up"].up),
    Row("mlp.experts.{expert}.down_proj.weight", (hidden, moe_ffn), EXPERT, experts_fc2.down,         stacked["down"].down, parallel="row"),
    Row("mlp.shared_experts.gate_proj.weight", (shared_ffn, hidden), LINEAR, shared_fc1.gate, "ffn_gate_shexp.weight", fused="mlp.shared_experts"),
    Row("mlp.shared_experts.up_proj.weight",   (shared_ffn, hidden), LINEAR, shared_fc1.up,   "ffn_up_shexp.weight",   fused="mlp.shared_experts"),
    Row("mlp.shared_experts.down_proj.weight", (hidden, shared_ffn), LINEAR, shared_fc2,      "ffn_down_shexp.weight", parallel="row"),
)
MTP = (
    Row("eh_proj.weight",          (hidden, 2 * hidden), Role.HEAD, "eh_proj.weight",         "nextn.eh_proj.weight"),
    Row("enorm.weight",            (hidden,),            NORM,      "enorm.weight",           "nextn.enorm.weight"),
    Row("hnorm.weight",            (hidden,),            NORM,      "hnorm.weight",           "nextn.hnorm.weight"),
    Row("shared_head.norm.weight", (hidden,),            NORM,      "final_layernorm.weight", "nextn.shared_head_norm.weight"),
)
MTP_ALIASES = (  # GLM-4.5 and Air ship them, 4.6 and later do not; Megatron ties them
    Row("embed_tokens.weight",     (vocab, hidden), Role.EMBEDDING, None, "nextn.embed_tokens.weight",     alias="model.embed_tokens.weight"),
    Row("shared_head.head.weight", (vocab, hidden), Role.HEAD,      None, "nextn.shared_head_head.weight", alias="lm_head.weight"),
)
# fmt: on


LAYER, DECODER, BLOCK = "model.layers.{layer}.", "decoder.layers.{layer}.", "blk.{layer}."
MTP_LAYER, MTP_DECODER = "mtp.layers.{mtp}.", "mtp.layers.{mtp}.transformer_layer."
DENSE_LAYER = ATTENTION + post_norm(FUSED_NORM, "post_attention_norm.weight") + DENSE
SPARSE_LAYER = ATTENTION + post_norm(MOE_NORM, "post_attention_norm.weight") + MOE
LAYERS: dict[str, Layers] = dict(dense=schedules.leading, sparse=schedules.others(schedules.leading), mtp=schedules.mtp)

GLM_4_5: dict[str, object] = dict(
    architectures=["Glm4MoeForCausalLM"], attention_bias=True, attention_dropout=0.0, eos_token_id=[151329, 151336, 151338], first_k_dense_replace=3,
    head_dim=128, hidden_act="silu", hidden_size=5120, initializer_range=0.02, intermediate_size=12288, max_position_embeddings=131072,
    model_type="glm4_moe", moe_intermediate_size=1536, n_group=1, n_routed_experts=160, n_shared_experts=1, norm_topk_prob=True,
    num_attention_heads=96, num_experts_per_tok=8, num_hidden_layers=92, num_key_value_heads=8, num_nextn_predict_layers=1, pad_token_id=151329,
    partial_rotary_factor=0.5, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=1000000, routed_scaling_factor=2.5, tie_word_embeddings=False,
    topk_group=1, torch_dtype="bfloat16", transformers_version="4.54.0", use_cache=True, use_qk_norm=True, vocab_size=151552,
)  # fmt: skip
AIR = GLM_4_5 | dict(
    first_k_dense_replace=1, hidden_size=4096, intermediate_size=10944, moe_intermediate_size=1408, n_routed_experts=128, num_hidden_layers=46,
    routed_scaling_factor=1.0, use_qk_norm=False,
)  # fmt: skip
GLM_4_6 = GLM_4_5 | dict(max_position_embeddings=202752)
GLM_4_7 = GLM_4_6 | dict(transformers_version="5.0.0rc0")

CONFIG = dict(
    hidden="hidden_size",
    layers="num_hidden_layers",
    heads="num_attention_heads",
    groups="num_key_value_heads",
    head_dim="head_dim=hidden//heads",
    vocab="vocab_size",
    ffn="intermediate_size",
    experts="n_routed_experts",
    top_k="num_experts_per_tok",
    moe_ffn="moe_intermediate_size",
    shared="n_shared_experts",
    first_dense="first_k_dense_replace",
    mtp="num_nextn_predict_layers=0",
    attention_bias="attention_bias=0",
    use_qk_norm="use_qk_norm=0",
)
MOE_RULES = (
    Rule("num_experts_per_tok is at most n_routed_experts", lambda s: s["top_k"] <= s["experts"]),
    Rule("first_k_dense_replace is at most num_hidden_layers", lambda s: s["first_dense"] <= s["layers"]),
)
RULES = (
    Rule("num_attention_heads is a multiple of num_key_value_heads", lambda s: s["heads"] % s["groups"] == 0),
    Rule("attention_bias and use_qk_norm are true or false", lambda s: s["attention_bias"] <= 1 and s["use_qk_norm"] <= 1),
    *MOE_RULES,
)

SPEC = ArchSpec(
    model_type="glm4_moe",
    title="GLM-4.5, 4.5-Air, 4.6, 4.7",
    config=CONFIG,
    derived=dict(shared_ffn=moe_ffn * shared),
    rules=RULES,
    layers=LAYERS,
    optional=("mtp",),
    bridge_provider="megatron.bridge.models.gpt_provider.GPTModelProvider",
    scopes=(
        Scope(MODEL, title="model"),
        Scope(DENSE_LAYER, LAYER, DECODER, BLOCK, "dense", title="dense layers"),
        Scope(SPARSE_LAYER, LAYER, DECODER, BLOCK, "sparse", title="MoE layers"),
        Scope(SPARSE_LAYER, LAYER, MTP_DECODER, BLOCK, "mtp", title="MTP layers", mtp=True),
        Scope(MTP + MTP_ALIASES, LAYER, MTP_LAYER, BLOCK, "mtp", title="MTP heads", mtp=True),
    ),
    presets=(
        Preset("glm4.5-355B-A32B", "zai-org/GLM-4.5", GLM_4_5, aliases=True, tensors=44691, mtp_tensors=502),
        Preset("glm4.5-106B-A12B", "zai-org/GLM-4.5-Air", AIR, aliases=True, tensors=18329, mtp_tensors=404),
        Preset("glm4.6-355B-A32B", "zai-org/GLM-4.6", GLM_4_6, mtp_file="mtp.safetensors", tensors=44689, mtp_tensors=500),
        Preset("glm4.7-355B-A32B", "zai-org/GLM-4.7", GLM_4_7, mtp_file="mtp.safetensors", tensors=44689, mtp_tensors=500),
    ),
)
