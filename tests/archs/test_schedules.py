"""Which layers are of which kind: what the config lists, else what transformers derives from its numbers."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import Glm4MoeLiteConfig, GlmMoeDsaConfig
from transformers.models.glm5_next.configuration_glm5_next import Glm5NextTextConfig

from glmconv.archs import bind, preset_named
from glmconv.archs.model import Model
from glmconv.errors import SourceError

FREE = ("indexer_types", "index_topk_freq", "index_skip_topk_offset", "index_topk_pattern", "mlp_layer_types", "layer_types", "first_k_dense_replace")


def bound(name: str, **changes: object) -> Model:
    """A preset's model, its schedules left out but for what is changed."""
    spec, preset = preset_named(name)
    config: dict[str, Any] = dict(preset.config)
    text = dict(config["text_config"]) if spec.text else config
    text = {field: value for field, value in text.items() if field not in FREE} | changes
    return bind(spec, {**config, spec.text: text} if spec.text else text)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"index_topk_freq": 4}, {"index_topk_freq": 4, "index_skip_topk_offset": 3}, {"index_topk_freq": 2, "index_skip_topk_offset": 0},
        {"index_topk_freq": 0}, {"index_topk_pattern": "FSS" * 26}, {"indexer_types": ["full", "shared"] * 39}, {"first_k_dense_replace": 1},
        {"mlp_layer_types": ["dense"] * 5 + ["sparse"] * 73}, {"index_topk_pattern": ["full"] * 40 + ["shared"] * 38},
    ],
)  # fmt: skip
def test_layers_with_an_indexer_and_with_experts_are_those_of_transformers(changes: dict[str, object]) -> None:
    theirs = GlmMoeDsaConfig(num_hidden_layers=78, **changes)
    ours = bound("glm5-744B-A40B", num_hidden_layers=78, **changes).layers
    assert ours["indexed"] == tuple(layer for layer, kind in enumerate(theirs.indexer_types) if kind == "full")
    assert ours["dense"] == tuple(layer for layer, kind in enumerate(theirs.mlp_layer_types) if kind == "dense")
    assert sorted(ours["dense"] + ours["sparse"]) == list(range(78))
    assert ours["mtp"] == ours["indexed_mtp"] == (78,)


def test_glm_5_2_has_an_indexer_in_every_fourth_layer_and_in_its_mtp_layer() -> None:
    spec, preset = preset_named("GLM-5.2")
    with_lists = bind(spec, preset.config)
    without = bind(spec, {field: value for field, value in preset.config.items() if field != "indexer_types"})
    assert with_lists.layers == without.layers
    assert with_lists.layers["indexed"] == (0, 1, 2, *range(6, 78, 4))
    assert "model.layers.78.self_attn.indexer.wq_b.weight" in with_lists.tensors


def test_linear_layers_are_those_of_transformers() -> None:
    theirs = Glm5NextTextConfig()
    ours = bound("glm5.3-flash-321B").layers
    assert ours["linear"] == tuple(layer for layer, kind in enumerate(theirs.layer_types) if kind == "linear_attention")
    assert ours["dense"] == tuple(layer for layer, kind in enumerate(theirs.mlp_layer_types) if kind == "dense")
    assert set(ours["indexed"]) <= set(ours["attention"])
    assert sorted(ours["linear"] + ours["attention"]) == list(ours["decoder"])


def test_a_config_that_transformers_saved_has_only_lists() -> None:
    saved = Glm4MoeLiteConfig(mlp_layer_types=["dense"] * 2 + ["sparse"] * 45).to_dict()
    saved.pop("first_k_dense_replace", None)
    assert bind(preset_named("glm4.7-flash-30B-A3B")[0], saved).layers["dense"] == (0, 1)


@pytest.mark.parametrize(
    ("name", "changes", "part"),
    [
        ("glm5-744B-A40B", {"indexer_types": ["full"] * 77}, "indexer_types does not list one kind for each of the 78 layers"),
        ("glm5-744B-A40B", {"indexer_types": ["full"] * 77 + ["half"]}, "'half'; known are full, shared"),
        ("glm5-744B-A40B", {"index_topk_pattern": "FSX" * 26}, "index_topk_pattern"),
        ("glm5-744B-A40B", {"mlp_layer_types": "dense"}, "mlp_layer_types"),
        ("glm5-744B-A40B", {"index_head_dim": 64}, "index_head_dim is more than qk_rope_head_dim"),
        ("glm5-744B-A40B", {"attention_bias": True}, "attention_bias is false"),
        ("glm5.3-flash-321B", {"layer_types": [["x"]] * 45}, "layer_types"),
        ("glm5.3-flash-321B", {"qk_rope_head_dim": 64}, "qk_rope_head_dim is 0"),
        ("glm5.3-flash-321B", {"linear_attn_config": {}}, "linear_attn_config.num_heads is missing"),
        ("glm4.5v-108B-A12B", {"hidden_size": 4104}, "out_hidden_size is text_config.hidden_size"),
        ("glm4-9B-0414", {"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused_by_its_name(name: str, changes: dict[str, object], part: str) -> None:
    with pytest.raises(SourceError, match=part):
        bound(name, **({"first_k_dense_replace": 3} if "glm4-9B" not in name else {}) | changes)
