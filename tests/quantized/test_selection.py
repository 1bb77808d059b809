"""What is quantized, what stays and why, and at which parallel sizes the result can be served: on the published models' own shapes."""

from __future__ import annotations

import pytest

from glmconv.archs import bind, preset_named
from glmconv.archs.spec import Role
from glmconv.codecs import CODECS, codec_of
from glmconv.errors import CapacityError, UsageError
from glmconv.formats.selection import QuantOptions, Selection, partners, select
from glmconv.formats.serving import Parallel, problem, serving

GLM, AIR = "glm4.5-355B-A32B", "glm4.5-106B-A12B"


def model_of(preset: str):
    spec, found = preset_named(preset)
    return bind(spec, found.config, aliases=True)


@pytest.fixture(scope="module")
def models():
    return {preset: model_of(preset) for preset in (GLM, AIR)}


def chosen(model, codec: str, **options: object) -> Selection:
    return select(model, model.tensors, codec_of(codec), QuantOptions(**options))  # type: ignore[arg-type]


def sizes_that_work(model, codec: str, role: Role, part: str = "", expert: int = 1) -> list[int]:
    grid = codec_of(codec).grid
    tensors = [t for t in model.tensors.values() if t.role is role and part in t.name]
    return [ranks for ranks in (1, 2, 4, 8, 16) if not any(problem(t, model, grid, Parallel(ranks, expert)) for t in tensors)]


def test_glm_4_5_is_quantized_whole_in_blocks(models):
    found = chosen(models[GLM], "fp8")
    linear = {t.name for t in models[GLM].tensors.values() if t.role in (Role.LINEAR, Role.EXPERT)}
    assert found.encoded == linear
    assert found.notes == ()
    routers = [f"model.layers.{layer}.mlp.gate" for layer in range(3, 93)]
    mtp = ["model.layers.92.eh_proj", "model.layers.92.shared_head.head"]
    assert found.kept == tuple(sorted(["lm_head", *routers, *mtp]))


def test_airs_dense_layer_stays_and_the_run_says_why(models):
    found = chosen(models[AIR], "fp8")
    left = {t.name for t in models[AIR].tensors.values() if t.role in (Role.LINEAR, Role.EXPERT)} - found.encoded
    assert left == {f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert any("10,944" in note and "128" in note for note in found.notes)
    assert chosen(models[AIR], "fp8", ragged=True).encoded > found.encoded
    assert {"model.layers.0.mlp.down_proj", "model.layers.0.mlp.gate_proj"} <= set(found.kept)
    assert chosen(models[AIR], "fp8:channel").notes == ()


def test_groups_that_do_not_divide_are_left_or_refused_with_those_that_do(models):
    found = chosen(models[AIR], "awq:g128")
    assert {t.name for t in models[AIR].tensors.values() if t.role is Role.LINEAR} - found.encoded == {"model.layers.0.mlp.down_proj.weight"}
    with pytest.raises(CapacityError, match="64, 32"):
        chosen(models[AIR], "awq:g128", serve_tp=2)
    with pytest.raises(CapacityError, match="128, 64, 32"):
        chosen(models[AIR], "int4:g96")
    for tensor_parallel, group in ((1, 128), (2, 64), (4, 32)):
        assert chosen(models[AIR], "int4:auto", serve_tp=tensor_parallel).codec.name == f"int4:g{group}:sym"
    with pytest.raises(CapacityError):
        chosen(models[AIR], "int4:auto", serve_tp=8)
    assert chosen(models[AIR], "int4:auto", serve_tp=8, serve_ep=8).codec.name == "int4:g128:sym"


def test_shared_experts_stay_where_eight_ranks_could_not_split_them(models):
    found = chosen(models[GLM], "fp8", serve_tp=8, serve_ep=8)
    assert not any("shared_experts" in name for name in found.encoded)
    assert any(".mlp.experts." in name for name in found.encoded)
    assert any("model.layers.0.mlp." in name for name in found.encoded)
    assert any("1,536" in note and "/ 8" in note for note in found.notes)


@pytest.mark.parametrize(
    ("preset", "codec", "role", "part", "works"),
    [
        (GLM, "fp8", Role.EXPERT, "", [1, 2, 4]),
        (GLM, "fp8", Role.LINEAR, "shared_experts", [1, 2, 4]),
        (GLM, "fp8", Role.LINEAR, "layers.0.mlp", [1, 2, 4, 8, 16]),
        (GLM, "fp8", Role.LINEAR, "self_attn", [1, 2, 4, 8, 16]),
        (AIR, "fp8", Role.EXPERT, "", [1]),
        (AIR, "fp8", Role.LINEAR, "layers.0.mlp", []),
        (GLM, "awq:g128", Role.EXPERT, "down", [1, 2, 4]),
        (GLM, "awq:g64", Role.EXPERT, "down", [1, 2, 4, 8]),
        (GLM, "awq:g32", Role.EXPERT, "down", [1, 2, 4, 8, 16]),
        (AIR, "int4:g128", Role.EXPERT, "down", [1]),
        (AIR, "int4:g64", Role.EXPERT, "down", [1, 2]),
        (AIR, "int4:g32", Role.EXPERT, "down", [1, 2, 4]),
        (AIR, "int4:g64", Role.LINEAR, "layers.0.mlp.down", [1]),
        (GLM, "fp8:channel", Role.EXPERT, "", [1, 2, 4, 8, 16]),
    ],
)
def test_the_sizes_that_work_are_those_of_the_engines_checks(preset, codec, role, part, works, models):
    assert sizes_that_work(models[preset], codec, role, part) == works


def test_expert_parallelism_keeps_experts_whole(models):
    assert sizes_that_work(models[GLM], "fp8", Role.EXPERT, expert=8) == [1, 2, 4, 8, 16]


def test_the_memory_of_a_rank_is_its_share(models):
    model = models[GLM]
    sizes = {name: 2 * t.elements for name, t in model.tensors.items()}
    one, two, four, *_ = serving(model, sizes, lambda name: None, 1)
    assert one.bytes_per_rank == sum(sizes.values())
    assert one.bytes_per_rank / 2 < two.bytes_per_rank < one.bytes_per_rank * 0.51
    assert four.bytes_per_rank < two.bytes_per_rank


def test_partners_are_never_parted(models):
    model = models[GLM]
    for keep in (r"layers\.7\..*\.k_proj", r"layers\.7\.mlp\.experts\.31\.up", r"layers\.1\.mlp\.gate_proj", r"shared_experts\.up"):
        found = chosen(model, "fp8", keep=(keep,))
        by_group: dict[object, set[bool]] = {}
        for tensor in model.tensors.values():
            if tensor.role in (Role.LINEAR, Role.EXPERT):
                by_group.setdefault(partners(tensor), set()).add(tensor.name in found.encoded)
        assert all(len(states) == 1 for states in by_group.values())
        assert {False} in by_group.values()
        assert found.notes == ()
    left = chosen(model, "fp8", keep=(r"layers\.7\.mlp\.experts\.31\.up",))
    assert sum("layers.7.mlp.experts." in name for name in left.kept) == 3 * 160
    assert chosen(model, "fp8", keep=(r"layers\.7\..*\.k_proj",)).kept.count("model.layers.7.self_attn.q_proj") == 1


def test_first_and_last_layers_stay_and_the_mtp_layer_is_not_counted(models):
    found = chosen(models[GLM], "fp8", first=2, last=3)
    layers = {int(name.split(".")[2]) for name in found.encoded}
    assert layers == set(range(2, 89)) | {92}


def test_a_target_in_which_nothing_would_be_quantized_is_refused(models):
    with pytest.raises(CapacityError, match="not one weight"):
        chosen(models[GLM], "fp8", keep=(".",))


def test_a_wrong_expression_is_a_usage_error(models):
    with pytest.raises(UsageError, match="no regular expression"):
        chosen(models[GLM], "fp8", keep=("(",))


@pytest.mark.parametrize(
    "text", ["fp8:x", "fp8:channel:ue8m0", "fp8:0x64", "mxfp8:g16", "awq:g7", "awq:sym", "int4:g0", "int4:g128:up", "fp8:channel:64x64", "fp8:"]
)
def test_an_option_that_a_codec_has_not_is_a_usage_error(text):
    with pytest.raises(UsageError):
        codec_of(text)


@pytest.mark.parametrize(
    "text", ["fp8", "fp8:ue8m0", "fp8:cuda-compat", "fp8:64x64", "fp8:channel", "fp8:tensor", "mxfp8", "awq:g32", "int4:g64:asym", "int4:g128:sym"]
)
def test_a_codecs_name_is_its_spelling(text):
    assert codec_of(text).name == text
    assert text.partition(":")[0] in CODECS
