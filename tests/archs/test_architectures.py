"""Every architecture's table against its published models: counts, roles, and every Megatron row of every dialect exactly once."""

from __future__ import annotations

import math

import pytest

from glmconv.archs import SPECS, Preset, Role, bind, preset_named, preset_of, presets
from glmconv.archs.spec import ArchSpec, Move, Split, moves, record, sizes
from glmconv.archs.table import spec_table, table_values
from glmconv.cli.output import table
from glmconv.codecs import codec_of
from glmconv.dtypes import BY_NAME
from glmconv.formats.megatron_args import to_args
from glmconv.formats.megatron_keys import extra_states, megatron_tensors, stacked_layers
from glmconv.formats.selection import QuantOptions, select

PRESETS = [pytest.param(spec, preset, id=preset.name) for spec, preset in presets()]
DIFFERENT = {(spec.model_type, preset.tensors): (spec, preset) for spec, preset in presets()}.values()  # GLM-5 and 5.1 are the same shapes
DIALECTS = [
    pytest.param(spec, preset, dialect, id=f"{preset.name} {dialect}")
    for spec, preset in DIFFERENT
    for dialect in dict.fromkeys(spec.dialects.values())
]
PUBLISHED = {  # tensors, of them MTP; parameters without copies
    "GLM-4.5": (44691, 502, 356_785_898_816), "GLM-4.5-Air": (18329, 404, 109_227_310_848), "GLM-4.6": (44689, 500, 356_785_898_816),
    "GLM-4.7": (44689, 500, 356_785_898_816), "GLM-5": (59870, 791, 753_864_139_008), "GLM-5.1": (59870, 791, 753_864_139_008),
    "GLM-5.2": (59585, 791, 753_329_940_480), "GLM-5.3": (59585, 791, 753_329_940_480), "GLM-4.7-Flash": (9703, 212, 30_587_100_096),
    "GLM-4-9B-0414": (523, 0, 9_400_279_040), "GLM-4-32B-0414": (613, 0, 32_566_081_536), "GLM-4.5V": (18106, 0, 107_710_933_120),
    "GLM-4.6V": (18106, 0, 107_710_933_120), "GLM-5.3-Flash": (38770, 889, 321_323_031_390),
}  # fmt: skip


@pytest.mark.parametrize(("spec", "preset"), PRESETS)
def test_a_preset_has_the_published_number_of_tensors_and_parameters(spec: ArchSpec, preset: Preset) -> None:
    tensors = bind(spec, preset.config, aliases=preset.aliases).tensors.values()
    found = len(tensors), sum(t.mtp for t in tensors), sum(t.elements for t in tensors if not t.alias)
    assert found == PUBLISHED[preset.hub.rpartition("/")[2]]
    assert found[:2] == (preset.tensors, preset.mtp_tensors)


def test_every_released_model_is_a_preset() -> None:
    assert {preset.hub.rpartition("/")[2] for _, preset in presets()} == set(PUBLISHED)


@pytest.mark.parametrize(("spec", "preset", "dialect"), DIALECTS)
def test_every_megatron_row_is_covered_exactly_once_and_every_element_has_a_place(spec: ArchSpec, preset: Preset, dialect: str) -> None:
    model = bind(spec, preset.config, aliases=preset.aliases)
    stored = megatron_tensors(model, dialect)  # raises on a gap or an overlap
    stored = stacked_layers(stored) if spec.stacked else stored
    assert sum(math.prod(t.shape) for t in stored.values()) == sum(t.elements for t in model.tensors.values() if not t.alias)
    assert len({key for _, key in extra_states(stored)}) == len(list(extra_states(stored)))


@pytest.mark.parametrize(("spec", "preset"), PRESETS)
def test_a_preset_is_found_by_its_config_its_name_and_its_hub_id(spec: ArchSpec, preset: Preset) -> None:
    found = preset_of(preset.config)
    assert found is not None
    assert found.config.get("model_type") == spec.model_type
    assert (found.tensors, found.mtp_tensors) == (preset.tensors, preset.mtp_tensors)
    assert preset_named(preset.hub) == preset_named(preset.name.upper()) == (spec, preset)


@pytest.mark.parametrize("model_type", SPECS)
def test_only_projections_and_experts_are_quantized(model_type: str) -> None:
    spec = SPECS[model_type]
    model = bind(spec, spec.presets[0].config)
    for name, tensor in model.tensors.items():
        if tensor.role in (Role.LINEAR, Role.EXPERT):
            assert len(tensor.shape) == 2
            assert "_proj" in name or name.endswith(("indexer.wq_b.weight", "indexer.wk.weight"))
            assert not any(part in name for part in ("visual", "weights_proj", "eh_proj", "lm_head", "gate.weight", "conv1d"))
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            assert tensor.role is Role.NORM


@pytest.mark.parametrize("model_type", SPECS)
def test_the_table_prints_with_the_counts_of_each_preset(model_type: str) -> None:
    spec = SPECS[model_type]
    text = spec_table(model_type, table)
    assert all(f"{preset.name} {preset.tensors:,}" in text for preset in spec.presets)
    rows = table_values(spec.presets[0].name)["rows"]
    assert isinstance(rows, list)
    assert sum(row["count"][spec.presets[0].name] for row in rows) == spec.presets[0].tensors


@pytest.mark.parametrize(("name", "scales", "size"), [("GLM-5.2", 59044, 755_617_140_416), ("GLM-5.3-Flash", 37338, 328_326_771_576)])
def test_block_fp8_is_of_the_published_size_to_the_byte(name: str, scales: int, size: int) -> None:
    """The releases' own FP8 weights: `total_size` and number of scales in the index of GLM-5.2-FP8 and GLM-5.3-Flash. So roles are as theirs."""
    spec, preset = preset_named(name)
    model = bind(spec, preset.config)
    chosen = select(model, model.tensors, codec_of("fp8"), QuantOptions())
    assert len(chosen.encoded) == scales
    total = 0
    for key, tensor in model.tensors.items():
        plain = tensor.elements * (4 if tensor.dtype == "float32" else 2)
        parts = chosen.codec.parts((tensor.shape[0], tensor.shape[1]), BY_NAME["bfloat16"]) if key in chosen.encoded else ()
        total += sum(part.size for part in parts) or plain
    assert total == size


def test_splits_and_swapped_halves_are_places_too() -> None:
    heads, nope, rope, v_dim = sizes("heads nope rope v_dim")
    s = dict(heads=3, nope=4, rope=2, v_dim=5)
    kv_b = Split(record("", k=nope, v=v_dim), {"k": "k_b", "v": "v_b"})
    assert [m.source for m in moves(kv_b, (heads * (nope + v_dim)).of(s), {}, s)] == [0, 9, 18, 4, 13, 22]
    swapped = record("wq", nope=nope, rope=rope)
    halves = Split(record("", rope=rope, nope=nope), {"rope": swapped.rope, "nope": swapped.nope})
    rows = list(moves(halves, 12, {}, s))
    assert Move("wq", 0, 4, 2) in rows
    assert Move("wq", 2, 0, 4) in rows
    assert sorted(m.target + n for m in rows for n in range(m.rows)) == list(range(12))


def test_an_indexer_head_is_turned_for_slime_and_megatron_core_and_not_for_bridge() -> None:
    spec, preset = preset_named("GLM-5")
    model = bind(spec, preset.config)
    name = "model.layers.0.self_attn.indexer.wk.weight"
    tensor = model.tensors[name]
    for dialect, key in (("slime", "wk"), ("mcore", "core_attention.indexer.linear_wk")):
        turned = {Move(f"decoder.layers.0.self_attention.{key}.weight", *rows) for rows in ((0, 64, 64), (64, 0, 64))}
        assert set(model.megatron(tensor, dialect)) == turned
    assert list(model.megatron(tensor, "bridge")) == [Move("decoder.layers.0.self_attention.core_attention.indexer.linear_wk.weight", 0, 0, 128)]


def test_a_dense_model_is_stacked_layer_by_layer() -> None:
    spec, preset = preset_named("glm4-9B-0414")
    stored = stacked_layers(megatron_tensors(bind(spec, preset.config), "te"))
    assert stored["decoder.layers.self_attention.linear_qkv.weight"].shape == (40, (32 + 4) * 128, 4096)
    assert stored["decoder.layers.post_mlp_layernorm.weight"].shape == (40, 4096)
    assert stored["decoder.layers.mlp.linear_fc1.weight"].shape == (40, 2 * 13696, 4096)
    assert not any(key.startswith("decoder.layers.0") for key in stored)
    keys = {key for _, key in extra_states(stored)}
    assert {f"decoder.layers.self_attention.linear_qkv._extra_state/shard_{n}_40" for n in range(40)} <= keys


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("glm4.7-flash-30B-A3B", dict(multi_latent_attention=True, q_lora_rank=768, kv_channels=192, add_position_embedding=False, num_experts=64)),
        ("glm5-744B-A40B", dict(qk_pos_emb_head_dim=64, v_head_dim=256, moe_layer_freq=[0] * 3 + [1] * 75, indexer_rope_interleave=True)),
        ("glm4-9B-0414", dict(num_experts=None, rotary_interleaved=True, rotary_percent=0.5, add_qkv_bias=True, num_query_groups=2)),
        ("glm4.5v-108B-A12B", dict(hidden_size=4096, num_experts=128, rotary_percent=0.5, mtp_num_layers=None)),
    ],
)
def test_the_arguments_of_a_megatron_run_follow_the_config(name: str, wanted: dict[str, object]) -> None:
    spec, preset = preset_named(name)
    args = to_args(preset.config, bind(spec, preset.config))
    assert {key: args[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "hub"),
    [("GLM-4.5-355B-A32B", "GLM-4.5"), ("glm4.7-30B-A3B", "GLM-4.7-Flash"), ("glm4-9B", "GLM-4-9B-0414"), ("zai-org/GLM-4.5-Air", "GLM-4.5-Air"),
     ("glm5.3-flash", "GLM-5.3-Flash"), ("glm4.5v-106B-A12B", "GLM-4.5V")],
)  # fmt: skip
def test_a_preset_is_found_by_the_names_that_documents_have_for_it(name, hub):
    assert preset_named(name)[1].hub == f"zai-org/{hub}"
