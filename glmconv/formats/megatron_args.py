"""config.json as the arguments of a Megatron run, and back. `args` is the argparse.Namespace in common.pt that loaders compare or copy.

Source: which loader asks for which name is in docs/torch_dist.md, "common.pt"; found by running Megatron-LM's, slime's and Bridge's loaders.
"""

from __future__ import annotations

from collections.abc import Mapping

from glmconv.archs import Model, text_of

Config = Mapping[str, object]
CONSTANTS: dict[str, object] = {
    "add_bias_linear": False, "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "bf16": True,
    "make_vocab_size_divisible_by": 128, "rotary_interleaved": False, "add_position_embedding": True,
    "rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "expert_model_parallel_size": 1, "no_save_optim": True, "no_save_rng": True,
    "consumed_train_samples": 0, "skipped_train_samples": 0, "consumed_valid_samples": 0, "multi_latent_attention": False, "q_lora_rank": None,
    "group_query_attention": True,
    # Megatron-Bridge rebuilds a model from these when run_config.yaml is absent, and an absent name is an AttributeError there
    "heterogeneous_layers_config_path": None, "no_persist_layer_norm": False, "overlap_p2p_comm": False, "decoder_first_pipeline_num_layers": None,
    "decoder_last_pipeline_num_layers": None, "fp8_param_gather": False, "bias_swiglu_fusion": True, "squared_relu": False,
    "init_method_xavier_uniform": False, "config_logger_dir": "", "cp_comm_type": ["p2p"], "is_hybrid_model": False,
    "transformer_impl": "transformer_engine", "qk_l2_norm": False, "fp16_lm_cross_entropy": False, "use_rope_scaling": False, "spec": None,
}  # fmt: skip
MIXTURE: dict[str, object] = {
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_pre_softmax": True, "moe_grouped_gemm": True,
    "moe_router_dtype": "fp32",
}  # fmt: skip
# args name -> the model's size
SIZES = {
    "num_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads", "ffn_hidden_size": "ffn", "vocab_size": "vocab",
    "padded_vocab_size": "vocab", "kv_channels": "head_dim", "num_query_groups": "groups", "q_lora_rank": "q_rank", "kv_lora_rank": "kv_rank",
    "qk_head_dim": "nope", "qk_pos_emb_head_dim": "rope", "v_head_dim": "v_dim", "num_experts": "experts", "moe_ffn_hidden_size": "moe_ffn",
    "moe_shared_expert_intermediate_size": "shared_ffn", "moe_router_topk": "top_k",
}  # fmt: skip


def rope(config: Config, field: str, default: object) -> object:
    """A rotary field: at top level, or in `rope_parameters` as transformers 5 writes it."""
    parameters = config.get("rope_parameters")
    inner = parameters.get(field) if isinstance(parameters, Mapping) else None
    return config.get(field, inner if inner is not None else default)


def to_args(config: Config, model: Model) -> dict[str, object]:
    """The arguments of a run that would train this model. Sizes that decide shapes come from the model, so they are whole numbers."""
    text, s = text_of(model.spec, config), model.sizes
    latent = "kv_rank" in s
    epsilon = text.get("rms_norm_eps", 1e-5)
    args = CONSTANTS | {name: s[size] for name, size in SIZES.items() if size in s} | {
        "num_experts": s.get("experts"),
        "mtp_num_layers": s.get("mtp") or None,
        "add_qkv_bias": bool(s["attention_bias"]),
        "qk_layernorm": bool(s.get("use_qk_norm")),
        "norm_epsilon": epsilon,
        "layernorm_epsilon": epsilon,
        "rotary_base": rope(text, "rope_theta", 10000),
        "rotary_percent": 1.0 if latent else rope(text, "partial_rotary_factor", 0.5),
        "untie_embeddings_and_output_weights": not text.get("tie_word_embeddings", False),
        "max_position_embeddings": text.get("max_position_embeddings"),
    }  # fmt: skip
    if "experts" in s:
        sparse = set(model.layers["sparse"])
        args |= MIXTURE | {"moe_layer_freq": [int(layer in sparse) for layer in range(s["layers"])]}
        args |= {"moe_router_topk_scaling_factor": text.get("routed_scaling_factor", 1.0)}
    if latent:
        args |= {"kv_channels": s["nope"], "num_query_groups": s["heads"]}
    if "index_dim" in s:
        args |= {"indexer_rope_interleave": text.get("indexer_rope_interleave")}
    return args | dict(model.spec.megatron_args)


# Back: config field -> (args name, Bridge provider's name where it differs). What is not here a run does not record.
TO_CONFIG: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("num_layers",),
    "hidden_size": ("hidden_size",),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_query_groups",),
    "head_dim": ("kv_channels",),
    "intermediate_size": ("ffn_hidden_size",),
    "moe_intermediate_size": ("moe_ffn_hidden_size",),
    "n_routed_experts": ("num_experts", "num_moe_experts"),
    "num_experts_per_tok": ("moe_router_topk",),
    "routed_scaling_factor": ("moe_router_topk_scaling_factor",),
    "num_nextn_predict_layers": ("mtp_num_layers",),
    "vocab_size": ("vocab_size",),
    "attention_bias": ("add_qkv_bias",),
    "use_qk_norm": ("qk_layernorm",),
    "rms_norm_eps": ("layernorm_epsilon", "norm_epsilon"),
    "rope_theta": ("rotary_base",),
    "partial_rotary_factor": ("rotary_percent",),
    "max_position_embeddings": ("max_position_embeddings", "seq_length"),
}
UNKNOWABLE = ("eos_token_id", "pad_token_id", "norm_topk_prob", "n_group", "topk_group")


def to_config(args: Mapping[str, object]) -> dict[str, object]:
    """config.json as far as a run's arguments tell it; the caller says what is missing. Only GLM-4.5's family is rebuilt."""
    config: dict[str, object] = {}
    for field, names in TO_CONFIG.items():
        value = next((args[name] for name in names if args.get(name) is not None), None)
        if isinstance(value, (int, float)):
            config[field] = value
    config["num_nextn_predict_layers"] = config.get("num_nextn_predict_layers", 0)
    schedule, layers = args.get("moe_layer_freq"), config.get("num_hidden_layers")
    if isinstance(schedule, (list, tuple)) and all(flag in (0, 1) for flag in schedule):
        config["first_k_dense_replace"] = list(schedule).index(1) if 1 in schedule else len(schedule)
    elif schedule == 1 and layers:
        config["first_k_dense_replace"] = 0
    width, shared = config.get("moe_intermediate_size"), args.get("moe_shared_expert_intermediate_size")
    if isinstance(width, int) and isinstance(shared, int) and width and shared % width == 0:
        config["n_shared_experts"] = shared // width
    untied = args.get("untie_embeddings_and_output_weights")
    shares = args.get("share_embeddings_and_output_weights")
    config["tie_word_embeddings"] = bool(shares) if shares is not None else untied is False
    fixed = dict(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", hidden_act="silu", n_group=1, topk_group=1, norm_topk_prob=True)
    return config | fixed | {"attention_dropout": 0.0, "use_cache": True}
