"""The documents' command lines: drop-ins run in this process, or by a shell in a folder like the documents', on toys under their folders' names."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

from glmconv import convert, open_checkpoint
from glmconv.toy.build import ToyOptions
from tests.conftest import Answer, Toy

ROOT = Path(__file__).parent.parent.parent
COMPAT = ROOT / "compat"
SMALL = ToyOptions(layers=4, experts=4, scale=Fraction(1, 64), file_size=300_000)
WIDE = ToyOptions(layers=4, experts=2, scale=Fraction(1, 16), file_size=8_000_000)  # wide enough for blocks of 128 and groups of 32
FOLDERS = {  # the documents' name of a release's folder -> its preset here
    "GLM-4.5-355B-A32B": "glm4.5-355B-A32B",
    "GLM-4.7-355B-A32B": "glm4.7-355B-A32B",
    "GLM-4.5-106B-A12B": "glm4.5-106B-A12B",
}

Dropin = Callable[..., Answer]


def loaded(script: Path) -> ModuleType:
    """A drop-in as a module; its folder and that of `dropin` are on the path while it is imported."""
    name = "compat_" + "_".join(script.relative_to(COMPAT).with_suffix("").parts)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec
        assert spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        sys.path[:0] = [str(COMPAT / "tools"), str(script.parent)]
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path[:] = [path for path in sys.path if not path.startswith(str(COMPAT))]
    return sys.modules[name]


@pytest.fixture
def dropin(capfd: pytest.CaptureFixture[str]) -> Dropin:
    """`dropin("tools/x.py", *arguments)` runs a script's command line in this process. Whatever it was told, it shows no traceback."""

    def call(script: str, *arguments: object) -> Answer:
        module = loaded(COMPAT / script)
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            sys.modules["dropin"].finish(lambda: module.main([str(argument) for argument in arguments]))
        said = capfd.readouterr()
        assert "Traceback" not in said.err
        return Answer(int(left.value.code or 0), said.out, said.err)

    return call


@pytest.fixture
def base_dir(toy: Toy, tmp_path: Path) -> Path:
    """$BASE_DIR of the documents: a release's folder under each of their names."""
    base = tmp_path / "base"
    base.mkdir()
    for folder, preset in FOLDERS.items():
        (base / folder).symlink_to(toy(preset, SMALL))
    return base


@pytest.fixture
def work(base_dir: Path, tmp_path: Path) -> Path:
    """The working folder: the drop-ins where the documents have them, and MODEL_ARGS of the toys instead of the releases'."""
    folder = tmp_path / "work"
    (folder / "scripts/models").mkdir(parents=True)
    for name in ("tools", "examples", "src"):
        (folder / name).symlink_to(COMPAT / name)
    (folder / "scripts/conversion").symlink_to(COMPAT / "scripts/conversion")
    written = runpy.run_path(str(COMPAT / "scripts/models/write.py"))["script"]
    for name, preset in FOLDERS.items():
        with open_checkpoint(base_dir / name) as checkpoint:
            (folder / f"scripts/models/{preset}.sh").write_text(written(name, checkpoint.config))
    return folder


@pytest.fixture
def shell(work: Path, base_dir: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`shell(text, NAME=value)` runs a document's lines as they stand there, by bash, in the working folder."""

    def run(text: str, **variables: object) -> subprocess.CompletedProcess[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "PATH": path, "BASE_DIR": str(base_dir), "OMP_NUM_THREADS": "1", **{k: str(v) for k, v in variables.items()}}
        return subprocess.run(["bash", "-euc", text], cwd=work, env=environment, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture(scope="session")
def wide(toy: Toy) -> Path:
    """A release that is wide enough to be quantized."""
    return toy("glm4.7-355B-A32B", WIDE)


@pytest.fixture(scope="session")
def wide_fp8(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its FP8 release, with a scale for each row, as GLM-4.7-FP8 is."""
    there = tmp_path_factory.mktemp("fp8") / "GLM-4.7-FP8"
    convert(wide, {"fp8:channel": there})
    return there
