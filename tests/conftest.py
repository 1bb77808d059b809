"""What several rooms' tests stand on: the command line run in this process, and toys made once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # before the Hub's client is imported: no test may reach out

from glmconv import convert
from glmconv.archs import SPECS, preset_named
from glmconv.cli import execute
from glmconv.toy.build import ToyOptions, build

ONE_OF_EACH = (*tuple(spec.presets[0].name for spec in SPECS.values() if spec.model_type != "glm_moe_dsa"), "glm5.2-744B-A40B")
IN_MEGATRON = tuple(name for name in ONE_OF_EACH if preset_named(name)[0].dialects)
TINY = ToyOptions(layers=2, experts=4, scale=Fraction(1, 64), file_size=200_000)
EACH = ToyOptions(layers=4, experts=4, scale=Fraction(1, 64), file_size=300_000)  # every kind of layer of every architecture
SMALL = ToyOptions(layers=4, experts=16, scale=Fraction(1, 32), file_size=2_000_000)


@dataclass(frozen=True)
class Answer:
    """How a command line ended and what it said."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """The lines on stderr that name an error."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


Glmconv = Callable[..., Answer]
Toy = Callable[..., Path]


@pytest.fixture
def glmconv(capfd: pytest.CaptureFixture[str]) -> Glmconv:
    """`glmconv(*arguments)` runs a command line in this process. Whatever it was told, it shows no traceback."""

    def call(*arguments: object) -> Answer:
        capfd.readouterr()
        code = execute([str(argument) for argument in arguments])
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Answer(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """`toy(preset, options)`: a toy's folder, made once a session. Nobody writes into it: tests that break something copy it first."""
    made: dict[tuple[str, ToyOptions], Path] = {}

    def find(preset: str, options: ToyOptions = SMALL) -> Path:
        if (preset, options) not in made:
            path = tmp_path_factory.mktemp("toys") / preset
            build(preset, path, options)
            made[preset, options] = path
        return made[preset, options]

    return find


@pytest.fixture(scope="session")
def tiny(toy: Toy) -> Path:
    """A GLM-4.5 of a few hundred kilobytes in several shards: for what is done to many copies."""
    return toy("glm4.5-355B-A32B", TINY)


@pytest.fixture(scope="session")
def torch_dist(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """`torch_dist(preset)`: the toy's conversion, made once a session. Nobody writes into it."""
    made: dict[str, Path] = {}

    def find(preset: str) -> Path:
        if preset not in made:
            made[preset] = tmp_path_factory.mktemp("torch_dist") / preset
            convert(toy(preset), {"torch_dist": made[preset]})
        return made[preset]

    return find


@pytest.fixture(scope="session")
def back(torch_dist: Toy, tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """`back(preset)`: the toy's conversion converted back, made once a session. Nobody writes into it."""
    made: dict[str, Path] = {}

    def find(preset: str) -> Path:
        if preset not in made:
            made[preset] = tmp_path_factory.mktemp("back") / preset
            convert(torch_dist(preset), {"hf": made[preset]})
        return made[preset]

    return find
