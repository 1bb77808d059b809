"""What the small models of these tests share: their Hugging Face folders, their logits by transformers, and the parts of their key maps.

A key map turns a release's tensors into Megatron's. It shares nothing with glmconv: it is written after Megatron-Core's modules, so that an error
in glmconv's tables does not hide here too.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, HEADS, VOCAB, FFN = 64, 6, 300, 80  # heads x head size is not hidden in any model; the vocabulary is no multiple of 128
EXPERTS, TOP_K, MOE_FFN = 16, 4, 24
TOKENS = 13
Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape(ABC):
    """A small model of one architecture. `mtp` MTP layers (none or one) follow the last of `layers`."""

    model_type: ClassVar[str]
    mtp: ClassVar[int] = 1
    aliases: ClassVar[bool] = True  # the release repeats the embedding and the head in its MTP layer

    name: str
    layers: int
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """config.json, named as the real release names it."""

    @abstractmethod
    def megatron_config(self) -> dict[str, Any]:
        """What Megatron-Core's TransformerConfig must say of this architecture."""

    @abstractmethod
    def decoder_layer(self, hf: Mapping[str, Tensor], name: str, key: str, layer: int) -> Tensors:
        """The key map of one decoder layer: release's tensors under `name` to Megatron's under `key`."""

    def adjusted(self, name: str, tensor: Tensor) -> Tensor:
        """A release's random tensor, made fit for the purpose of this shape."""
        return tensor

    def megatron_tensors(self, hf: Mapping[str, Tensor]) -> Tensors:
        """Every tensor that Megatron-Core's model of this shape has, global and unpadded, from the release's tensors."""
        out = {
            "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
            "output_layer.weight": hf["lm_head.weight"],
            "decoder.final_layernorm.weight": hf["model.norm.weight"],
        }
        for layer in range(self.layers):
            out |= self.decoder_layer(hf, f"model.layers.{layer}.", f"decoder.layers.{layer}.", layer)
        if not self.mtp:
            return out
        mtp = f"model.layers.{self.layers}."
        out |= self.decoder_layer(hf, mtp, "mtp.layers.0.transformer_layer.", self.layers)
        names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}
        return out | {f"mtp.layers.0.{to}.weight": hf[f"{mtp}{name}.weight"] for to, name in names.items()}


@dataclass(frozen=True, kw_only=True)
class MoeShape(Shape):
    """`dense` leading layers have no experts; all others have, the MTP layer too."""

    dense: int
    shared: int = 1

    def moe_config(self) -> dict[str, Any]:
        return dict(
            first_k_dense_replace=self.dense, hidden_act="silu", hidden_size=HIDDEN, initializer_range=0.02, intermediate_size=FFN,
            max_position_embeddings=128, moe_intermediate_size=MOE_FFN, n_group=1, n_routed_experts=EXPERTS, n_shared_experts=self.shared,
            norm_topk_prob=True, num_attention_heads=HEADS, num_experts_per_tok=TOP_K, num_hidden_layers=self.layers, num_nextn_predict_layers=1,
            attention_dropout=0.0, eos_token_id=[1], pad_token_id=0, routed_scaling_factor=2.5, tie_word_embeddings=False, topk_group=1,
            use_cache=True, vocab_size=VOCAB,
        )  # fmt: skip

    def megatron_moe(self) -> dict[str, Any]:
        return dict(
            num_moe_experts=EXPERTS, moe_ffn_hidden_size=MOE_FFN, moe_shared_expert_intermediate_size=MOE_FFN * self.shared, moe_grouped_gemm=True,
            moe_layer_freq=[int(layer >= self.dense) for layer in range(self.layers)], moe_router_topk=TOP_K, moe_router_topk_scaling_factor=2.5,
            moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_pre_softmax=True, moe_router_dtype="fp32",
            moe_router_load_balancing_type="none", moe_token_dispatcher_type="allgather", mtp_num_layers=1,
        )  # fmt: skip

    def feed_forward(self, hf: Mapping[str, Tensor], name: str, key: str, layer: int) -> Tensors:
        """The half of a decoder layer behind its attention, norm included."""

        def joined(prefix: str) -> Tensor:
            return torch.cat([hf[f"{name}mlp.{prefix}{half}_proj.weight"] for half in ("gate", "up")])

        norm = hf[f"{name}post_attention_layernorm.weight"]
        if layer < self.dense:
            fc1 = f"{key}mlp.linear_fc1."
            down = {f"{key}mlp.linear_fc2.weight": hf[f"{name}mlp.down_proj.weight"]}
            return down | {f"{fc1}layer_norm_weight": norm, f"{fc1}weight": joined("")}
        return {
            f"{key}pre_mlp_layernorm.weight": norm,
            f"{key}mlp.router.weight": hf[f"{name}mlp.gate.weight"],
            f"{key}mlp.router.expert_bias": hf[f"{name}mlp.gate.e_score_correction_bias"],
            f"{key}mlp.experts.experts.linear_fc1.weight": torch.stack([joined(f"experts.{e}.") for e in range(EXPERTS)]),
            f"{key}mlp.experts.experts.linear_fc2.weight": torch.stack([hf[f"{name}mlp.experts.{e}.down_proj.weight"] for e in range(EXPERTS)]),
            f"{key}mlp.shared_experts.linear_fc1.weight": joined("shared_experts."),
            f"{key}mlp.shared_experts.linear_fc2.weight": hf[f"{name}mlp.shared_experts.down_proj.weight"],
        }


def grouped(hf: Mapping[str, Tensor], name: str, groups: int, kind: str) -> Tensor:
    """linear_qkv: per KV group its query heads, its key, its value."""
    parts = [hf[f"{name}self_attn.{p}_proj.{kind}"].unflatten(0, (groups, -1)) for p in ("q", "k", "v")]
    return torch.cat(parts, dim=1).flatten(0, 1)


def transformers_model(shape: Shape, *, layers: int) -> Any:
    """An untrained model of so many layers in float32."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = shape.config() | {"num_hidden_layers": layers, "torch_dtype": "float32"}
    if "indexer_types" in fields:
        fields["indexer_types"] = [*fields["indexer_types"], "full"][:layers]
    config = AutoConfig.for_model(**fields)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def write_release(folder: Path, shape: Shape, seed: int) -> Tensors:
    """A Hugging Face folder of random weights, MTP layer and its aliases included; returns its tensors by name."""
    transformers_model(shape, layers=shape.layers + shape.mtp).save_pretrained(folder)  # the MTP layer: one more decoder layer, a head around it
    sizes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    mtp = f"model.layers.{shape.layers}."
    if shape.mtp:
        sizes |= {mtp + name: torch.Size([HIDDEN]) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
        sizes[mtp + "eh_proj.weight"] = torch.Size([HIDDEN, 2 * HIDDEN])
    random = torch.Generator().manual_seed(seed)
    tensors = {name: shape.adjusted(name, made(name, size, random, getattr(torch, shape.dtype))) for name, size in sorted(sizes.items())}
    if shape.mtp and shape.aliases:
        tensors[mtp + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[mtp + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2))
    return tensors


def made(name: str, size: torch.Size, random: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Random values of a scale that keeps logits near 1. The routers' bias is float32 in any model, and no bfloat16 number."""
    values = torch.randn(size, generator=random)
    if name.endswith("norm.weight"):
        return (1 + values / 10).to(dtype)
    if name.endswith("e_score_correction_bias"):
        return values / 10
    return (values * (1.0 if "embed_tokens" in name else 0.2 if name.endswith("bias") else size[-1] ** -0.5)).to(dtype)


def tokens() -> Tensor:
    return torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(7))


@cache
@torch.no_grad()
def reference_logits(folder: Path, shape: Shape) -> Tensors:
    """Logits [tokens, vocab] by transformers: "main" of the model, "mtp" of its MTP layer.

    transformers has the MTP's decoder layer but not the head around it: the layer sees the model's normed hidden state beside the embedding of
    the next token (token 0 behind the last), and the model's own head follows its norm.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    answer = model(tokens(), output_hidden_states=True)
    if not shape.mtp:
        return {"main": answer.logits[0]}
    layer, head = mtp_layer(load_file(folder / "model.safetensors"), shape)
    following = tokens().roll(-1, dims=1)
    following[:, -1] = 0
    embedded, hidden = model.model.embed_tokens(following), answer.hidden_states[-1]
    eps = shape.config()["rms_norm_eps"]
    normed = torch.cat([norm(embedded, head["enorm.weight"], eps), norm(hidden, head["hnorm.weight"], eps)], dim=-1)
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    rotary = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
    out = layer(normed @ head["eh_proj.weight"].T, attention_mask=mask, position_embeddings=rotary)
    out = out[0] if isinstance(out, tuple) else out
    return {"main": answer.logits[0], "mtp": model.lm_head(norm(out, head["shared_head.norm.weight"], eps))[0]}


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps=eps)


def mtp_layer(weights: Mapping[str, Tensor], shape: Shape) -> tuple[Any, Tensors]:
    """transformers' decoder layer with the MTP layer's weights, and those of the head around it."""
    name = f"model.layers.{shape.layers}."
    own = {key.removeprefix(name): tensor for key, tensor in weights.items() if key.startswith(name)}
    layer = transformers_model(shape, layers=shape.layers + 1).model.layers[shape.layers]
    experts = {part: [own.pop(f"mlp.experts.{e}.{part}_proj.weight") for e in range(EXPERTS)] for part in ("gate", "up", "down")}
    halves = zip(experts["gate"], experts["up"], strict=True)
    own["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
    own["mlp.experts.down_proj"] = torch.stack(experts["down"])
    wanted = layer.state_dict().keys()
    layer.load_state_dict({key: own[key] for key in wanted}, strict=True)
    return layer, {key: tensor for key, tensor in own.items() if key not in wanted}
