"""GLM-4.5's table in particular, and what is bound from a config that is not right."""

from __future__ import annotations

import pytest

from glmconv.archs import bind, preset_named, preset_of, spec_for
from glmconv.archs.table import spec_table, table_values
from glmconv.cli.output import table
from glmconv.errors import SourceError, UnsupportedError, UsageError
from glmconv.formats.megatron_args import to_args
from glmconv.formats.megatron_keys import extra_states, megatron_tensors


def test_megatron_shapes_are_those_of_the_format() -> None:
    spec, preset = preset_named("GLM-4.5")
    stored = megatron_tensors(bind(spec, preset.config), "te")
    assert stored["decoder.layers.0.self_attention.linear_qkv.weight"].shape == ((96 + 16) * 128, 5120)
    assert stored["decoder.layers.0.self_attention.linear_qkv.bias"].shape == ((96 + 16) * 128,)
    assert stored["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"].shape == (160, 3072, 5120)
    assert stored["mtp.layers.0.transformer_layer.mlp.experts.experts.linear_fc2.weight"].shape == (160, 5120, 1536)
    assert stored["mtp.layers.0.eh_proj.weight"].shape == (5120, 10240)


def test_q_k_and_v_are_dealt_out_group_by_group() -> None:
    config = dict(preset_named("GLM-4.5")[1].config, num_attention_heads=6, num_key_value_heads=2, head_dim=4, num_hidden_layers=1)
    model = bind(spec_for(config), dict(config, first_k_dense_replace=1, num_nextn_predict_layers=0))
    tiles = megatron_tensors(model, "te")["decoder.layers.0.self_attention.linear_qkv.weight"].tiles
    assert [(t.target, t.rows, t.tensor.rpartition("self_attn.")[2][0], t.source) for t in tiles] == [
        (0, 12, "q", 0), (12, 4, "k", 0), (16, 4, "v", 0), (20, 12, "q", 12), (32, 4, "k", 4), (36, 4, "v", 4),
    ]  # fmt: skip


@pytest.mark.parametrize("left", [{}, {"head_dim": None}])
def test_without_a_head_dim_heads_share_the_hidden_size_as_in_transformers(left: dict[str, object]) -> None:
    config = {name: value for name, value in preset_named("GLM-4.5")[1].config.items() if name != "head_dim"}
    model = bind(spec_for(config), config | {"hidden_size": 480, "num_attention_heads": 6, "num_key_value_heads": 2} | left)
    assert model.tensors["model.layers.0.self_attn.k_proj.weight"].shape == (2 * 80, 480)
    assert to_args(config, model)["kv_channels"] == 80


def test_air_has_no_qk_norm_and_one_dense_layer() -> None:
    spec, preset = preset_named("glm4.5-106B-A12B")
    names = bind(spec, preset.config).tensors
    assert not any("q_norm" in name for name in names)
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert "model.layers.1.mlp.gate.weight" in names


def test_extra_states_are_the_union_that_megatron_asks_for() -> None:
    config = dict(preset_named("GLM-4.5")[1].config, num_hidden_layers=2, first_k_dense_replace=1, n_routed_experts=16)
    keys = {key for _, key in extra_states(megatron_tensors(bind(spec_for(config), config), "te"))}
    layer = "decoder.layers.1."
    assert {layer + f"mlp.experts.experts.linear_fc1._extra_state/shard_{e}_16" for e in range(16)} <= keys
    assert {layer + "self_attention.core_attention._extra_state/shard_0_1", layer + "pre_mlp_layernorm._extra_state/shard_0_1"} <= keys
    assert {"decoder.final_layernorm._extra_state/shard_0_1", "mtp.layers.0.enorm._extra_state/shard_0_1"} <= keys
    assert not any("router" in key or "embedding" in key or "output_layer" in key for key in keys)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"hidden_size": "5120"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"n_routed_experts": 5000}, "n_routed_experts"),
        ({"num_key_value_heads": 7}, "multiple"),
        ({"num_experts_per_tok": 161}, "num_experts_per_tok"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"first_k_dense_replace": 93}, "first_k_dense_replace"),
    ],
)
def test_an_absurd_config_is_refused_by_the_name_of_its_field(change: dict[str, object], part: str) -> None:
    spec, preset = preset_named("GLM-4.5")
    with pytest.raises(SourceError, match=part):
        bind(spec, {**preset.config, **change})


def test_an_unknown_architecture_is_named() -> None:
    with pytest.raises(UnsupportedError, match="llama"):
        spec_for({"model_type": "llama"})


def test_a_preset_is_found_by_name_hub_id_and_config() -> None:
    _spec, preset = preset_named("zai-org/glm-4.6")
    assert preset.name == "glm4.6-355B-A32B"
    assert preset_of(preset.config) == preset
    assert preset_of({**preset.config, "hidden_size": 64}) is None
    with pytest.raises(UsageError, match="no preset"):
        preset_named("gpt-5")


def test_the_table_prints_with_the_counts_of_each_preset() -> None:
    text = spec_table("glm4_moe", table)
    assert "self_attention.linear_qkv.weight[q of q, k, v]" in text
    assert "heads*head_dim" in text
    assert "glm4.5-355B-A32B 44,691" in text
    assert "glm4.6-355B-A32B 44,689" in text
    rows = table_values("GLM-4.5")["rows"]
    assert isinstance(rows, list)
    assert sum(row["count"]["glm4.5-355B-A32B"] for row in rows) == 44691
