"""config.json as the arguments of a Megatron run, and back. `args` is the argparse.Namespace in common.pt that loaders compare or copy.

Source: which loader asks for which name is in docs/torch_dist.md, "common.pt"; found by running Megatron-LM's, slime's and Bridge's loaders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glmconv.archs import Model

Config = Mapping[str, object]
CONSTANTS: dict[str, object] = {
    "add_bias_linear": False, "normalization": "RMSNorm", "swiglu": True, "position_embedding_type": "rope", "bf16": True,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_pre_softmax": True, "moe_grouped_gemm": True,
    "moe_router_dtype": "fp32", "make_vocab_size_divisible_by": 128, "rotary_interleaved": False, "add_position_embedding": True,
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


def number(config: Config, field: str) -> int:
    value = config.get(field)
    return value if isinstance(value, int) else 0


def _moe_layers(config: Config) -> list[int]:
    dense = number(config, "first_k_dense_replace")
    return [0] * dense + [1] * (number(config, "num_hidden_layers") - dense)


# fmt: off
FROM_CONFIG: dict[str, Callable[[Config], object]] = {
    "num_layers":                           lambda c: c["num_hidden_layers"],
    "hidden_size":                          lambda c: c["hidden_size"],
    "num_attention_heads":                  lambda c: c["num_attention_heads"],
    "num_query_groups":                     lambda c: c["num_key_value_heads"],
    "ffn_hidden_size":                      lambda c: c["intermediate_size"],
    "moe_ffn_hidden_size":                  lambda c: c["moe_intermediate_size"],
    "moe_shared_expert_intermediate_size":  lambda c: number(c, "moe_intermediate_size") * number(c, "n_shared_experts"),
    "num_experts":                          lambda c: c["n_routed_experts"],
    "moe_layer_freq":                       _moe_layers,
    "moe_router_topk":                      lambda c: c["num_experts_per_tok"],
    "moe_router_topk_scaling_factor":       lambda c: c.get("routed_scaling_factor", 1.0),
    "mtp_num_layers":                       lambda c: c.get("num_nextn_predict_layers") or None,
    "vocab_size":                           lambda c: c["vocab_size"],
    "padded_vocab_size":                    lambda c: c["vocab_size"],
    "add_qkv_bias":                         lambda c: bool(c.get("attention_bias", False)),
    "qk_layernorm":                         lambda c: bool(c.get("use_qk_norm", False)),
    "norm_epsilon":                         lambda c: c.get("rms_norm_eps", 1e-5),
    "layernorm_epsilon":                    lambda c: c.get("rms_norm_eps", 1e-5),
    "rotary_base":                          lambda c: rope(c, "rope_theta", 10000),
    "rotary_percent":                       lambda c: rope(c, "partial_rotary_factor", 1.0),
    "untie_embeddings_and_output_weights":  lambda c: not c.get("tie_word_embeddings", False),
    "max_position_embeddings":              lambda c: c.get("max_position_embeddings"),
}
# fmt: on


def rope(config: Config, field: str, default: object) -> object:
    """A rotary field: at top level, or in `rope_parameters` as transformers 5 writes it."""
    parameters = config.get("rope_parameters")
    inner = parameters.get(field) if isinstance(parameters, Mapping) else None
    return config.get(field, inner if inner is not None else default)


def to_args(config: Config, model: Model) -> dict[str, object]:
    """The arguments of a run that would train this model. Sizes that decide shapes come from the model, so they are whole numbers."""
    args = CONSTANTS | {name: of(config) for name, of in FROM_CONFIG.items()}
    return args | {"mtp_num_layers": model.sizes.get("mtp") or None, "kv_channels": model.sizes["head_dim"]}


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
