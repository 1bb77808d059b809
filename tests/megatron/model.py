"""A small GLM-4.5 for the tests: its Hugging Face folder, its logits by transformers, and its Megatron tensors by a key map of their own.

The key map shares nothing with glmconv: it is written after Megatron-Core's modules, so that an error in glmconv's table does not hide here too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, HEADS, GROUPS, HEAD_DIM, VOCAB = 64, 6, 2, 32, 300  # heads x head_dim is not hidden; the vocabulary no multiple of 128
EXPERTS, TOP_K, MOE_FFN, FFN = 16, 4, 24, 80
TOKENS = 13


@dataclass(frozen=True)
class Shape:
    """What differs between the tested models. `dense` leading layers have no experts; one MTP layer follows the last of `layers`."""

    name: str
    layers: int
    dense: int
    qk_norm: bool
    shared: int = 1
    dtype: str = "bfloat16"

    def config(self) -> dict[str, object]:
        return dict(
            architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", attention_bias=True, attention_dropout=0.0, eos_token_id=[1], pad_token_id=0,
            first_k_dense_replace=self.dense, head_dim=HEAD_DIM, hidden_act="silu", hidden_size=HIDDEN, initializer_range=0.02, intermediate_size=FFN,
            max_position_embeddings=128, moe_intermediate_size=MOE_FFN, n_group=1, n_routed_experts=EXPERTS, n_shared_experts=self.shared,
            norm_topk_prob=True, num_attention_heads=HEADS, num_experts_per_tok=TOP_K, num_hidden_layers=self.layers, num_key_value_heads=GROUPS,
            num_nextn_predict_layers=1, partial_rotary_factor=0.5, rms_norm_eps=1e-5, rope_scaling=None, rope_theta=10000, routed_scaling_factor=2.5,
            tie_word_embeddings=False, topk_group=1, torch_dtype=self.dtype, use_cache=True, use_qk_norm=self.qk_norm, vocab_size=VOCAB,
        )  # fmt: skip


def transformers_model(shape: Shape, *, layers: int | None = None):  # type: ignore[no-untyped-def]
    """An untrained model in float32."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(**shape.config() | {"num_hidden_layers": layers or shape.layers, "torch_dtype": "float32"})
    return Glm4MoeForCausalLM._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def write_release(folder: Path, shape: Shape, seed: int) -> dict[str, Tensor]:
    """A Hugging Face folder of random weights, MTP layer and its two aliases included; returns its tensors by name."""
    transformers_model(shape, layers=shape.layers + 1).save_pretrained(folder)  # the MTP layer is one more decoder layer with a head around it
    sizes = {name: tensor.shape for name, tensor in load_file(folder / "model.safetensors").items()}
    mtp = f"model.layers.{shape.layers}."
    sizes |= {mtp + name: torch.Size([HIDDEN]) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    sizes[mtp + "eh_proj.weight"] = torch.Size([HIDDEN, 2 * HIDDEN])
    random = torch.Generator().manual_seed(seed)
    tensors = {name: made(name, size, random, getattr(torch, shape.dtype)) for name, size in sorted(sizes.items())}
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


def megatron_tensors(hf: Mapping[str, Tensor], shape: Shape) -> dict[str, Tensor]:
    """Every tensor that Megatron-Core's model of this shape has, global and unpadded, from the release's tensors."""
    out = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "output_layer.weight": hf["lm_head.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    for layer in range(shape.layers):
        out |= decoder_layer(hf, f"model.layers.{layer}.", f"decoder.layers.{layer}.", shape, moe=layer >= shape.dense)
    mtp = f"model.layers.{shape.layers}."
    out |= decoder_layer(hf, mtp, "mtp.layers.0.transformer_layer.", shape, moe=True)
    names = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "final_layernorm": "shared_head.norm"}
    return out | {f"mtp.layers.0.{to}.weight": hf[f"{mtp}{name}.weight"] for to, name in names.items()}


def decoder_layer(hf: Mapping[str, Tensor], name: str, key: str, shape: Shape, *, moe: bool) -> dict[str, Tensor]:
    def joined(prefix: str) -> Tensor:
        return torch.cat([hf[f"{name}mlp.{prefix}{half}_proj.weight"] for half in ("gate", "up")])

    def grouped(kind: str) -> Tensor:
        """Per KV group: its query heads, its key, its value."""
        parts = [hf[f"{name}self_attn.{p}_proj.{kind}"].unflatten(0, (GROUPS, -1)) for p in ("q", "k", "v")]
        return torch.cat(parts, dim=1).flatten(0, 1)

    attention, post_norm = f"{key}self_attention.", hf[f"{name}post_attention_layernorm.weight"]
    out = {
        f"{attention}linear_qkv.layer_norm_weight": hf[f"{name}input_layernorm.weight"],
        f"{attention}linear_qkv.weight": grouped("weight"),
        f"{attention}linear_qkv.bias": grouped("bias"),
        f"{attention}linear_proj.weight": hf[f"{name}self_attn.o_proj.weight"],
    }
    if shape.qk_norm:
        out |= {f"{attention}{p}_layernorm.weight": hf[f"{name}self_attn.{p}_norm.weight"] for p in ("q", "k")}
    if not moe:
        fc1 = f"{key}mlp.linear_fc1."
        down = {f"{key}mlp.linear_fc2.weight": hf[f"{name}mlp.down_proj.weight"]}
        return out | down | {f"{fc1}layer_norm_weight": post_norm, f"{fc1}weight": joined("")}
    return out | {
        f"{key}pre_mlp_layernorm.weight": post_norm,
        f"{key}mlp.router.weight": hf[f"{name}mlp.gate.weight"],
        f"{key}mlp.router.expert_bias": hf[f"{name}mlp.gate.e_score_correction_bias"],
        f"{key}mlp.experts.experts.linear_fc1.weight": torch.stack([joined(f"experts.{e}.") for e in range(EXPERTS)]),
        f"{key}mlp.experts.experts.linear_fc2.weight": torch.stack([hf[f"{name}mlp.experts.{e}.down_proj.weight"] for e in range(EXPERTS)]),
        f"{key}mlp.shared_experts.linear_fc1.weight": joined("shared_experts."),
        f"{key}mlp.shared_experts.linear_fc2.weight": hf[f"{name}mlp.shared_experts.down_proj.weight"],
    }


def tokens() -> Tensor:
    return torch.randint(VOCAB, (1, TOKENS), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def reference_logits(folder: Path, shape: Shape) -> dict[str, Tensor]:
    """Logits [tokens, vocab] by transformers: "main" of the model, "mtp" of its MTP layer.

    transformers has the MTP's decoder layer but not the head around it: the layer sees the model's normed hidden state beside the embedding of
    the next token (token 0 behind the last), and the model's own head follows its norm.
    """
    from transformers import Glm4MoeForCausalLM

    model = Glm4MoeForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    answer = model(tokens(), output_hidden_states=True)
    weights = load_file(folder / "model.safetensors")
    layer, head = mtp_layer(weights, shape)
    following = tokens().roll(-1, dims=1)
    following[:, -1] = 0
    embedded, hidden = model.model.embed_tokens(following), answer.hidden_states[-1]
    normed = torch.cat([norm(embedded, head["enorm.weight"]), norm(hidden, head["hnorm.weight"])], dim=-1)
    mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)[None, None]
    rotary = model.model.rotary_emb(hidden, torch.arange(TOKENS)[None])
    out = layer(normed @ head["eh_proj.weight"].T, attention_mask=mask, position_embeddings=rotary)
    return {"main": answer.logits[0], "mtp": model.lm_head(norm(out, head["shared_head.norm.weight"]))[0]}


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps=1e-5)


def mtp_layer(weights: Mapping[str, Tensor], shape: Shape):  # type: ignore[no-untyped-def]
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
