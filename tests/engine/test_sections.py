"""A file in sections: where it is cut, what is kept of it, and what in its way is refused."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmconv.check.verify import verify_output
from glmconv.engine.files import Disk
from glmconv.engine.journal import MANIFEST, Layout, folder_of_file
from glmconv.engine.plan import OutputFile, Piece, Run, in_sections, parts_of, placed
from glmconv.engine.preflight import preflight
from glmconv.engine.run import Outcome, Target, run
from glmconv.errors import DestinationError, Interrupted, SourceError
from tests.engine.made import CHUNK, ROW, MadeSource, expected, halves, piece, sectioned_plan


class Counting(Disk):
    """The real disk; counts bytes that are written in place."""

    def __init__(self) -> None:
        self.bytes = 0
        self.shared: set[int] = set()

    def open_shared(self, path: Path) -> int:
        fd = super().open_shared(path)
        self.shared.add(fd)
        return fd

    def close(self, fd: int) -> None:
        self.shared.discard(fd)
        super().close(fd)

    def write(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        self.bytes += len(data) if fd in self.shared else 0
        return super().write(fd, data, offset)


class Sparse(Disk):
    """A filesystem that cannot reserve room."""

    def allocate(self, fd: int, size: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target(sectioned_plan(), folder_of_file(tmp_path / "made.gguf"))


def written(target: Target, source: MadeSource | None = None, **options: object) -> Outcome:
    return run([target], source or MadeSource(), workers=options.pop("workers", 2), chunk_size=CHUNK, **options)[0]  # type: ignore[arg-type]


def right(target: Target) -> bool:
    wanted = expected(target.plan, MadeSource())
    return verify_output(target.root).same and all((target.root / name).resolve().read_bytes() == content for name, content in wanted.items())


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12), limit=st.integers(1, 90), header=st.integers(0, 50))
def test_sections_tile_the_file_and_are_about_as_large_as_asked_for_where_pieces_allow(sizes, limit, header):
    pieces: list[Piece] = []
    for number, size in enumerate(sizes):
        pieces.append(Piece(str(number), "uint8", (size,), size, (Run("a", 0, 1),)))
        pieces.append(Piece(f"behind {number}", "uint8", (1,), 1, literal=b"\0"))
    file = in_sections("f", b"h" * header, pieces, limit)
    parts = parts_of([file])
    assert [p for part in parts for p in part.pieces] == pieces
    assert [at for part in parts for at in placed(part)] == list(placed(file))
    assert sum(part.size for part in parts) == file.size
    assert (len(parts) == 1) == (not file.cuts)
    for part in parts:
        assert part.size - 1 <= limit or sum(bool(p.runs) for p in part.pieces) == 1 or part.header
        assert part.pieces[0].runs


def test_pieces_of_one_encoder_stay_together():
    file = in_sections("f", b"", (*halves("a", Run("a", 0, 10)), *halves("b", Run("b", 0, 10)), piece("c", Run("c", 0, 1))), ROW)
    assert [[p.name for p in part.pieces] for part in file.sections] == [["a.0", "a.1"], ["b.0", "b.1"], ["c"]]


def test_the_plan_is_the_same_however_the_file_is_cut():
    plan = sectioned_plan()
    large = plan.files[1]
    assert OutputFile(large.name, large.header, large.pieces).digest == large.digest


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("disk", [Disk, Sparse])
def test_it_is_written_by_any_number_of_workers_with_and_without_reserved_room(workers, disk, target):
    outcome = written(target, workers=workers, disk=disk())
    assert (outcome.files_written, outcome.files_kept, outcome.bytes_written) == (3, 0, target.plan.size)
    assert right(target)
    assert not list(Layout(target.root, target.plan.id).staging.iterdir())


def test_only_what_was_open_is_written_again(target):
    source, stop, done = MadeSource(), threading.Event(), list[int]()

    def progress(count: int) -> None:
        done.append(count)
        if sum(done) > target.plan.size // 2:
            stop.set()

    with pytest.raises(Interrupted):
        written(target, source, workers=1, stop=stop, progress=progress)
    assert not target.outside[1].exists()
    assert preflight([target], source_root=None, disk=Disk()) < target.plan.size  # its room is reserved
    disk, told = Counting(), list[int]()
    outcome = written(target, source, workers=1, disk=disk, progress=told.append)
    assert sum(told) == target.plan.size
    assert outcome.bytes_written < target.plan.size
    assert 0 < disk.bytes < target.plan.files[1].size
    assert right(target)


def test_a_file_that_was_removed_or_damaged_is_made_again(target):
    written(target)
    large = target.outside[1]
    large.unlink()
    written(target)
    assert right(target)
    content = bytearray(large.read_bytes())
    content[len(content) // 2] ^= 1
    large.write_bytes(content)
    (target.root / MANIFEST).unlink()
    written(target)
    assert right(target)


def test_a_section_that_changes_before_the_file_has_its_name_is_found(target):
    class Meddling(Disk):
        def sync_folder(self, path: Path) -> None:
            super().sync_folder(path)
            shared = Layout(target.root, target.plan.id).shared(target.plan.files[1].name)
            if path.name.endswith(".journal") and len(list(path.iterdir())) == 7:  # the last record before the file's own
                with shared.open("r+b") as file:
                    file.seek(target.plan.files[1].sections[4].start + 100)
                    file.write(b"\xff\0\xff\0\xff\0")

    with pytest.raises(Exception, match="has changed since it was written") as found:
        written(target, workers=1, disk=Meddling())
    assert found.value.code == 7
    assert not target.outside[1].exists()
    written(target)
    assert right(target)


@pytest.mark.parametrize("kind", ["symlink", "hard link", "pipe", "large"])
def test_what_lies_in_its_way_is_not_written_to(kind, target, tmp_path):
    source = MadeSource()
    source.flaw = "b"
    with pytest.raises(SourceError):
        written(target, source, workers=1)
    mine, shared = tmp_path / "mine", Layout(target.root, target.plan.id).shared(target.plan.files[1].name)
    mine.write_bytes(b"mine" if kind != "large" else bytes(target.plan.files[1].size + 1))
    shared.unlink()
    if kind == "symlink":
        shared.symlink_to(mine)
    elif kind == "pipe":
        os.mkfifo(shared)
    elif kind == "large":
        mine.rename(shared)
    else:
        os.link(mine, shared)
    with pytest.raises((DestinationError, Exception)) as found:
        written(target)
    assert found.value.code in (4, 7)
    if mine.exists():
        assert mine.read_bytes() == b"mine"
