"""The mixes against 420 dry runs of llama-quantize over the shapes of six models."""

from __future__ import annotations

import gzip
import json
import math
from functools import cache
from itertools import chain, groupby
from pathlib import Path

import pytest

from glmconv.errors import UsageError
from glmconv.formats.gguf_mix import ALIASES, BLOCKS, MIXES, TABLE, Choice, Facts, Tensor, choose, mix_named, type_bytes

VECTORS = Path(__file__).parent.parent / "vectors" / "mixes"
MODELS = ("GLM-4-32B-0414", "GLM-4-9B-0414", "GLM-4.5", "GLM-4.5-Air", "GLM-4.7-Flash", "GLM-5")


@cache
def golden(model: str) -> tuple[list[Tensor], Facts, dict]:
    found = json.loads(gzip.decompress((VECTORS / f"{model}.json.gz").read_bytes()))
    facts = Facts(found["arch"], found["block_count"], found["nextn"], found["expert_count"], found["head_count"], found["head_count_kv"])
    return [Tensor(name, tuple(ne), kind) for name, ne, kind in found["tensors"]], facts, found["mixes"]


def run_length(text: str) -> list[str]:
    return list(chain.from_iterable([kind] * int(times) for kind, _, times in (word.partition("*") for word in text.split())))


def theirs(choice: Choice) -> str:
    """The type in llama-quantize, which does not help a tensor without importance data."""
    return choice.why.removeprefix("no importance data for ") if choice.why.startswith("no importance") else choice.type


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
def test_every_tensor_has_the_type_that_llama_quantize_gives_it(model: str, name: str, imatrix: bool) -> None:
    tensors, facts, mixes = golden(model)
    wanted = mixes[f"{name}+imatrix" if imatrix else name]
    wanted = mixes[wanted["same_as"]] if "same_as" in wanted else wanted
    if "error" in wanted:
        with pytest.raises(UsageError, match=name):
            choose(name, tensors, facts, imatrix=imatrix)
        return
    choices = choose(name, tensors, facts, imatrix=imatrix)
    types = [theirs(choice) for choice in choices]
    assert types == run_length(wanted["types"])
    size = sum(type_bytes(kind, tensor.ne) for kind, tensor in zip(types, tensors, strict=True))
    elements = sum(math.prod(tensor.ne) for tensor in tensors)
    assert abs(size / 2**20 - wanted["mib"]) <= 0.0051
    assert abs(size * 8 / elements - wanted["bpw"]) <= 0.0051
    assert sum(choice.why.startswith("fallback") for choice in choices) == wanted["fallbacks"]
    helped = sum(theirs(choice) != choice.type for choice in choices)
    assert sum(choice.needs_imatrix for choice in choices) + helped == wanted["needs_imatrix"]


def test_all_file_types_of_the_dry_runs_are_in_the_table_once() -> None:
    assert len(TABLE) == len(MIXES) == 35
    assert {name.removesuffix("+imatrix") for name in golden("GLM-4.5")[2]} == set(MIXES)
    assert len({mix.id for mix in TABLE}) == 35


@pytest.mark.parametrize(("name", "number"), [("q4_k_m", 15), ("Q4_K", 15), ("q5_k", 17), ("Q3_k", 12), ("mxfp4_moe", 38), ("f32", 0)])
def test_file_types_are_found_in_any_case(name: str, number: int) -> None:
    assert mix_named(name).id == number


def test_an_unknown_file_type_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'Q4_K_X'.*Q4_K_M.*IQ2_XXS"):
        mix_named("Q4_K_X")
    assert set(ALIASES.values()) <= set(MIXES)


@pytest.mark.parametrize("model", ["GLM-4.5-Air", "GLM-4.7-Flash", "GLM-5"])
@pytest.mark.parametrize(("name", "instead"), [("Q2_K_S", "Q3_K"), ("IQ3_XXS", "Q3_K"), ("IQ2_M", "Q2_K"), ("IQ1_S", "Q2_K")])
def test_only_the_mtp_layer_gets_types_that_need_no_importance_data(model: str, name: str, instead: str) -> None:
    tensors, facts, _ = golden(model)
    choices = dict(zip(tensors, choose(name, tensors, facts, imatrix=True), strict=True))
    mtp = f"blk.{facts.layers - 1}."
    helped = {tensor: choice for tensor, choice in choices.items() if theirs(choice) != choice.type}
    assert helped
    assert all(tensor.name.startswith(mtp) for tensor in helped)
    assert not any(choice.needs_imatrix for tensor, choice in choices.items() if tensor.name.startswith(mtp))
    assert instead in {choice.type for choice in helped.values()}
    assert all(BLOCKS[choice.type][1] > BLOCKS[theirs(choice)][1] for choice in helped.values())
    assert any(choice.needs_imatrix for choice in choices.values())


def test_an_mtp_layer_with_importance_data_is_as_any_other() -> None:
    tensors, facts, _ = golden("GLM-4.5")
    choices = choose("IQ2_M", tensors, facts, imatrix=True, entries={tensor.name for tensor in tensors})
    assert all(theirs(choice) == choice.type for choice in choices)


def layers(number: int, *names: str, ne: tuple[int, ...] = (256, 256)) -> list[Tensor]:
    return [Tensor(f"blk.{layer}.{name}.weight", ne, "BF16") for layer in range(number) for name in names]


def types_of(file_type: str, tensors: list[Tensor], facts: Facts, **options: object) -> str:
    chosen = choose(file_type, tensors, facts, **options)
    return " ".join(f"{kind}*{len(list(same))}" for kind, same in groupby(choice.type for choice in chosen))


DENSE = Facts("glm4", 8, heads=4, kv_heads=4)


def test_an_override_leaves_the_tensor_out_of_the_count() -> None:
    tensors = layers(8, "attn_v")
    assert types_of("Q4_K_S", tensors, DENSE) == "Q5_K*4 Q4_K*4"
    assert types_of("Q4_K_S", tensors, DENSE, overrides=[(r"BLK\.[01]\.", "q6_k")]) == "Q6_K*2 Q5_K*4 Q4_K*2"


def test_the_first_override_decides_and_rows_that_do_not_divide_still_fall_back() -> None:
    choices = choose("Q4_K_M", layers(1, "ffn_up", "ffn_gate", ne=(96, 8)), DENSE, overrides=[("up", "Q6_K"), ("ffn", "IQ3_S"), ("gate", "Q8_0")])
    assert [(choice.type, choice.why) for choice in choices] == [("Q8_0", "fallback from Q6_K"), ("IQ4_NL", "fallback from IQ3_S")]


def test_embedding_and_output_have_options_of_their_own_and_pure_drops_the_rest_of_the_mix() -> None:
    tensors = [Tensor("output.weight", (256, 9), "BF16"), Tensor("token_embd.weight", (256, 9), "BF16"), *layers(2, "ffn_down")]
    assert types_of("Q4_K_M", tensors, DENSE) == "Q6_K*1 Q4_K*1 Q6_K*1 Q4_K*1"
    assert types_of("Q4_K_M", tensors, DENSE, pure=True, output_tensor_type="f16") == "F16*1 Q4_K*3"
    assert types_of("bf16", tensors, DENSE, token_embedding_type="Q8_0") == "BF16*1 Q8_0*1 BF16*2"


def test_a_tied_embedding_has_the_type_of_the_output() -> None:
    tied = [Tensor("token_embd.weight", (256, 9), "BF16")]
    assert types_of("Q4_K_M", tied, DENSE) == "Q6_K*1"
    assert types_of("Q4_K_M", tied, DENSE, output_tensor_type="q8_0") == "Q8_0*1"
    assert types_of("Q4_K_M", tied, DENSE, output_tensor_type="q8_0", overrides=[("embd", "F16")]) == "F16*1"


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ2_XS"])
def test_an_output_whose_rows_do_not_divide_has_8_bits(file_type: str) -> None:
    assert types_of(file_type, [Tensor("output.weight", (96, 9), "BF16")], DENSE) == "Q8_0*1"


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"overrides": [("(", "Q8_0")]}, "regular expression"),
        ({"overrides": [("ffn", "Q9_K")]}, "Q9_K"),
        ({"token_embedding_type": "none"}, "none"),
        ({"output_tensor_type": "Q4_K_M"}, "Q4_K_M"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict, what: str) -> None:
    with pytest.raises(UsageError, match=what):
        choose("Q4_K_M", layers(1, "ffn_up"), DENSE, **options)


def test_a_float_file_refuses_types_of_single_tensors() -> None:
    with pytest.raises(UsageError, match="BF16"):
        choose("BF16", layers(1, "ffn_up"), DENSE, overrides=[("ffn", "Q8_0")])


def test_rows_that_no_block_divides_become_f16() -> None:
    assert types_of("Q4_K_M", layers(1, "ffn_up", ne=(100, 8)), DENSE) == "F16*1"
    assert types_of("Q8_0", layers(1, "ffn_up", ne=(100, 8)), DENSE) == "F16*1"


@pytest.mark.parametrize(
    ("file_type", "types"),
    [("Q4_K_M", "Q8_0*2 Q5_K*1"), ("Q3_K_L", "Q8_0*2 Q3_K*1"), ("IQ2_XS", "Q4_K*2 Q5_K*1"), ("Q8_0", "Q8_0*3")],
)
def test_eight_experts_switch_on_the_rules_for_mixtral(file_type: str, types: str) -> None:
    assert types_of(file_type, layers(1, "attn_k", "attn_v", "attn_output"), Facts("glm4moe", 8, experts=8, heads=4, kv_heads=4)) == types


def test_eight_experts_give_more_layers_of_an_iq3_m_file_4_bits() -> None:
    counted = {experts: types_of("IQ3_M", layers(16, "ffn_down_exps"), Facts("glm4moe", 16, experts=experts)) for experts in (8, 16)}
    assert counted == {8: "Q4_K*2 IQ3_S*2 Q4_K*1 IQ3_S*2 Q4_K*1 IQ3_S*2 Q4_K*1 IQ3_S*2 Q4_K*3", 16: "Q4_K*2 IQ3_S*14"}


def test_glm_5_3_flash_keeps_what_selects_and_decays() -> None:
    facts = Facts("glm5-next", 8, 1, 288, 64, 0)
    names = ("attn_k_b", "indexer.proj", "indexer_compressor_gate", "ssm_f_a", "hc_attn_fn", "attn_q_a", "nextn.eh_proj", "attn_q")
    choices = choose("Q4_K_M", layers(1, *names), facts)
    assert [choice.why for choice in choices] == ["kept"] * 5 + ["rule"] * 2 + ["base"]
    assert [choice.type for choice in choices] == ["BF16"] * 5 + ["Q8_0"] * 2 + ["Q4_K"]
