"""The tensors of a GGUF file against those that llama.cpp's converter and llama-quantize make."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from glmconv.archs import SPECS, Model, bind, preset_named, presets, spec_for
from glmconv.errors import SourceError
from glmconv.formats.binding import has_aliases
from glmconv.formats.gguf_mix import Facts, Tensor, choose
from glmconv.formats.gguf_tensors import GGUFTensor, Run, Transform, gguf_tensors

VECTORS = Path(__file__).parent.parent / "vectors"
REAL = {  # what the dry runs' shapes have that the released model has not
    "GLM-4-32B-0414": {"num_key_value_heads": 8}, "GLM-4-9B-0414": {}, "GLM-4.5": {}, "GLM-4.5-Air": {}, "GLM-4.7-Flash": {}, "GLM-5": {},
}  # fmt: skip
DIFFERENT = {(spec.model_type, preset.tensors): (spec, preset) for spec, preset in presets()}.values()
SMALL = {"num_hidden_layers": 2, "n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}


def bound(name: str, **changes: object) -> Model:
    spec, preset = preset_named(name)
    return bind(spec, {**preset.config, **changes}, aliases=preset.aliases)


def by_name(tensors: list[GGUFTensor]) -> dict[str, GGUFTensor]:
    return {tensor.name: tensor for tensor in tensors}


@pytest.mark.parametrize("name", REAL)
def test_names_shapes_types_and_order_are_those_of_the_real_models(name: str) -> None:
    spec, preset = preset_named(name)
    wanted = json.loads(gzip.decompress((VECTORS / "mixes" / f"{name}.json.gz").read_bytes()))["tensors"]
    model = bind(spec, {**preset.config, **REAL[name]}, aliases=True)  # the copies are in every MTP layer there
    assert [[t.name, list(t.ne), t.dtype] for t in gguf_tensors(model)] == wanted


@pytest.mark.parametrize("folder", ["glm4_moe", "glm_moe_dsa"])
def test_tensors_are_those_of_the_converter_and_their_order_and_types_those_of_llama_quantize(folder: str) -> None:
    def read(name: str) -> object:
        return json.loads((VECTORS / "gguf_header" / folder / name).read_text())

    config, names = read("config.json"), {name: shape for _, name, _, shape in read("hf_tensors.json")}
    model = bind(spec_for(config), config, aliases=has_aliases(config, names, "config.json"))
    found = gguf_tensors(model, names)
    assert {run.tensor for tensor in found for run in tensor.runs} == set(names)
    assert sorted([t.name, t.dtype, list(t.ne)] for t in found) == sorted(read("convert-bf16.json")["tensors"])
    quantized = read("quantize-Q4_K_M.json")
    kv = {key.partition(".")[2]: value for key, _, value in quantized["kv"]}
    facts = Facts(kv["architecture"], kv["block_count"], kv["nextn_predict_layers"], kv["expert_count"], kv["attention.head_count"],
                  kv["attention.head_count_kv"])  # fmt: skip
    choices = choose("Q4_K_M", [Tensor(t.name, t.ne, t.dtype) for t in found], facts)
    assert [[t.name, choice.type, list(t.ne)] for t, choice in zip(found, choices, strict=True)] == quantized["tensors"]


@pytest.mark.parametrize(("spec", "preset"), [pytest.param(spec, preset, id=preset.name) for spec, preset in DIFFERENT])
def test_every_canonical_row_of_the_language_model_goes_to_one_tensor(spec, preset) -> None:
    model = bind(spec, preset.config, aliases=preset.aliases)
    rows = Counter[str]()
    starts = set()
    for tensor in gguf_tensors(model):
        for run in tensor.runs:
            rows[run.tensor] += run.rows
            starts.add((run.tensor, run.first))
    assert rows == {name: tensor.rows for name, tensor in model.tensors.items() if ".visual." not in name}
    assert all((name, 0) in starts for name in rows)


def test_every_architecture_has_a_place_for_every_tensor() -> None:
    assert all(row.gguf is not None for spec in SPECS.values() for scope in spec.scopes for row in scope.rows)


def data_of(tensor: GGUFTensor, source: dict[str, np.ndarray]) -> np.ndarray:
    """What the file holds, by the runs and the transform alone."""
    parts = [source[run.tensor][run.first : run.first + run.rows] for run in tensor.runs]
    parts = [part.T for part in parts] if tensor.transform is Transform.TRANSPOSED else parts
    return np.concatenate([np.ravel(part) for part in parts]).reshape(tensor.ne[::-1])


def test_kv_b_is_split_by_heads_and_the_keys_are_transposed() -> None:
    heads, nope, value, rank = 3, 5, 4, 2
    model = bound("GLM-4.7-Flash", **SMALL, num_attention_heads=heads, qk_nope_head_dim=nope, v_head_dim=value, kv_lora_rank=rank)
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    whole = np.arange(heads * (nope + value) * rank).reshape(heads * (nope + value), rank)
    found = by_name(gguf_tensors(model))
    split = whole.reshape(heads, nope + value, rank)
    keys, values = found["blk.1.attn_k_b.weight"], found["blk.1.attn_v_b.weight"]
    assert np.array_equal(data_of(keys, {name: whole}), split[:, :nope].transpose(0, 2, 1))
    assert np.array_equal(data_of(values, {name: whole}), split[:, nope:])
    assert values.transform is Transform.NONE


def test_experts_are_stacked_by_number() -> None:
    found = by_name(gguf_tensors(bound("GLM-4.5-Air", **SMALL)))
    stack = found["blk.1.ffn_down_exps.weight"]
    assert stack.ne == (1408, 4096, 4)
    assert stack.runs == tuple(Run(f"model.layers.1.mlp.experts.{expert}.down_proj.weight", 0, 4096) for expert in range(4))


def test_a_stack_with_a_part_missing_names_the_part() -> None:
    model = bound("GLM-4.5-Air", **SMALL)
    left = set(model.tensors) - {"model.layers.1.mlp.experts.2.up_proj.weight"}
    with pytest.raises(SourceError, match=r"experts\.2\.up_proj\.weight: is missing, a part of blk\.1\.ffn_up_exps\.weight; 3 of its 4"):
        gguf_tensors(model, left)


def test_copies_in_the_mtp_layer_are_there_only_if_the_source_has_them() -> None:
    model = bound("GLM-4.5-Air", **SMALL)
    copies = {"blk.2.nextn.embed_tokens.weight", "blk.2.nextn.shared_head_head.weight"}
    there = set(by_name(gguf_tensors(model)))
    assert copies <= there
    assert there - set(by_name(gguf_tensors(model, {name for name, t in model.tensors.items() if not t.alias}))) == copies


@pytest.mark.parametrize(
    ("name", "ne", "dtype", "transform"),
    [
        ("ssm_a", (64,), "F32", Transform.NEGATIVE_EXPONENTIAL),
        ("ssm_dt.bias", (8192,), "F32", Transform.WIDENED),
        ("ssm_conv1d_q.weight", (4, 1, 8192), "F32", Transform.WIDENED),
        ("ssm_f_a.weight", (4096, 128), "BF16", Transform.NONE),
        ("hc_attn_fn.weight", (16384, 24), "F32", Transform.WIDENED),
        ("exp_probs_b.bias", (288,), "F32", Transform.NONE),
        ("ffn_gate_inp.weight", (4096, 288), "F32", Transform.WIDENED),
        ("attn_q.weight", (4096, 8192), "BF16", Transform.NONE),
    ],
)
def test_a_linear_layer_of_glm_5_3_flash(name: str, ne: tuple[int, ...], dtype: str, transform: Transform) -> None:
    found = by_name(gguf_tensors(bound("GLM-5.3-Flash")))[f"blk.4.{name}"]
    assert (found.ne, found.dtype, found.transform) == (ne, dtype, transform)


@pytest.mark.parametrize("name", ["GLM-4.5V", "GLM-5.3-Flash"])
def test_the_vision_tower_is_left_out(name: str) -> None:
    found = gguf_tensors(bound(name))
    assert all(t.name.startswith(("blk.", "output", "token_embd.")) for t in found)
    assert not any(".visual." in run.tensor for t in found for run in t.runs)
