"""torch_dist as other Megatron versions and specs spell it, saved here by torch itself: every variant reads as the same canonical tensors."""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from glmconv.checkpoint import Checkpoint, open_checkpoint
from glmconv.convert import convert
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.megatron_keys import megatron_tensors
from glmconv.toy.build import ToyOptions, build

State = dict[str, object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A toy with three layers, the last of them MoE, and an MTP layer."""
    from fractions import Fraction

    path = tmp_path_factory.mktemp("variants") / "hf"
    build("glm4.6-355B-A32B", path, ToyOptions(layers=3, experts=16, scale=Fraction(1, 64)))
    return open_checkpoint(path)


def megatron_state(source: Checkpoint) -> State:
    """Key -> global tensor, as Megatron-Core with Transformer Engine names them."""
    state: State = {}
    for key, stored in megatron_tensors(source.arch, "te").items():
        first = source[stored.tiles[0].tensor]
        whole = torch.empty((stored.rows, *stored.tail), dtype=getattr(torch, first.dtype.name))
        for tile in stored.tiles:
            whole[tile.target : tile.target + tile.rows] = source[tile.tensor].read(slice(tile.source, tile.source + tile.rows))
        state[key] = whole.view(stored.shape)
    return state


def saved(state: State, folder: Path, source: Checkpoint, *, origin: bool = True) -> Path:
    """Save with torch's own checkpoint writer, with the release's config beside the weights."""
    iteration = folder / "iter_00000012"
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(dict(state), storage_writer=dcp.FileSystemWriter(iteration), planner=planner, no_dist=True)
    (iteration / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    (folder / "latest_checkpointed_iteration.txt").write_text("12\n")
    if origin:
        shutil.copy(source.path / "config.json", folder / "config.json")
    return folder


def in_memory(value: object) -> io.BytesIO:
    out = io.BytesIO()
    torch.save(value, out)
    return out


def tensor(state: State, key: str) -> torch.Tensor:
    value = state[key]
    assert isinstance(value, torch.Tensor)
    return value


def mtp_model_layer(state: State) -> State:
    return {key.replace(".transformer_layer.", ".mtp_model_layer."): value for key, value in state.items()}


def local_naming(state: State) -> State:
    return {key.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"): value for key, value in state.items()}


def padded(state: State) -> State:
    rows = tensor(state, "output_layer.weight").shape[0]
    more = {key: torch.nn.functional.pad(tensor(state, key), (0, 0, 0, -rows % 128 + 128), value=float("nan")) for key in VOCABULARY}
    return state | more


def trained(state: State) -> State:
    extra: State = {"optimizer.state.exp_avg." + key: torch.zeros(7) for key in state}
    return (
        state
        | extra
        | {"chained_0.optimizer.param": torch.zeros(3), "rng_state/shard_0_1": [1], "decoder.final_layernorm._extra_state/shard_0_1": [2]}
    )


def stacked_attention(state: State) -> State:
    """Layers stacked where every layer has the tensor, as a homogeneous run saves them."""
    out = {key: value for key, value in state.items() if ".self_attention." not in key or not key.startswith("decoder.layers.")}
    for key in [key for key in state if key.startswith("decoder.layers.0.self_attention.")]:
        rest = key.removeprefix("decoder.layers.0.")
        out["decoder.layers." + rest] = torch.stack([tensor(state, f"decoder.layers.{layer}.{rest}") for layer in range(3)])
    return out


VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
VARIANTS: dict[str, Callable[[State], State]] = {
    "as it is": dict,
    "mtp_model_layer": mtp_model_layer,
    "local naming": local_naming,
    "padded vocabulary": padded,
    "with optimizer state": trained,
    "stacked layers": stacked_attention,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_reads_as_the_same_tensors(name: str, source: Checkpoint, tmp_path: Path) -> None:
    folder = saved(VARIANTS[name](megatron_state(source)), tmp_path / "td", source)
    with open_checkpoint(folder) as found:
        assert set(found.tensors) == set(source.tensors)
        for key, lazy in source:
            assert found[key].dtype == lazy.dtype
            assert torch.equal(found[key].read().view(torch.uint8), lazy.read().view(torch.uint8)), key


@pytest.mark.parametrize("inside", [False, True])
def test_without_a_config_it_is_rebuilt_from_the_runs_arguments(inside: bool, source: Checkpoint, tmp_path: Path) -> None:
    written = tmp_path / "ours"
    convert(source.path, {"torch_dist": written})
    common = torch.load(written / "release" / "common.pt", weights_only=False)
    assert isinstance(common["args"], argparse.Namespace)
    state = megatron_state(source)
    if inside:
        state["common_state/shard_0_1"] = [common]
    folder = saved(state, tmp_path / "td", source, origin=False)
    if not inside:
        (folder / "iter_00000012" / "common.pt").write_bytes(in_memory(common).getvalue())
    with open_checkpoint(folder) as found:
        assert set(found.tensors) == set(source.tensors)
        fields = ("hidden_size", "num_hidden_layers", "n_routed_experts", "first_k_dense_replace", "rope_theta", "rms_norm_eps", "use_qk_norm")
        assert {field: found.config[field] for field in fields} == {field: source.config[field] for field in fields}
        assert any("rebuilt" in note for note in found.opened.notes)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float32"])
def test_a_rebuilt_config_says_the_dtype_that_the_weights_have(name: str, source: Checkpoint, tmp_path: Path) -> None:
    state = {key: value.to(getattr(torch, name)) for key, value in megatron_state(source).items() if isinstance(value, torch.Tensor)}
    folder = saved(state, tmp_path / "run", source, origin=False)
    convert(source.path, {"torch_dist": tmp_path / "ours"})
    shutil.copy(tmp_path / "ours" / "release" / "common.pt", folder / "iter_00000012")
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config["torch_dtype"] == checkpoint["lm_head.weight"].dtype.name == name


def test_with_neither_config_nor_arguments_it_asks_for_the_origin(source: Checkpoint, tmp_path: Path) -> None:
    folder = saved(megatron_state(source), tmp_path / "td", source, origin=False)
    with pytest.raises(SourceError, match="--origin"):
        open_checkpoint(folder)
    with open_checkpoint(folder, origin=source.path) as found:
        assert set(found.tensors) == set(source.tensors)


@pytest.mark.parametrize("key", ["decoder.layers.2.mlp.router.weight", "mtp.layers.0.eh_proj.weight"])
def test_a_missing_key_is_named_in_canonical_words(key: str, source: Checkpoint, tmp_path: Path) -> None:
    state = megatron_state(source)
    del state[key]
    with pytest.raises(SourceError, match="is missing"):
        open_checkpoint(saved(state, tmp_path / "td", source))


def test_an_unknown_key_is_not_lost_silently(source: Checkpoint, tmp_path: Path) -> None:
    state = megatron_state(source) | {"decoder.layers.0.mlp.something.weight": torch.zeros(3)}
    with pytest.raises(SourceError, match="something"):
        open_checkpoint(saved(state, tmp_path / "td", source))


def test_another_backend_is_refused(source: Checkpoint, tmp_path: Path) -> None:
    folder = saved(megatron_state(source), tmp_path / "td", source)
    (folder / "iter_00000012" / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 1}')
    with pytest.raises(UnsupportedError, match="zarr"):
        open_checkpoint(folder)
