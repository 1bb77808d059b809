"""One session of the ranks for all tests here, whichever of pytest-xdist's workers asks first."""

from __future__ import annotations

import fcntl
import os

import pytest

from tests.megatron.session import Made, found, make


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "megatron"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            make(Made(folder))
            (folder / "made").touch()
    return Made(folder, found(folder))
