"""Whole GGUF files are llama.cpp's own: each is held against what `make interop` wrote down of the converter's and llama-quantize's results."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmconv import convert
from glmconv.engine.inputs import InputFolder
from glmconv.formats.gguf_header import padded, read_header
from tests.gguf.interop.digests import Content, content, differences
from tests.gguf.interop.fixtures import ALL, FIXTURES, QUANTIZED, build, digest
from tests.gguf.interop.ours import AIDED, importance_file, stored, written

AIDED_FIXTURES = [name for name, fixture in FIXTURES.items() if fixture.importance]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """`source(name)`: a fixture's folder, made once."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp("sources"))
        return made[name]

    return find


def check(name: str, found: dict[str, Content], suffix: str = "") -> None:
    golden = stored(name)
    digests = {file_type + suffix: held.digest() for file_type, held in found.items()}
    assert digests == {key: value for key, value in golden["files"].items() if key in digests}
    for held in found.values():
        assert held.listed() == golden["metadata"]


@pytest.mark.parametrize("name", FIXTURES)
def test_a_source_is_the_one_that_llama_cpp_was_given(name, source):
    assert digest(source(name)) == stored(name)["source"]


@pytest.mark.parametrize("name", FIXTURES)
def test_every_file_type_is_what_llama_cpps_two_steps_make(name, source, tmp_path):
    check(name, written(name, source(name), tmp_path, FIXTURES[name].types))


@pytest.mark.parametrize("name", AIDED_FIXTURES)
def test_with_an_importance_matrix_too(name, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the path of the matrix is recorded as it was given
    plain = written(name, source(name), tmp_path, ("F16",))["F16"]
    check(name, written(name, source(name), tmp_path, FIXTURES[name].importance, importance_file(name, plain, tmp_path)), AIDED)


def test_what_is_stored_covers_every_architecture_and_file_type():
    assert set(ALL) <= {file_type for fixture in FIXTURES.values() for file_type in fixture.types}
    for architecture in ("glm4_moe", "glm4v_moe", "glm4_moe_lite", "glm_moe_dsa", "glm4", "glm5_next"):
        wanted = {*ALL, *(kind + AIDED for kind in QUANTIZED)}
        assert stored(architecture)["files"].keys() == wanted
    for name, fixture in FIXTURES.items():
        assert stored(name)["files"].keys() == {*fixture.types, *(kind + AIDED for kind in fixture.importance)}


def test_a_flipped_bit_or_a_lost_key_is_seen(source, tmp_path):
    path = tmp_path / "model.gguf"
    convert(source("glm5_next"), {"gguf:Q8_0": path})
    whole = content(path)
    changed = bytearray(path.read_bytes())
    changed[-100] ^= 1
    (tmp_path / "changed.gguf").write_bytes(changed)
    said = list(differences(content(tmp_path / "changed.gguf"), whole))
    assert len(said) == 1
    assert said[0].startswith("tensor blk.5.")
    assert next(differences(whole.without({"general.name"}), whole)).startswith("key general.name is only in theirs")
    assert whole.without({"general.name"}).digest()["metadata"] != whole.digest()["metadata"]
    with InputFolder(tmp_path) as folder:
        tensors = read_header(folder.open(path.name)).tensors.values()
    changed[next(tensor.offset + tensor.size for tensor in tensors if padded(tensor.size) > tensor.size)] = 1
    (tmp_path / "changed.gguf").write_bytes(changed)
    with pytest.raises(ValueError, match="not padded with zeros"):
        content(tmp_path / "changed.gguf")
