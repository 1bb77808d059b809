"""Megatron-Core's model of each architecture, built for one rank. Import it behind `stand_in.install()`."""

from __future__ import annotations

import dataclasses

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor

from tests.megatron import post_norms, sparse
from tests.megatron.glm4 import Glm4
from tests.megatron.glm_moe_dsa import GlmMoeDsa
from tests.megatron.release import FFN, HEADS, HIDDEN, VOCAB, Shape

Layout = dict[str, int]
current: list[Layout] = []  # the one that Megatron-Core's process groups are of


def config_of(shape: Shape, layout: Layout) -> TransformerConfig:
    own = shape.megatron_config()
    dtype = getattr(torch, shape.dtype)
    kind = MLATransformerConfig if own.get("multi_latent_attention") else TransformerConfig
    return kind(
        num_layers=shape.layers, hidden_size=HIDDEN, ffn_hidden_size=FFN, num_attention_heads=HEADS, normalization="RMSNorm", gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, hidden_dropout=0.0, attention_dropout=0.0, bias_dropout_fusion=False,
        bias_activation_fusion=False, apply_rope_fusion=False, gradient_accumulation_fusion=False, use_cpu_initialization=True,
        perform_initialization=False, params_dtype=dtype, pipeline_dtype=dtype, bf16=shape.dtype == "bfloat16", **own, **layout,
    )  # fmt: skip


def layer_specs(shape: Shape, config: TransformerConfig) -> list[ModuleSpec]:
    """Of all layers of the decoder, the MTP layer behind them; Megatron-Core takes an MTP layer's from the decoder's last layer."""
    whole = dataclasses.replace(config, pipeline_model_parallel_size=1)
    specs = get_gpt_decoder_block_spec(whole, use_transformer_engine=True, pp_rank=0).layer_specs
    specs += specs[-1:] * shape.mtp
    if isinstance(shape, GlmMoeDsa):
        return [sparse.layer_spec(spec, shape, config, layer) for layer, spec in enumerate(specs)]
    if isinstance(shape, Glm4):
        return [post_norms.layer_spec(spec) for spec in specs]
    return specs


def parallelize(layout: Layout) -> None:
    """Megatron-Core's process groups. A layout's stay until another is asked for: every group keeps its threads for as long as the process lives."""
    if current != [layout]:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**layout, distributed_timeout_minutes=1)
        current[:] = [layout]


def build(shape: Shape, layout: Layout) -> GPTModel:
    """This rank's part of the model, every weight NaN: what a load leaves out stays seen."""
    parallelize(layout)
    config = config_of(shape, layout)
    first, last = parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()
    block, specs = get_gpt_decoder_block_spec(config, use_transformer_engine=True), layer_specs(shape, config)
    here = len(block.layer_specs)
    block.layer_specs = specs[shape.layers - here : shape.layers] if last else specs[:here]
    multiple = 128 * layout.get("tensor_model_parallel_size", 1)
    model = GPTModel(
        config, block, vocab_size=-(-VOCAB // multiple) * multiple, max_sequence_length=128, pre_process=first, post_process=last,
        rotary_percent=shape.config().get("partial_rotary_factor", 1.0), rotary_base=10000, position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=get_gpt_mtp_block_spec(config, specs[-1], use_transformer_engine=True) if shape.mtp else None,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for tensor in weights(model).values():
            tensor.fill_(float("nan"))
    return model


def weights(model: GPTModel) -> dict[str, Tensor]:
    """What a checkpoint must hold: parameters and the routers' biases, without `_extra_state`."""
    return {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor) and not key.endswith("_extra_state")}
