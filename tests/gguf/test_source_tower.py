"""A language model's GGUF with its tower's file beside it is the whole model again."""

from __future__ import annotations

import json

import pytest
import torch

from glmconv import Options, convert, open_checkpoint, verify
from glmconv.formats.gguf_types import Array, Entry
from tests.conftest import EACH
from tests.gguf.rewritten import changed, with_source
from tests.loading import logits
from tests.roundtrip.shards import release

TOWERS = ("glm4.5v-108B-A12B", "glm5.3-flash-321B")


@pytest.fixture(scope="module")
def files(toy, tmp_path_factory):
    """`files(preset)`: (the release, its language model, its tower), made once."""
    root, made = tmp_path_factory.mktemp("towers"), {}

    def find(preset):
        if preset not in made:
            made[preset] = toy(preset, EACH), root / f"{preset}.gguf", root / f"mmproj-{preset}.gguf"
            convert(made[preset][0], {"gguf:BF16": made[preset][1], "gguf:mmproj-BF16": made[preset][2]})
        return made[preset]

    return find


@pytest.mark.parametrize("preset", TOWERS)
def test_every_tensor_of_the_tower_comes_back(preset, files, glmconv, tmp_path):
    source, text, tower = files(preset)
    answer = glmconv("convert", text, tmp_path / "back", "--to", "hf", "--mmproj", tower)
    assert answer.code == 0, answer.err
    with open_checkpoint(source) as before, open_checkpoint(tmp_path / "back") as after:
        assert set(before.tensors) == set(after.tensors)
        for name, tensor in after:
            if not name.endswith("A_log"):
                assert torch.equal(tensor.read(), before[name].read()), name
    first, second = (json.loads((folder / "config.json").read_bytes()) for folder in (source, tmp_path / "back"))
    assert second["vision_config"] == first["vision_config"]
    assert second == first
    answer = glmconv("verify", source, text, "--mmproj", tower)
    assert "were not compared" not in answer.err
    assert glmconv("inspect", text, "--mmproj", tower).code == 0


def test_transformers_gives_the_same_logits_and_every_file_comes_back_with_what_rides_along(files, tmp_path):
    source, text, tower = files(TOWERS[0])
    with open_checkpoint(text, mmproj=tower) as opened:
        assert not opened.opened.apart
    convert(text, {"hf": tmp_path / "back"}, options=options(tower))
    assert torch.equal(logits(tmp_path / "back"), logits(source))
    convert(with_source(text, source, tmp_path / "whole.gguf"), {"hf": tmp_path / "whole"}, options=options(tower))
    assert release(tmp_path / "whole") == release(source)
    assert verify(source, tmp_path / "whole").same


@pytest.mark.parametrize("preset", TOWERS)
def test_every_bit_comes_back_from_a_file_that_was_written_with_its_source_inside(preset, files, tmp_path):
    source, _, tower = files(preset)
    convert(source, {"gguf:F32": tmp_path / "inside.gguf"}, options=Options(embed_source=True))
    convert(tmp_path / "inside.gguf", {"hf": tmp_path / "back"}, options=options(tower))
    assert release(tmp_path / "back") == release(source)


@pytest.mark.parametrize("change", [lambda bits: [*bits[1:], bits[0] ^ 64], lambda bits: bits[1:], lambda bits: []])
def test_numbers_that_ride_along_are_held_against_the_files_own(change, files, glmconv, tmp_path):
    source, _, tower = files("glm5.3-flash-321B")
    convert(source, {"gguf:F32": tmp_path / "inside.gguf"}, options=Options(embed_source=True))

    def spoil(entries, tensors):
        at = next(n for n, entry in enumerate(entries) if entry.key.startswith("glmconv.original."))
        entries[at] = entries[at]._replace(value=Array(entries[at].value.kind, change(list(entries[at].value.values))))

    answer = glmconv("convert", changed(tmp_path / "inside.gguf", tmp_path / "bad.gguf", spoil), tmp_path / "out", "--to", "hf", "--mmproj", tower)
    assert answer.code == 5
    assert "is not what the tensor was made of" in answer.err
    assert not (tmp_path / "out").exists()


def options(tower):
    return Options(mmproj=str(tower))


def cut(name):
    return lambda entries, tensors: tensors.pop(name)


def renamed(entries, tensors):
    tensors["v.what.weight"] = tensors["v.post_ln.weight"]


def other(key, value):
    def change(entries, tensors):
        at = next(n for n, entry in enumerate(entries) if entry.key == key)
        entries[at] = Entry(key, entries[at].kind, value)

    return change


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        (cut("v.blk.1.ln1.weight"), 5, "v.blk.1.ln1.weight: is missing"),
        (renamed, 5, "v.what.weight"),
        (other("general.architecture", "glm4moe"), 5, "no mmproj file"),
        (other("clip.projector_type", "llava"), 6, "llava"),
        (other("clip.projector_type", "glm5v"), 5, "glm5_next"),
        (other("clip.vision.block_count", 2**31), 5, "depth"),
        (other("clip.vision.embedding_length", 48), 5, ""),
    ],
)
def test_a_tower_that_does_not_fit_is_refused(change, code, says, files, glmconv, tmp_path):
    _, text, tower = files(TOWERS[0])
    path = changed(tower, tmp_path / "mmproj.gguf", change)
    answer = glmconv("convert", text, tmp_path / "out", "--to", "hf", "--mmproj", path)
    assert (answer.code, len(answer.errors)) == (code, 1), answer.err
    assert says in answer.err
    assert not (tmp_path / "out").exists()


def test_a_tower_alone_or_a_text_for_a_tower_is_refused(files, glmconv):
    _, text, tower = files(TOWERS[0])
    assert glmconv("inspect", tower).code == 6
    assert glmconv("inspect", text, "--mmproj", text).code == 5
