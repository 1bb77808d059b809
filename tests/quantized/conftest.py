"""One model and its conversions, each made once a session. Nobody writes into them: tests that break something copy first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from glmconv import convert
from tests.quantized.models import saved_model

Made = Callable[[str], Path]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_model(tmp_path_factory.mktemp("models") / "source")


@pytest.fixture(scope="session")
def made(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(target)`: the model's conversion."""
    root = tmp_path_factory.mktemp("made")

    def make(target: str) -> Path:
        path = root / target.replace(":", "-")
        if not path.exists():
            convert(source, {target: path})
        return path

    return make
