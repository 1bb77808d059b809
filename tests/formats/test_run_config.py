"""Megatron-Bridge's run_config.yaml, and YAML from strangers."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmconv.engine.inputs import InputFolder
from glmconv.errors import SourceError
from glmconv.formats.run_config import plain_yaml, read_run_config


def read(folder: Path, content: bytes):
    (folder / "run_config.yaml").write_bytes(content)
    with InputFolder(folder) as opened:
        return read_run_config(opened.open("run_config.yaml"), folder / "run_config.yaml")


def test_the_models_plain_values_are_read_and_tags_are_not_looked_up(tmp_path):
    found = read(tmp_path, b"model:\n  num_layers: 4\n  dtype: !!python/object/apply:os.system [id]\n  1: x\ntrain: {a: 1}\n")
    assert found == {"num_layers": 4, "dtype": None, "1": "x"}


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"model: &m {a: 1}\nother: *m\n", "uses aliases"), (b"model: " + b"[" * 40 + b"]" * 40, "nested too deeply"),
     (b"model: {", "is not plain YAML"),
     (b"\xff\xfe\x00", "is not plain YAML"), (b"train: {}", "has no `model` mapping"), (b"model: {a: 2026-13-45}", "is not plain YAML"),
     (b"a: 1\n---\nb: 2\n", "is not plain YAML")],
)  # fmt: skip
def test_anything_else_is_a_source_error(tmp_path, content, said):
    with pytest.raises(SourceError, match=said):
        read(tmp_path, content)


def test_yaml_of_any_shape_is_plain_values():
    assert plain_yaml("- a\n- 1\n", "card") == ["a", 1]
