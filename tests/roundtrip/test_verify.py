"""`glmconv verify` finds what is wrong: one bit of a tensor, a tensor too few or too many, one bit anywhere in an output."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from glmconv import convert, strict_json, verify_same
from glmconv.engine.journal import sealed
from tests.roundtrip.shards import MANIFEST, Stored, Surgery, contents, copied, load, reindexed, save

SEED = int(os.environ.get("GLMCONV_SEED", "20250808"))
FLIPS = 10_000 if os.environ.get("GLMCONV_SOAK") else 200
GATE = "model.layers.1.mlp.experts.{}.gate_proj.weight"
NORM = "model.norm.weight"
NAN = b"\xc0\x7f"


@pytest.fixture(scope="module")
def outputs(tiny, tmp_path_factory):
    """Finished outputs of both formats; tests copy them before they break them."""
    root = tmp_path_factory.mktemp("outputs")
    convert(tiny, {"torch_dist": root / "torch_dist", "hf": root / "hf"})
    return {"torch_dist": root / "torch_dist", "hf": root / "hf"}


# Two checkpoints


def flip(work: Surgery) -> None:
    stored = work.tensors[GATE.format(2)]
    stored.data = stored.data[:301] + bytes([stored.data[301] ^ 4]) + stored.data[302:]


def zero(work: Surgery) -> None:
    stored = work.tensors[GATE.format(2)]
    stored.data = bytes(len(stored.data))


def swap(work: Surgery) -> None:
    one, other = (work.tensors[GATE.format(n)] for n in (1, 2))
    one.data, other.data = other.data, one.data


def poison(work: Surgery) -> None:
    stored = work.tensors[GATE.format(2)]
    stored.data = NAN + stored.data[2:]


def negate_zero(work: Surgery) -> None:
    """-0.0 == 0.0, but the bits are others."""
    stored = work.tensors[GATE.format(2)]
    stored.data = b"\x00\x80" + stored.data[2:]


def lose(work: Surgery) -> None:
    del work.tensors[GATE.format(2)]


def transpose(work: Surgery) -> None:
    stored = work.tensors[GATE.format(2)]
    stored.shape = stored.shape[::-1]


def retype(work: Surgery) -> None:
    work.tensors[GATE.format(2)].dtype = "F16"


def broken(source: Path, target: Path, change: Callable[[Surgery], None]) -> Path:
    """A copy whose expert 2 of layer 1 is not what it was."""
    copied(source, target)
    work = Surgery.at(target, GATE.format(2))
    change(work)
    work.close()
    reindexed(target)
    return target


@pytest.mark.parametrize("other", ["hf", "torch_dist"])
@pytest.mark.parametrize("change", [flip, zero, swap, poison, negate_zero, lose, transpose, retype])
def test_a_change_of_one_tensor_is_found_and_named(change, other, tiny, outputs, tmp_path, glmconv):
    source = tiny
    if change is negate_zero:  # a zero to begin with
        source = broken(tiny, tmp_path / "zero", zero)
        convert(source, {"hf": tmp_path / "hf", "torch_dist": tmp_path / "torch_dist"})
        outputs = {name: tmp_path / name for name in outputs}
    changed = broken(source, tmp_path / "changed", change)
    for a, b in ((changed, outputs[other]), (outputs[other], changed)):
        answer = glmconv("verify", a, b)
        assert answer.code == 1
        assert GATE.format(2) in answer.out
        assert (GATE.format(1) in answer.out) == (change is swap)


@pytest.mark.parametrize("other", ["hf", "torch_dist"])
def test_a_tensor_too_many_is_found_and_named(other, tiny, outputs, tmp_path, glmconv):
    changed = copied(tiny, tmp_path / "changed")
    work = Surgery.at(changed, NORM)
    work.tensors["model.extra.weight"] = Stored("BF16", [4], bytes(8))
    work.close()
    reindexed(changed)
    for a, b in ((changed, outputs[other]), (outputs[other], changed)):
        answer = glmconv("verify", a, b)
        assert answer.code == 1
        assert "model.extra.weight" in answer.out


def test_the_same_nan_on_both_sides_is_no_difference(tiny, tmp_path):
    poisoned = broken(tiny, tmp_path / "poisoned", poison)
    convert(poisoned, {"torch_dist": tmp_path / "there"})
    assert verify_same(poisoned, tmp_path / "there").same
    assert not verify_same(tiny, tmp_path / "there").same


def test_a_nan_on_one_side_is_the_worst_difference(tiny, outputs, tmp_path):
    def both(work: Surgery) -> None:
        flip(work)
        other = work.tensors[GATE.format(1)]
        other.data = NAN + other.data[2:]

    result = verify_same(broken(tiny, tmp_path / "changed", both), outputs["torch_dist"])
    assert [(d.tensor, d.elements) for d in result.worst] == [(GATE.format(1), 1), (GATE.format(2), 1)]


def test_json_has_no_infinity(tiny, outputs, tmp_path, glmconv):
    answer = glmconv("verify", tiny, broken(outputs["hf"], tmp_path / "poisoned", poison), "--json")
    (worst,) = strict_json.parse(answer.out.encode(), file="stdout")["worst"]  # Python's own parser takes Infinity
    assert (answer.code, worst["worst"], worst["elements"]) == (1, None, 1)


def test_the_same_tensors_in_other_shards_and_another_order_are_no_difference(tiny, outputs, tmp_path):
    target = copied(tiny, tmp_path / "one file")
    tensors = {name: stored for file in sorted(target.glob("*.safetensors")) for name, stored in load(file).items()}
    for file in target.glob("*.safetensors"):
        file.unlink()
    (target / "model.safetensors.index.json").unlink()
    save(target / "model.safetensors", dict(sorted(tensors.items())))
    for other in (tiny, outputs["torch_dist"]):
        result = verify_same(target, other)
        assert result.same
        assert result.tensors == len(tensors)


# One output and its manifest


def flipped(path: Path, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_one_flipped_bit_anywhere_is_found(to, outputs, tmp_path, glmconv):
    root = shutil.copytree(outputs[to], tmp_path / "output", ignore=shutil.ignore_patterns(".glmconv"))
    files = sorted(contents(root))
    large = [name for name in files if name.endswith((".safetensors", ".distcp"))]
    assert MANIFEST in files
    assert len(files) > 8
    draw = random.Random(SEED)
    for number in range(FLIPS):
        name = draw.choice(large if number % 2 else files)
        bit = draw.randrange((root / name).stat().st_size * 8)
        flipped(root / name, bit)
        answer = glmconv("verify", root)
        assert answer.code == 1, f"seed {SEED}: bit {bit} of {name} was not found"
        assert name in answer.out
        flipped(root / name, bit)
    assert glmconv("verify", root).code == 0


@pytest.mark.parametrize("to", ["hf", "torch_dist"])
def test_every_file_that_is_missing_cut_or_longer_is_found(to, outputs, tmp_path, glmconv):
    root = shutil.copytree(outputs[to], tmp_path / "output", ignore=shutil.ignore_patterns(".glmconv"))
    for name, data in contents(root).items():
        for damaged in (None, data[:-1], data + b"\0", b""):
            (root / name).unlink()
            if damaged is not None:
                (root / name).write_bytes(damaged)
            answer = glmconv("verify", root)
            assert answer.code == (5 if damaged is None and name == MANIFEST else 1), name
            assert name == MANIFEST or name in answer.out
            (root / name).write_bytes(data)
    assert glmconv("verify", root).code == 0


@pytest.mark.parametrize(
    ("to", "name"), [("hf", "model-00009-of-00009.safetensors"), ("torch_dist", "release/__9_0.distcp"), ("torch_dist", "model.safetensors")]
)
def test_a_weight_file_too_many_is_found(to, name, outputs, tmp_path, glmconv):
    root = shutil.copytree(outputs[to], tmp_path / "output", ignore=shutil.ignore_patterns(".glmconv"))
    (root / name).write_bytes(b"x")
    answer = glmconv("verify", root)
    assert answer.code == 1
    assert name in answer.out


def test_a_manifest_that_names_an_unknown_dtype_is_a_finding(outputs, tmp_path, glmconv):
    root = shutil.copytree(outputs["hf"], tmp_path / "output", ignore=shutil.ignore_patterns(".glmconv"))
    document = json.loads((root / MANIFEST).read_bytes())
    del document["digest"]
    document["tensors"][NORM]["dtype"] = "float7"
    (root / MANIFEST).write_bytes(sealed(document))
    flipped(root / document["tensors"][NORM]["file"], 8 * document["tensors"][NORM]["offset"])
    answer = glmconv("verify", root)
    assert (answer.code, answer.err) == (1, "")
    assert NORM in answer.out


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("config.json")], ids=["pipe", "folder", "link"])
def test_something_else_in_the_manifests_place_is_found(make, outputs, tmp_path, glmconv):
    root = shutil.copytree(outputs["hf"], tmp_path / "output", ignore=shutil.ignore_patterns(".glmconv"))
    (root / MANIFEST).unlink()
    make(root / MANIFEST)
    answer = glmconv("verify", root)
    assert (answer.code, answer.err) == (1, "")
    assert f"{MANIFEST}: cannot be read" in answer.out


def test_a_link_in_a_files_place_is_found(outputs, tmp_path, glmconv):
    root = shutil.copytree(outputs["hf"], tmp_path / "output", ignore=shutil.ignore_patterns(".glmconv"))
    (root / "config.json").rename(tmp_path / "elsewhere")
    (root / "config.json").symlink_to(tmp_path / "elsewhere")
    answer = glmconv("verify", root)
    assert answer.code == 1
    assert "config.json" in answer.out


def test_a_release_that_glmconv_did_not_write_has_no_manifest_to_hold(tiny, tmp_path, glmconv):
    answer = glmconv("verify", copied(tiny, tmp_path / "release"))
    assert answer.code == 5
    assert answer.out == ""
    assert len(answer.errors) == 1
