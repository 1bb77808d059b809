"""Hugging Face to torch_dist and back, on toys of every preset: the same files, byte for byte, however the way there was cut."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch.distributed.checkpoint import FileSystemReader

from glmconv import Options, convert, open_checkpoint, verify
from tests.conftest import SMALL, TINY
from tests.roundtrip.shards import INDEX, Surgery, contents, copied, home, load, marks, release

PRESETS = ("glm4.5-355B-A32B", "glm4.5-106B-A12B", "glm4.6-355B-A32B", "glm4.7-355B-A32B")
ALIASES = ("model.layers.4.embed_tokens.weight", "model.layers.4.shared_head.head.weight")
BIAS = "model.layers.{}.mlp.gate.e_score_correction_bias"
ONE_FILE = replace(SMALL, file_size=None)


def tensors(path: Path) -> set[str]:
    """The tensors that are stored in a Hugging Face folder's files."""
    return {name for file in path.glob("*.safetensors") for name in load(file)}


def stored_dtypes(path: Path) -> dict[str, str]:
    """Key -> dtype of a torch_dist folder, by torch's own reader."""
    state = FileSystemReader(path / "release").read_metadata().state_dict_metadata
    return {key: str(entry.properties.dtype) for key, entry in state.items() if hasattr(entry, "properties")}


# There and back


@pytest.mark.parametrize("preset", PRESETS)
def test_every_file_of_a_release_comes_back_byte_for_byte(preset, toy, back):
    source = toy(preset)
    assert len(list(source.glob("*.safetensors"))) >= 4
    assert (source / INDEX).exists()
    assert ("mtp.safetensors" in release(source)) == (preset[:6] in ("glm4.6", "glm4.7"))
    assert release(back(preset)) == release(source)


@pytest.mark.parametrize("preset", PRESETS)
def test_torch_dist_comes_back_byte_for_byte_from_its_release(preset, torch_dist, back, tmp_path):
    convert(back(preset), {"torch_dist": tmp_path / "again"})
    assert contents(tmp_path / "again") == contents(torch_dist(preset))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_release_in_one_file_has_no_index_but_for_an_mtp_file(preset, toy, tmp_path):
    source = toy(preset, ONE_FILE)
    apart = preset[:6] in ("glm4.6", "glm4.7")
    weights = {"model-00001-of-00001.safetensors", "mtp.safetensors"} if apart else {"model.safetensors"}
    assert {path.name for path in source.glob("*.safetensors")} == weights
    assert (source / INDEX).exists() == apart
    convert(source, {"torch_dist": tmp_path / "there"})
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    assert release(tmp_path / "back") == release(source)


@pytest.mark.parametrize("preset", PRESETS)
def test_copies_of_embedding_and_head_are_kept_where_the_release_has_them(preset, back):
    found = {name for name in tensors(back(preset)) if name.endswith(("embed_tokens.weight", "head.weight"))}
    aliases = set(ALIASES) if preset.startswith("glm4.5") else set()
    assert found == {"model.embed_tokens.weight", "lm_head.weight"} | aliases


@pytest.mark.parametrize("chunk_size", [500, 4096, 100_000])
def test_cutting_tensors_into_small_chunks_changes_no_weight(chunk_size, toy, tmp_path):
    source = toy("glm4.6-355B-A32B", TINY)
    convert(source, {"torch_dist": tmp_path / "there"}, options=Options(chunk_size=chunk_size, file_size=150_000))
    state = FileSystemReader(tmp_path / "there" / "release").read_metadata().state_dict_metadata
    cut = [key for key, entry in state.items() if hasattr(entry, "chunks") and len({tuple(c.offsets) for c in entry.chunks}) > 1]
    assert "embedding.word_embeddings.weight" in cut
    assert len(list((tmp_path / "there" / "release").glob("*.distcp"))) > 3
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    assert release(tmp_path / "back") == release(source)
    assert verify(source, tmp_path / "there").same


def test_a_release_without_its_layout_gets_shards_of_the_size_asked_for(toy, torch_dist, tmp_path):
    preset = "glm4.5-355B-A32B"
    convert(torch_dist(preset), {"hf": tmp_path / "back"}, options=Options(file_size=1_000_000))
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > len(list(toy(preset).glob("*.safetensors")))
    assert verify(toy(preset), tmp_path / "back").same
    convert(tmp_path / "back", {"hf": tmp_path / "as before"}, options=Options(file_size=2_000_000))
    assert release(tmp_path / "as before") == release(toy(preset))


def test_an_iteration_is_written_under_its_number_and_read_from_any_of_its_paths(toy, tmp_path):
    source = toy("glm4.5-355B-A32B", TINY)
    convert(source, {"torch_dist": tmp_path / "there"}, options=Options(iteration=37))
    assert (tmp_path / "there" / "latest_checkpointed_iteration.txt").read_text() == "37"
    assert verify(source, tmp_path / "there").same
    assert verify(source, tmp_path / "there" / "iter_0000037").same


def test_a_files_metadata_come_back_in_their_order(toy, tmp_path):
    source = copied(toy("glm4.5-355B-A32B", TINY), tmp_path / "source")
    for path in source.glob("*.safetensors"):
        raw = path.read_bytes()
        begin = 8 + int.from_bytes(raw[:8], "little")
        header = json.dumps({**json.loads(raw[8:begin]), "__metadata__": {"z": "last", "format": "pt", "a": "first"}}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[begin:])
    convert(source, {"torch_dist": tmp_path / "there"})
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    assert release(tmp_path / "back") == release(source)


def test_two_folders_of_one_iteration_are_not_guessed_between(toy, tmp_path, glmconv):
    convert(toy("glm4.5-355B-A32B", TINY), {"torch_dist": tmp_path / "there"}, options=Options(iteration=37))
    shutil.copytree(tmp_path / "there" / "iter_0000037", tmp_path / "there" / "iter_37")
    answer = glmconv("inspect", tmp_path / "there")
    assert answer.code == 5
    assert "is the same iteration as" in answer.err
    assert glmconv("inspect", tmp_path / "there" / "iter_37").code == 0


# MTP left out


def no_mtp(path: Path) -> bool:
    """Whether a Hugging Face folder neither holds MTP tensors nor says that it does."""
    config = json.loads((path / "config.json").read_bytes())
    layer = f"model.layers.{config['num_hidden_layers']}."
    indexed = set(json.loads((path / INDEX).read_bytes())["weight_map"]) if (path / INDEX).exists() else tensors(path)
    return config["num_nextn_predict_layers"] == 0 and indexed == tensors(path) and not any(name.startswith(layer) for name in indexed)


@pytest.mark.parametrize("preset", PRESETS)
def test_mtp_dropped_on_the_way_there_is_gone_from_config_and_weights(preset, toy, tmp_path):
    convert(toy(preset), {"torch_dist": tmp_path / "there"}, options=Options(mtp=False))
    assert not any(key.startswith("mtp.") for key in stored_dtypes(tmp_path / "there"))
    assert json.loads((tmp_path / "there/glmconv_origin/config.json").read_bytes())["num_nextn_predict_layers"] == 0
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    assert no_mtp(tmp_path / "back")
    assert not no_mtp(toy(preset))


def test_an_index_counts_no_parameters_that_were_dropped(toy, tmp_path):
    source = copied(toy("glm4.6-355B-A32B", TINY), tmp_path / "source")  # as transformers writes an index
    index = json.loads((source / INDEX).read_bytes())
    index["metadata"]["total_parameters"] = 12345
    (source / INDEX).write_text(json.dumps(index))
    for mtp in (True, False):
        convert(source, {"torch_dist": tmp_path / f"there {mtp}", "hf": tmp_path / f"hf {mtp}"}, options=Options(mtp=mtp))
        convert(tmp_path / f"there {mtp}", {"hf": tmp_path / f"back {mtp}"})
        for path in (tmp_path / f"hf {mtp}", tmp_path / f"back {mtp}"):
            assert ("total_parameters" in json.loads((path / INDEX).read_bytes())["metadata"]) == mtp


@pytest.mark.parametrize("preset", PRESETS)
def test_mtp_dropped_on_either_way_gives_the_same_release(preset, toy, torch_dist, tmp_path):
    convert(torch_dist(preset), {"hf": tmp_path / "dropped back"}, options=Options(mtp=False))
    convert(toy(preset), {"torch_dist": tmp_path / "there"}, options=Options(mtp=False))
    convert(tmp_path / "there", {"hf": tmp_path / "dropped there"})
    convert(toy(preset), {"hf": tmp_path / "dropped here"}, options=Options(mtp=False))
    assert no_mtp(tmp_path / "dropped back")
    assert release(tmp_path / "dropped back") == release(tmp_path / "dropped there") == release(tmp_path / "dropped here")
    kept = tensors(tmp_path / "dropped back")
    assert kept == {name for name in tensors(toy(preset)) if not name.startswith("model.layers.4.")}


def test_what_is_left_without_mtp_is_what_was_there(toy, tmp_path, glmconv):
    source = toy("glm4.5-355B-A32B")
    convert(source, {"torch_dist": tmp_path / "there"}, options=Options(mtp=False))
    assert glmconv("verify", source, tmp_path / "there").code == 1
    assert glmconv("verify", source, tmp_path / "there", "--mtp", "drop").code == 0


# The same bytes, whatever the machine


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_any_number_of_workers_gives_the_same_bytes(to, toy, torch_dist, tmp_path):
    preset = "glm4.5-106B-A12B"
    source = torch_dist(preset) if to == "hf" else toy(preset)
    for workers in (1, 2, 8):
        convert(source, {to: tmp_path / str(workers)}, options=Options(workers=workers, file_size=500_000))
    first = contents(tmp_path / "1")
    assert len(first) > 15
    assert first == contents(tmp_path / "2") == contents(tmp_path / "8")


def test_little_memory_another_folder_and_another_name_give_the_same_bytes(toy, tmp_path, monkeypatch):
    source = toy("glm4.5-355B-A32B")
    convert(source, {"torch_dist": tmp_path / "first"})
    (tmp_path / "copy").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    convert("copy", {"torch_dist": "second"}, options=Options(workers=1, max_memory=4 << 30))
    assert contents(tmp_path / "second") == contents(tmp_path / "first")


def test_several_targets_at_once_are_each_as_if_alone(toy, torch_dist, tmp_path, glmconv):
    preset = "glm4.6-355B-A32B"
    targets = (f"--to=torch_dist={tmp_path / 'there'}", f"--to=hf={tmp_path / 'copy'}")
    assert glmconv("convert", toy(preset), *targets, "--verify", "full").code == 0
    assert contents(tmp_path / "there") == contents(torch_dist(preset))
    assert release(tmp_path / "copy") == release(toy(preset))


def test_the_same_call_again_writes_nothing(toy, tmp_path):
    source = toy("glm4.5-355B-A32B", TINY)
    convert(source, {"torch_dist": tmp_path / "there"})
    before = marks(tmp_path)
    again = convert(source, {"torch_dist": tmp_path / "there"})
    assert [outcome.already_done for outcome in again.outcomes] == [True]
    assert marks(tmp_path) == before


# The router's bias


def test_the_routers_bias_is_stored_in_float32_and_not_rounded(toy, torch_dist):
    preset = "glm4.5-355B-A32B"
    with open_checkpoint(toy(preset)) as source, open_checkpoint(torch_dist(preset)) as there:
        for layer in (3, 4):
            bias, stored = source[BIAS.format(layer)].read(), there[BIAS.format(layer)].read()
            assert bias.dtype == stored.dtype
            assert (bias.bfloat16().float() != bias).any(), "this bias would survive rounding"
            assert bias.numpy().tobytes() == stored.numpy().tobytes()
    dtypes = {key: dtype for key, dtype in stored_dtypes(torch_dist(preset)).items() if key.endswith("expert_bias")}
    assert set(dtypes.values()) == {"torch.float32"}
    assert len(dtypes) == 2
    assert set(stored_dtypes(torch_dist(preset)).values()) == {"torch.float32", "torch.bfloat16"}


def test_a_routers_bias_in_bfloat16_is_widened(toy, tmp_path):
    source = copied(toy("glm4.5-355B-A32B", TINY), tmp_path / "source")
    name = BIAS.format(1)
    work = Surgery.at(source, name)
    stored = work.tensors[name]
    halves = b"".join(stored.data[at + 2 : at + 4] for at in range(0, len(stored.data), 4))
    stored.dtype, stored.data = "BF16", halves
    work.close()
    convert(source, {"torch_dist": tmp_path / "there"})
    assert stored_dtypes(tmp_path / "there")["decoder.layers.1.mlp.router.expert_bias"] == "torch.float32"
    assert verify(source, tmp_path / "there").same
    convert(tmp_path / "there", {"hf": tmp_path / "back"})
    widened = load(home(tmp_path / "back", name))[name]
    assert widened.dtype == "F32"
    assert widened.data == b"".join(b"\0\0" + halves[at : at + 2] for at in range(0, len(halves), 2))


# Copies that are none


@pytest.mark.parametrize("alias", ["model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"])
def test_a_copy_that_differs_is_refused_and_nothing_is_finished(alias, toy, tmp_path, glmconv):
    source = copied(toy("glm4.5-355B-A32B", TINY), tmp_path / "source")
    work = Surgery.at(source, alias)
    stored = work.tensors[alias]
    stored.data = stored.data[:-1] + bytes([stored.data[-1] ^ 1])
    work.close()
    answer = glmconv("convert", source, tmp_path / "there", "--to", "torch_dist")
    assert answer.code == 5
    assert alias in answer.err
    names = contents(tmp_path / "there")
    assert not [name for name in names if name.endswith((".metadata", "metadata.json", ".txt", "common.pt", "manifest.json"))]
    assert glmconv("inspect", tmp_path / "there").code == 5
    assert glmconv("verify", tmp_path / "there").code == 5


def test_a_copy_that_differs_is_kept_where_there_is_a_place_for_it(toy, tmp_path):
    source = copied(toy("glm4.5-355B-A32B", TINY), tmp_path / "source")
    alias = "model.layers.2.embed_tokens.weight"
    work = Surgery.at(source, alias)
    work.tensors[alias].data = bytes(len(work.tensors[alias].data))
    work.close()
    convert(source, {"hf": tmp_path / "copy"})
    assert load(home(tmp_path / "copy", alias)) == load(work.file)
