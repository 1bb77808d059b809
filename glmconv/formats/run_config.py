"""Megatron-Bridge's run_config.yaml. Read: its `model` mapping's plain values only; nothing that it names is looked up. Written: what Bridge needs.

Source: Megatron-Bridge's `load_megatron_model`, which builds the model from `model`, and its GLM bridges for the values. Bridge itself was not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from glmconv.archs import Model, preset_of
from glmconv.engine.inputs import InputFile
from glmconv.errors import SourceError
from glmconv.formats.megatron_args import to_args

RUN_CONFIG = "run_config.yaml"
LARGEST = 4 << 20
DEEPEST = 32
MOST_EVENTS = 200_000


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds plain values only."""


def _plain_scalar(loader: PlainLoader, tag: str, node: yaml.Node) -> object:
    """A tag of somebody's own: its content is not built."""
    return None


PlainLoader.add_multi_constructor("", _plain_scalar)


def read_run_config(file: InputFile, path: Path) -> Mapping[str, object]:
    """The `model` mapping. SourceError if it is too large, too deep, uses aliases (which can expand without bound) or is no mapping."""
    if file.size > LARGEST:
        raise SourceError(f"is {file.size:,} bytes; at most {LARGEST:,} are read.", file=path)
    try:
        text = file.read(0, file.size).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise _no_yaml(problem, path) from None
    value = plain_yaml(text, path)
    model = value.get("model") if isinstance(value, dict) else None
    if not isinstance(model, dict):
        raise SourceError("has no `model` mapping.", file=path, hint="Pass --origin.")
    return {str(name): item for name, item in model.items()}


class UniqueLoader(PlainLoader):
    """The same, and a key that a mapping has twice is an error: YAML's own answer is the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        seen: set[object] = set()
        for key in keys:
            if isinstance(key, list | dict) or key in seen:
                raise yaml.YAMLError(f"the key {key!r} is there twice, or is no name")
            seen.add(key)
        return super().construct_mapping(node, deep)


def plain_yaml(text: str, path: object, *, unique: bool = False) -> object:
    """One document's plain values. SourceError if it is too deep, uses aliases (which can expand without bound) or is no YAML.

    `unique` refuses keys that are there twice.
    """
    try:
        _bounded(text, path)
        return (UniqueLoader if unique else PlainLoader)(text).get_single_data()
    except (yaml.YAMLError, ValueError, OverflowError) as problem:
        raise _no_yaml(problem, path) from None


def _no_yaml(problem: Exception, path: object) -> SourceError:
    return SourceError(f"is not plain YAML: {str(problem).splitlines()[0] if str(problem) else type(problem).__name__}.", file=path)


def _bounded(text: str, path: object) -> None:
    """Walk the events, which costs no memory, before anything is built."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise SourceError("uses aliases, which are not read.", file=path)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > DEEPEST or count > MOST_EVENTS:
            raise SourceError("is nested too deeply or too large.", file=path)


# Of `args`, the names that a provider has too
SAME_NAME = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "normalization", "layernorm_epsilon",
    "add_bias_linear", "add_qkv_bias", "qk_layernorm", "position_embedding_type", "rotary_base", "rotary_percent", "vocab_size",
    "make_vocab_size_divisible_by", "mtp_num_layers", "bf16", "fp16",
)  # fmt: skip
EXPERTS = (
    "moe_layer_freq", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_router_topk", "moe_router_topk_scaling_factor",
    "moe_router_score_function", "moe_router_enable_expert_bias", "moe_router_dtype", "moe_grouped_gemm",
)  # fmt: skip
LATENT = ("multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "rotary_scaling_factor",
          "mscale", "mscale_all_dim")  # fmt: skip
CONSTANTS: dict[str, object] = {
    "gated_linear_unit": True, "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False}, "should_pad_vocab": True,
    "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0,
    # the default spec has no mixture of dense and sparse layers
    "transformer_layer_spec": {
        "_target_": "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec", "_partial_": True, "use_transformer_engine": True,
    },
}  # fmt: skip
MOE_CONSTANTS: dict[str, object] = {
    "moe_router_pre_softmax": False, "moe_router_load_balancing_type": "seq_aux_loss", "moe_token_dispatcher_type": "alltoall",
    "moe_permute_fusion": True, "moe_router_bias_update_rate": 0, "moe_aux_loss_coeff": 0.001, "mtp_loss_scaling_factor": 0.3,
}  # fmt: skip


def write_run_config(config: Mapping[str, object], model: Model, dtype: str) -> bytes:
    """run_config.yaml for a model whose `spec.bridge_provider` is known; weights of `dtype`."""
    args = to_args(config, model) | {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    names = [*SAME_NAME, *(EXPERTS if args.get("num_experts") else ()), *(LATENT if args.get("multi_latent_attention") else ())]
    provider: dict[str, object] = {"_target_": model.spec.bridge_provider} | {name: args.get(name) for name in names} | CONSTANTS
    provider |= {"share_embeddings_and_output_weights": not args["untie_embeddings_and_output_weights"]}
    provider |= {"seq_length": args["max_position_embeddings"], "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False}}
    if args.get("num_experts"):
        provider |= {"num_moe_experts": args["num_experts"]} | MOE_CONSTANTS
    preset = preset_of(config)
    if preset:
        provider["hf_model_id"] = preset.hub
    document = {"model": provider, "checkpoint": {"ckpt_format": "torch_dist", "save_optim": False, "save_rng": False}}
    return yaml.dump(document, Dumper=Unshared, sort_keys=True).encode("ascii")


class Unshared(yaml.SafeDumper):
    """Writes a value that occurs twice twice: an alias is nothing that a reader need know."""

    def ignore_aliases(self, data: object) -> bool:
        return True
