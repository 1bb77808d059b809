"""`glmconv sync`: real rsync, to folders of this machine and, through a stand-in for ssh, to those of machines that live in folders."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import pytest

from glmconv import convert
from glmconv.check.verify import verify_output
from glmconv.errors import Interrupted, UsageError
from glmconv.fleet.hosts import Machine, machine, read_hostfile
from glmconv.fleet.programs import run
from tests.roundtrip.shards import MANIFEST, contents, marks

pytestmark = pytest.mark.skipif(shutil.which("rsync") is None, reason="rsync is not installed")
# `ssh [options] HOST COMMAND`: runs the command here, in the root that is the machine's; a machine called "away" is not reached
SSH = """#!/bin/sh
if [ "$1" = -l ]; then host=$2@$3; shift 3; else host=$1; shift; fi
if [ "$host" = away ]; then echo "ssh: connect to host away port 22: No route to host" >&2; exit 255; fi
mkdir -p "$MACHINES/$host" && exec unshare --mount sh -c 'mount --bind "$0" /mnt && exec sh -c "$1"' "$MACHINES/$host" "$*"
"""


@pytest.fixture(scope="module")
def output(tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("output") / "made"
    convert(tiny, {"torch_dist": made})
    return made


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """The stand-in for ssh. /mnt of each machine is its own folder."""
    machines = tmp_path / "machines"
    machines.mkdir()
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    monkeypatch.setenv("MACHINES", str(machines))
    if os.system(f"{tmp_path / 'ssh'} probe true 2>/dev/null") != 0:
        pytest.skip("needs mount namespaces")
    return machines


def test_an_output_is_copied_to_machines_and_checked_there(output, remote, tmp_path, glmconv):
    (tmp_path / "hostfile").write_text("# two nodes\nnode-1 slots=8\n\nroot@node-2  # the other\nnode-1 slots=8\n")
    words = ("sync", output, "/mnt/models/made", "--hostfile", tmp_path / "hostfile", "--rsh", tmp_path / "ssh", "--json")
    answer = glmconv(*words)
    assert answer.code == 0, answer.err
    assert [(host["host"], host["state"]) for host in json.loads(answer.out)["hosts"]] == [("node-1", "copied"), ("root@node-2", "copied")]
    for name in ("node-1", "root@node-2"):
        there = remote / name / "models" / "made"
        assert contents(there) == contents(output)
        assert verify_output(there).same
    again = json.loads(glmconv(*words).out)["hosts"]
    assert {host["state"] for host in again} == {"was there already"}


def test_localhost_is_copied_to_without_ssh(output, tmp_path, glmconv):
    answer = glmconv("sync", output, tmp_path / "a folder" / "made", "--host", "localhost", "--rsh", "/bin/false")
    assert answer.code == 0, answer.err
    assert contents(tmp_path / "a folder" / "made") == contents(output)


def test_a_copy_that_was_interrupted_has_no_manifest_and_is_finished_by_the_same_command(output, tmp_path, glmconv):
    there = tmp_path / "made"
    assert glmconv("sync", output, there, "--host", "localhost").code == 0
    (there / MANIFEST).unlink()
    shard = next(path for path in there.rglob("*.distcp"))
    before = shard.stat()
    shard.write_bytes(b"\0" * before.st_size)
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # looks the same to rsync, and is not
    assert glmconv("sync", output, there, "--host", "localhost").code == 0
    assert contents(there) == contents(output)


def test_damage_in_a_copy_that_was_whole_is_found_and_mended(output, tmp_path, glmconv):
    there = tmp_path / "made"
    assert glmconv("sync", output, there, "--host", "localhost").code == 0
    shard = next(path for path in there.rglob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    assert glmconv("sync", output, there, "--host", "localhost").code == 0
    assert verify_output(there).same


def test_a_folder_with_anything_else_is_left_alone(output, tmp_path, glmconv):
    there = tmp_path / "thesis"
    there.mkdir()
    (there / "thesis.tex").write_text("years of work")
    before = marks(there)
    answer = glmconv("sync", output, there, "--host", "localhost")
    assert (answer.code, answer.out, "thesis.tex" in answer.err) == (4, "", True)
    assert marks(there) == before


def test_another_output_is_left_alone_and_the_source_is_not_copied_into_itself(output, tiny, tmp_path, glmconv):
    convert(tiny, {"hf": tmp_path / "other"})
    before = marks(tmp_path / "other")
    assert glmconv("sync", output, tmp_path / "other", "--host", "localhost").code == 4
    assert marks(tmp_path / "other") == before
    assert glmconv("sync", output, output / "inside", "--host", "localhost").code == 4


def test_a_machine_that_is_away_does_not_keep_the_others_from_theirs(output, remote, tmp_path, glmconv):
    answer = glmconv("sync", output, "/mnt/made", "--host", "away", "--host", "node-1", "--rsh", tmp_path / "ssh", "--at-once", 1)
    assert (answer.code, answer.out, len(answer.errors)) == (7, "", 1)
    assert "away: cannot be reached: ssh: connect to host away port 22: No route to host" in answer.err
    assert verify_output(remote / "node-1" / "made").same


def test_a_gguf_file_is_copied_with_its_folder_and_under_its_name(tiny, tmp_path, glmconv):
    convert(tiny, {"gguf:Q8_0": tmp_path / "A.gguf"})
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "thesis.tex").write_text("years of work")  # a GGUF file may lie beside other things
    assert glmconv("sync", tmp_path / "A.gguf", tmp_path / "far" / "A.gguf", "--host", "localhost").code == 0
    assert (tmp_path / "far" / "A.gguf").read_bytes() == (tmp_path / "A.gguf").read_bytes()
    assert verify_output(tmp_path / "far" / "A.gguf").same
    (tmp_path / "far2").mkdir()
    (tmp_path / "far2" / "A.gguf").write_text("somebody else's")
    assert glmconv("sync", tmp_path / "A.gguf", tmp_path / "far2" / "A.gguf", "--host", "localhost").code == 4
    assert glmconv("sync", tmp_path / "A.gguf", tmp_path / "far" / "B.gguf", "--host", "localhost").code == 2


def test_what_is_no_finished_output_is_not_copied(tiny, tmp_path, glmconv):
    unfinished = tmp_path / "unfinished"
    shutil.copytree(tiny, unfinished)
    (unfinished / MANIFEST).unlink()
    assert glmconv("sync", unfinished, tmp_path / "there", "--host", "localhost").code == 5
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("folder", ["relative/folder", "/", "/a/../b", "/a\nb", "-e"])
def test_a_folder_that_is_no_plain_path_is_exit_2(folder, output, glmconv):
    assert glmconv("sync", output, "--host", "localhost", "--", folder).code == 2


@pytest.mark.parametrize("name", ["-oProxyCommand=id", "a b", "a;id", "$(id)", "a\nb", "", "@host", "a/b", "`id`"])
def test_a_name_that_is_no_machine_is_a_usage_error(name):
    with pytest.raises(UsageError, match="no name of a machine"):
        machine(name)


def test_a_hostfile_names_each_machine_once(tmp_path):
    path = tmp_path / "hostfile"
    path.write_text("10.0.0.1 slots=8\n# 10.0.0.9\nroot@10.0.0.2\n\n10.0.0.1\n  fe80::1   max_slots=2 # a comment\n")
    assert read_hostfile(path) == [Machine("10.0.0.1"), Machine("10.0.0.2", "root"), Machine("fe80::1")]
    assert Machine("fe80::1").for_rsync == "[fe80::1]"
    for wrong in ("# nothing\n", "good\nnot;good\n"):
        path.write_text(wrong)
        with pytest.raises(UsageError):
            read_hostfile(path)


def test_a_missing_hostfile_or_no_host_at_all_is_exit_2(output, tmp_path, glmconv):
    assert glmconv("sync", output, "/there", "--hostfile", tmp_path / "none").code == 2
    assert glmconv("sync", output, "/there").code == 2


def test_without_rsync_it_is_exit_3_with_what_to_install(output, tmp_path, glmconv, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("sh", "mkdir", "ls", "grep", "head", "sha256sum"):
        (tools / name).symlink_to(Path(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tools))
    answer = glmconv("sync", output, tmp_path / "there", "--host", "localhost")
    assert (answer.code, "rsync is not installed" in answer.err) == (3, True)


def test_a_signal_ends_the_program_that_copies():
    stop = threading.Event()
    stop.set()
    with pytest.raises(Interrupted):
        run(["sleep", "600"], "", stop)
