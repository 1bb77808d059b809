"""`glmconv doctor`: what it says of an installation and of folders, from one process and from ranks, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from glmconv.fleet.doctor import Folder, lateness, troubles
from glmconv.fleet.gathering import Gathering
from glmconv.fleet.probe import ProbeDisk, Seen, probe
from tests.cli.processes import ENVIRONMENT, ROOT
from tests.roundtrip.shards import marks

SECONDS = 60.0


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


class Limited(ProbeDisk):
    """A disk on which some operations do not do what they should."""

    def __init__(self, *missing: str) -> None:
        self.missing = missing

    def link(self, source: Path, target: Path) -> None:
        if "link" in self.missing:
            raise OSError(errno.EPERM, "no hard links")
        if "link overwrites" in self.missing and target.exists():
            target.unlink()
        super().link(source, target)

    def sync(self, fd: int) -> None:
        if "fsync" in self.missing:
            raise OSError(errno.EIO, "no fsync")
        super().sync(fd)

    def create(self, path: Path) -> int:
        if "exclusive" in self.missing and path.exists():
            return os.open(path, os.O_RDWR)
        return super().create(path)


def from_ranks(disks: list[ProbeDisk], folders: list[Path], patience: float = 20) -> list[Seen]:
    """What ranks that are threads see, each on its own disk and in its own folder."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=SECONDS))
    heard: dict[int, list[Seen]] = {}

    def look(rank: int) -> None:
        mine = TCPStore("127.0.0.1", store.port, is_master=False, wait_for_workers=False)
        ranks = Gathering("probe", rank, len(disks), mine, SECONDS)
        heard[rank] = probe(folders[rank], ranks, 0, "token", disks[rank], patience)

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(len(disks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert heard[0] == heard[1]
    return heard[0]


def test_a_good_folder_has_no_troubles_and_is_as_it_was(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    seen = from_ranks([ProbeDisk()] * 3, [tmp_path] * 3)
    assert list(troubles(Folder("x", "ext4", seen))) == []
    assert list(lateness(Folder("x", "ext4", seen))) == []
    assert [rank.rank for rank in seen] == [0, 1, 2]
    assert sorted(name for rank in seen for name in rank.won) == ["create", "link", "mkdir"]
    assert names(tmp_path) == ["thesis.tex"]


def test_folders_that_are_not_the_same_on_every_machine_are_found(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    seen = from_ranks([ProbeDisk()] * 2, [tmp_path / "a", tmp_path / "b"], patience=0.1)
    found = list(troubles(Folder("x", "ext4", seen)))
    assert sum("does not see what other ranks have made" in line for line in found) == 2
    assert sum("2 ranks made one name by O_EXCL" in line for line in found) == 1
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize(
    ("missing", "said"),
    [("fsync", "fsync failed: EIO"), ("exclusive", "exclusive failed"), ("link overwrites", "ranks made one name by link")],
)
def test_a_disk_that_does_not_keep_its_word_is_found(missing, said, tmp_path):
    found = list(troubles(Folder("x", "nfs4", from_ranks([Limited(missing)] * 2, [tmp_path] * 2))))
    assert any(said in line for line in found), found
    assert names(tmp_path) == []


def test_a_disk_without_links_is_worth_a_warning_only(tmp_path):
    folder = Folder("x", "exfat", from_ranks([Limited("link")] * 2, [tmp_path] * 2))
    assert list(troubles(folder)) == []
    assert any("has no hard links" in line for line in lateness(folder))
    assert names(tmp_path) == []


class Late(ProbeDisk):
    """A client that lists a folder as it was for its first few looks."""

    def __init__(self, looks: int) -> None:
        self.looks = looks

    def names(self, path: Path) -> list[str]:
        self.looks -= 1
        return [] if self.looks >= 0 else super().names(path)


def test_how_late_a_folder_is_seen_is_measured(tmp_path):
    seen = from_ranks([ProbeDisk(), Late(20)], [tmp_path] * 2)
    assert seen[1].late > seen[0].late
    late = [Seen(rank.rank, rank.host, rank.works, rank.won, rank.late * 100) for rank in seen]
    assert any("later by another" in line for line in lateness(Folder("x", "nfs4", late)))


def test_what_is_said_has_no_secret_in_it_and_writes_nothing_elsewhere(tmp_path, glmconv, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_sesame")
    monkeypatch.setenv("https_proxy", "http://user:open@proxy:3128")
    before = marks(tmp_path)
    for words in (("doctor",), ("doctor", "--json"), ("doctor", "-v")):
        answer = glmconv(*words)
        assert answer.code == 0
        assert "sesame" not in answer.out + answer.err
        assert "proxy:3128" not in answer.out + answer.err
    found = json.loads(glmconv("doctor", "--json").out)
    assert (found["environment"]["hub_token"], found["environment"]["proxies"]) == ("environment", ["https_proxy"])
    assert marks(tmp_path) == before


def test_a_folder_that_is_not_there_or_cannot_be_written_is_exit_3(tmp_path, glmconv):
    answer = glmconv("doctor", tmp_path, tmp_path / "none", "--json")
    assert (answer.code, json.loads(answer.out)["ok"], len(answer.errors)) == (3, False, 1)
    assert "none: rank 0" in answer.err
    assert names(tmp_path) == []


def test_ranks_that_are_processes_are_all_heard(tmp_path):
    there = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "http_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "glmconv", "doctor", str(tmp_path), "--json"]
    how = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, env={**ENVIRONMENT, **there, "RANK": str(rank)}, **how) for rank in range(2)]
    said = [job.communicate(timeout=120) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    found = json.loads(said[0][0])
    assert said[1][0] == ""
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert abs(found["ranks"][1]["clock_ahead_ms"]) < 1000
    assert [seen["rank"] for seen in found["folders"][0]["ranks"]] == [0, 1]
    assert any("http_proxy set" in line for line in found["warnings"])
    assert names(tmp_path) == []
