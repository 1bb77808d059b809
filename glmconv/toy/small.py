"""A release's config.json made small: every size that decides shapes, none of the facts that decide which tensors there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from glmconv.archs import ArchSpec, text_of
from glmconv.toy.images import FIELDS
from glmconv.toy.tokenizer import SMALLEST_VOCABULARY, special_ids

# index_head_dim stays as it is: llama.cpp turns an indexer's heads by a matrix of one size
# field -> (step, least): scaled down to a multiple of `step`, not below `least`
WIDTHS = {
    "hidden_size": (8, 16), "intermediate_size": (8, 16), "moe_intermediate_size": (8, 16), "q_lora_rank": (8, 24), "kv_lora_rank": (8, 16),
    "qk_nope_head_dim": (4, 12), "qk_rope_head_dim": (4, 8), "v_head_dim": (4, 16), "index_n_heads": (1, 2),
}  # fmt: skip
TOP_K = 16  # of a small indexer: fewer than the tokens of a short prompt, so that its weights matter
VISION_DEPTH, VISION_HEADS, VISION_HEAD_DIM, VISION_PATCHES = 2, 2, 16, 6  # llama.cpp enlarges an image of fewer patches
Fields = dict[str, Any]


@dataclass(frozen=True)
class Shrinking:
    """How small: `scale` multiplies every width, 1 keeps them all true; `layers`, `experts`, `vocabulary` None keep the preset's, scaled."""

    layers: int | None
    experts: int | None
    scale: Fraction
    mtp: bool
    vocabulary: int | None = None

    def scaled(self, value: int, step: int, least: int) -> int:
        if self.scale == 1 or value == 0:
            return value
        return max(least, int(value * self.scale) // step * step)


def small_config(spec: ArchSpec, config: Mapping[str, object], how: Shrinking) -> Fields:
    """The config made small. Heads stay a multiple of KV groups, heads x head_dim stays unequal to the hidden size."""
    text = _language_model(dict(text_of(spec, config)), how)
    if not spec.text:
        return text
    small: Fields = dict(config) | {spec.text: text}
    if isinstance(config.get("vision_config"), Mapping):
        small["vision_config"] = _tower(dict(small["vision_config"]), text["hidden_size"], how)
        ids = special_ids(images=True)
        small |= {field: ids[token] for token, field in FIELDS.items()}
    return small


def _language_model(text: Fields, how: Shrinking) -> Fields:
    small = text | {field: how.scaled(text[field], *WIDTHS[field]) for field in WIDTHS if field in text}
    small |= _latent_heads(text, small, how) if "kv_lora_rank" in text else _grouped_heads(text, how)
    layers = how.layers or text["num_hidden_layers"]
    ids = special_ids()
    small |= {
        "vocab_size": max(SMALLEST_VOCABULARY, how.vocabulary or how.scaled(text["vocab_size"], 8, SMALLEST_VOCABULARY)),
        "num_hidden_layers": layers,
        "eos_token_id": [ids["<|endoftext|>"], ids["<|user|>"], ids["<|observation|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }
    if "n_routed_experts" in text:
        experts = how.experts or text["n_routed_experts"]
        dense = min(text["first_k_dense_replace"], max(0, layers - 1))
        small |= {"n_routed_experts": experts, "num_experts_per_tok": min(text["num_experts_per_tok"], max(1, experts // 2))}
        small["first_k_dense_replace"] = dense
        if "mlp_layer_types" in text:
            small["mlp_layer_types"] = ["dense"] * dense + ["sparse"] * (layers - dense)
    if not how.mtp and "num_nextn_predict_layers" in text:
        small["num_nextn_predict_layers"] = 0
    for field in ("indexer_types", "layer_types"):
        if field in text:
            small[field] = [text[field][min(layer, len(text[field]) - 1)] for layer in range(layers)]
    if "index_topk" in text and how.scale != 1:
        small["index_topk"] = TOP_K
    if "linear_attn_config" in text:
        small["linear_attn_config"] = _linear_attention(text["linear_attn_config"], layers, how)
    return small


def _grouped_heads(text: Fields, how: Shrinking) -> Fields:
    if how.scale == 1:
        return {}
    groups = max(2, int(text["num_key_value_heads"] * how.scale))
    per_group = text["num_attention_heads"] // text["num_key_value_heads"]
    head_dim = how.scaled(text["head_dim"], 8, 32)
    small: Fields = {"num_key_value_heads": groups, "num_attention_heads": groups * max(2, int(per_group * how.scale * 4)), "head_dim": head_dim}
    rope = text.get("rope_scaling")
    if isinstance(rope, dict) and "mrope_section" in rope:
        small["rope_scaling"] = rope | {"mrope_section": [n * head_dim // text["head_dim"] for n in rope["mrope_section"]]}
    return small


def _latent_heads(text: Fields, small: Fields, how: Shrinking) -> Fields:
    heads = how.scaled(text["num_attention_heads"], 1, 3)
    found: Fields = {"num_attention_heads": heads, "num_key_value_heads": heads}
    if "qk_head_dim" in text:
        found["qk_head_dim"] = small["qk_nope_head_dim"] + small["qk_rope_head_dim"]
    if "head_dim" in text:
        found["head_dim"] = small["qk_nope_head_dim" if text["head_dim"] == text["qk_nope_head_dim"] else "qk_rope_head_dim"]
    return found


def _linear_attention(text: Fields, layers: int, how: Shrinking) -> Fields:
    kinds = {name: [layer for layer in text[name] if layer < layers] for name in ("kda_layers", "full_attn_layers")}
    return text | kinds | {"num_heads": how.scaled(text["num_heads"], 1, 3), "head_dim": how.scaled(text["head_dim"], 8, 16)}


def _tower(vision: Fields, hidden: int, how: Shrinking) -> Fields:
    if how.scale == 1:
        return vision
    widths = {field: how.scaled(vision[field], 8, 24) for field in ("intermediate_size", "projection_intermediate_size") if field in vision}
    return vision | widths | {
        "depth": min(vision["depth"], VISION_DEPTH), "num_heads": VISION_HEADS, "hidden_size": VISION_HEADS * VISION_HEAD_DIM,
        "out_hidden_size": hidden, "image_size": VISION_PATCHES * vision["patch_size"],
    }  # fmt: skip
