"""The simulated disk is believed because it answers as the real one does, and forgets what it may forget."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.engine.files import Disk
from tests.engine.aftermath import OUTCOMES
from tests.engine.simulated import Fault, PowerLoss, SimulatedDisk

OUT = Path("/sim/out")
NAMES = ("x", "y", "folder", "folder/x", "folder/y", "gone/x")
STEPS = st.one_of(
    st.tuples(st.sampled_from(["mkdir", "create", "unlink", "read", "sync_folder", "status", "names"]), st.sampled_from(NAMES)),
    st.tuples(st.sampled_from(["link", "rename", "rename_noreplace"]), st.sampled_from(NAMES), st.sampled_from(NAMES)),
)


def answer(disk: Disk, root: Path, step: tuple[str, ...]) -> object:
    """What one step gives: a value, or the error's class and number."""
    paths = [root / name for name in step[1:]]
    try:
        match step[0]:
            case "create":
                fd = disk.create(paths[0])
                disk.write(fd, step[1].encode() * 3, 2)
                disk.sync(fd)
                return disk.close(fd)
            case "read":
                fd = disk.open(paths[0])
                out = bytearray(64)
                got = disk.read_into(fd, memoryview(out), 1)
                return disk.close(fd), bytes(out[:got])
            case "status":
                found = disk.status(paths[0])
                return found.folder, found.regular, (found.size, found.links) if found.regular else None
            case kind:
                return getattr(disk, kind)(*paths)
    except OSError as error:
        return type(error), error.errno


@settings(max_examples=150, deadline=None)
@given(steps=st.lists(STEPS, max_size=25))
def test_the_simulated_disk_answers_as_the_real_one(tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, ...]]) -> None:
    real, simulated, root = Disk(), SimulatedDisk(), tmp_path_factory.mktemp("real")
    simulated.mkdir(OUT)
    for step in steps:
        assert answer(simulated, OUT, step) == answer(real, root, step), step


def written(disk: SimulatedDisk, path: Path, content: bytes, *, sync: bool) -> None:
    fd = disk.create(path)
    disk.write(fd, content, 0)
    if sync:
        disk.sync(fd)
    disk.close(fd)


def test_a_power_loss_takes_names_whose_folder_was_not_synced() -> None:
    disk = SimulatedDisk()
    disk.mkdir(OUT)
    disk.sync_folder(OUT.parent)
    written(disk, OUT / "kept", b"kept", sync=True)
    disk.sync_folder(OUT)
    written(disk, OUT / "gone", b"gone", sync=True)
    left = disk.after_power_loss(random.Random(0), "everything lost")
    assert left.listing(OUT) == ["kept"]
    assert left.content(OUT / "kept") == b"kept"
    assert disk.listing(OUT) == ["gone", "kept"]


def test_a_durable_name_may_lead_to_data_that_is_not_there() -> None:
    disk = SimulatedDisk()
    written(disk, Path("/sim/file"), b"x" * 2000, sync=False)
    disk.sync_folder(Path("/sim"))
    found = {disk.after_power_loss(random.Random(seed), outcome).content(Path("/sim/file")) for seed in range(30) for outcome in OUTCOMES}
    assert {b"", b"\0" * 2000, b"x" * 2000} <= found
    assert any(content and 0 < content.count(b"x") < 2000 for content in found)


def test_a_rename_is_there_whole_or_not_at_all() -> None:
    disk = SimulatedDisk()
    disk.mkdir(OUT)
    disk.sync_folder(OUT.parent)
    written(disk, OUT / "old", b"old", sync=True)
    written(disk, OUT / "new", b"new", sync=True)
    disk.sync_folder(OUT)
    disk.rename(OUT / "new", OUT / "old")
    found = {tuple(disk.after_power_loss(random.Random(seed), "any of it").listing(OUT)) for seed in range(50)}
    assert found == {("new", "old"), ("old",)}


def test_a_sync_after_a_failed_one_says_yes_and_keeps_nothing() -> None:
    disk = SimulatedDisk()
    disk.faults = (Fault(frozenset({"sync"})),)
    fd = disk.create(Path("/sim/file"))
    disk.write(fd, b"data", 0)
    with pytest.raises(OSError, match="sync"):
        disk.sync(fd)
    disk.sync(fd)
    disk.sync_folder(Path("/sim"))
    assert disk.content(Path("/sim/file")) == b"data"
    assert disk.after_power_loss(random.Random(0), "names kept, data lost").content(Path("/sim/file")) == b""


def test_after_a_power_loss_no_operation_is_possible() -> None:
    disk = SimulatedDisk()
    disk.crash_at = 1
    disk.mkdir(OUT)
    for _ in range(2):
        with pytest.raises(PowerLoss):
            disk.unlink(OUT)
    with pytest.raises(PowerLoss):
        disk.names(OUT)
    assert disk.listing(OUT.parent) == ["out"]


def test_a_killed_process_leaves_what_is_not_durable_at_risk() -> None:
    disk = SimulatedDisk()
    written(disk, Path("/sim/file"), b"data", sync=True)
    next_process = disk.after_kill()
    assert next_process.content(Path("/sim/file")) == b"data"
    assert next_process.after_power_loss(random.Random(0), "everything lost").content(Path("/sim/file")) is None
    next_process.sync_folder(Path("/sim"))
    assert next_process.after_power_loss(random.Random(0), "everything lost").content(Path("/sim/file")) == b"data"
    assert disk.after_power_loss(random.Random(0), "everything lost").content(Path("/sim/file")) is None
