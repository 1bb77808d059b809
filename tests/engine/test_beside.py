"""Outputs that are files: they lie beside a folder of their own, and nothing else there is touched or read."""

from __future__ import annotations

from pathlib import Path

import pytest

from glmconv.check.verify import verify_output
from glmconv.engine.files import Disk
from glmconv.engine.journal import MANIFEST, checked_name, folder_of_file
from glmconv.engine.preflight import Target, is_finished
from glmconv.engine.run import run
from glmconv.errors import DestinationError, SourceError
from tests.engine.made import CHUNK, MadeSource, expected, file_plan


def written(root: Path, label: str = "made", *, overwrite: bool = False) -> Target:
    target = Target(file_plan(label), root)
    run([target], MadeSource(), workers=1, chunk_size=CHUNK, overwrite=overwrite)
    return target


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return folder_of_file(tmp_path / "made.gguf")


def test_the_files_lie_beside_their_folder_and_are_what_they_should_be(root: Path) -> None:
    (root.parent / "other.gguf").write_bytes(b"somebody else's")
    target = written(root)
    for name, content in expected(target.plan, MadeSource()).items():
        assert (root / name).resolve().read_bytes() == content
    assert sorted(path.name for path in root.parent.iterdir()) == ["made-0.gguf", "made-1.gguf", "made.gguf.glmconv", "other.gguf"]
    assert is_finished(target, Disk())
    assert verify_output(root).same
    (root.parent / "made-1.gguf").write_bytes(b"short")
    assert not is_finished(target, Disk())
    assert not verify_output(root).same


def test_a_file_that_is_there_is_not_replaced_but_moved_aside_if_asked(root: Path) -> None:
    (root.parent / "made-0.gguf").write_bytes(b"mine")
    with pytest.raises(DestinationError, match="is there already"):
        written(root)
    assert not root.exists()
    written(root, overwrite=True)
    assert (root.parent / "made-0.gguf.bak-1").read_bytes() == b"mine"
    written(root, "new", overwrite=True)
    assert verify_output(root).same
    assert (root.parent / "made-0.gguf.bak-2").exists()
    assert (root.with_name(root.name + ".bak-1") / MANIFEST).exists()


ELSEWHERE = ["../../etc/passwd", "../other.gguf", "../", "../..", "../made.gguf.glmconv", "../made/x", "../made\\x", "..", "../ma\nde"]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_a_name_that_leads_elsewhere_is_refused(name: str, root: Path) -> None:
    with pytest.raises(SourceError, match="is not a name"):
        checked_name(name, root)


@pytest.mark.parametrize("folder", ["made", ".glmconv", "made.gguf"])
def test_only_the_folder_of_a_file_has_files_beside_it(folder: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is not a name"):
        checked_name("../made.gguf", tmp_path / folder)
