"""Sources that are broken or hostile: the documented exit code, one clear line, nothing written, nothing run, at once."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

from glmconv import convert
from tests.cli.bad_megatron import BAD_MEGATRON, HOSTILE, NO_ORIGIN, WITHOUT_ORIGIN, amidst
from tests.cli.bad_releases import BAD, SECRET, linked, mapped, outside
from tests.cli.processes import called
from tests.roundtrip.shards import INDEX, copied, marks, release

SECONDS = 20.0  # of this process: it hangs or it does not; a busy machine stretches CPU seconds too


@pytest.fixture
def source(tiny, tmp_path):
    """A good folder to break."""
    return copied(tiny, tmp_path / "source")


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "torch_dist"
    convert(tiny, {"torch_dist": path})
    return path


@pytest.fixture
def megatron(finished, tmp_path):
    """A good torch_dist folder to break, as a trainer would leave it: without our manifest."""
    return copied(finished, tmp_path / "source")


def refused(glmconv, source: Path, to: str, code: int, says: str = "") -> None:
    """Every command that reads a source refuses this one: with the code, in one line, at once, leaving no trace."""
    there = source.parent / "there"
    before = marks(source.parent)
    for command in (("convert", source, there, "--to", to), ("plan", source, "--to", to), ("inspect", source), ("verify", source, source)):
        begin = time.process_time()
        answer = glmconv(*command, *(["--json"] if command[0] == "convert" else []))
        assert time.process_time() - begin < SECONDS
        if command[0] == "verify" and answer.code == 1:
            assert "different" in answer.out  # what is missing or unknown is a difference
            continue
        assert answer.code == code, answer.err
        assert answer.out == "" or command[0] == "inspect"
        assert len(answer.errors) == len([line for line in answer.err.splitlines() if not line.startswith("note: ")]) >= 1
        if command[0] != "inspect":
            assert len(answer.err.splitlines()) == 1
            assert says in answer.err
        assert len(answer.errors[0]) < 1500
        assert answer.errors[0].isprintable()
        assert SECRET.strip() not in answer.err
    assert not there.exists()
    assert marks(source.parent) == before


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_path_that_cannot_be_looked_at_is_the_sources_fault(verb, source, glmconv, monkeypatch):
    answer = glmconv(verb, "x" * 300, *(["y"] if verb == "verify" else []))
    assert (answer.code, answer.out, len(answer.errors)) == (5, "", 1)

    def refusing(path: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refusing)
    answer = glmconv(verb, source, *([source] if verb == "verify" else []))
    assert (answer.code, answer.out, len(answer.errors)) == (5, "", 1)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_a_bad_release_is_refused(bad, source, glmconv):
    bad.change(source)
    refused(glmconv, source, "torch_dist", bad.code, bad.says)


@pytest.mark.parametrize("bad", BAD_MEGATRON, ids=lambda bad: bad.name)
def test_a_bad_torch_dist_folder_is_refused(bad, megatron, glmconv):
    bad.change(megatron)
    refused(glmconv, megatron, "hf", bad.code, bad.says)


@pytest.mark.parametrize("bad", WITHOUT_ORIGIN, ids=lambda bad: bad.name)
def test_a_trainers_bad_folder_is_refused(bad, megatron, glmconv):
    NO_ORIGIN(megatron)
    bad.change(megatron)
    refused(glmconv, megatron, "hf", bad.code, bad.says)


@pytest.mark.parametrize("where", [".metadata", "common.pt", "common.pt, bare"])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_runs_nothing(name, where, megatron, tmp_path, glmconv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    canary = tmp_path / "canary"
    HOSTILE[name](megatron, where, canary)
    refused(glmconv, megatron, "hf", 5)
    assert not canary.exists()


@pytest.mark.parametrize("where", [".metadata", "common.pt"])
def test_a_call_in_a_place_that_nobody_asks_for_is_passed_over_and_not_run(where, megatron, tiny, tmp_path, glmconv):
    amidst(megatron, where, tmp_path / "canary")
    assert glmconv("convert", megatron, tmp_path / "there", "--to", "hf").code == 0
    assert glmconv("verify", tiny, tmp_path / "there", "--mtp", "drop").code == 0
    assert not (tmp_path / "canary").exists()


def test_a_hostile_common_pt_is_not_even_opened_where_the_config_is_known(megatron, tmp_path, glmconv):
    canary = tmp_path / "canary"
    config = (megatron / "glmconv_origin").rename(tmp_path / "origin")
    HOSTILE["os.system"](megatron, "common.pt", canary)
    assert glmconv("convert", megatron, tmp_path / "back", "--to", "hf", "--origin", config).code == 0
    assert not canary.exists()


# Real processes: a crash, a hang or an import that runs something would show here alone


@pytest.mark.parametrize("name", ["os.system", "a recursion of 100,000", "10 GB in a few bytes"])
def test_a_process_survives_a_hostile_pickle(name, megatron, tmp_path):
    canary = tmp_path / "canary"
    HOSTILE[name](megatron, ".metadata", canary)
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30)); from glmconv.cli import main; main(sys.argv[1:])"
    found = called("inspect", megatron, program=("-c", limited))
    assert found.returncode == 5, found.stderr
    assert found.stdout == ""
    assert len(found.stderr.splitlines()) == 1
    assert found.stderr.startswith("error: ")
    assert not canary.exists()


@pytest.mark.parametrize("change", [linked("tokenizer.json"), mapped("../secret.safetensors")], ids=["link", "index"])
def test_a_process_reads_nothing_outside_of_the_source(change, source, tmp_path):
    outside(source)
    change(source)
    found = called("convert", source, tmp_path / "there", "--to", "hf")
    assert found.returncode == 5
    assert found.stderr.startswith("error: ")
    assert len(found.stderr.splitlines()) == 1
    assert not (tmp_path / "there").exists()


# The benign twins: what looks alike and is right


def test_the_copy_that_all_is_done_to_is_good(source, tmp_path, glmconv):
    assert glmconv("convert", source, tmp_path / "there", "--to", "hf", "--verify", "full").code == 0
    assert release(tmp_path / "there") == release(source)


def test_the_torch_dist_folder_that_all_is_done_to_is_good(megatron, tiny, tmp_path, glmconv):
    assert glmconv("convert", megatron, tmp_path / "there", "--to", "hf", "--verify", "full").code == 0
    assert release(tmp_path / "there") == release(tiny)


def test_code_and_pickles_beside_the_weights_are_neither_run_nor_copied(source, tmp_path, glmconv):
    canary = tmp_path / "canary"
    (source / "modeling_glm.py").write_text(f"open({str(canary)!r}, 'w')")
    (source / "training_args.bin").write_bytes(b"\x80\x02.")
    config = json.loads((source / "config.json").read_bytes())
    (source / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling_glm.Model"}}))
    answer = glmconv("convert", source, tmp_path / "there", "--to", "hf")
    assert answer.code == 0
    assert "modeling_glm.py" in answer.err
    assert "auto_map" in answer.err
    assert not canary.exists()
    assert set(release(source)) - set(release(tmp_path / "there")) == {"modeling_glm.py", "training_args.bin"}


def test_the_hubs_links_into_its_blobs_are_followed(source, tmp_path, glmconv):
    repository = tmp_path / "models--zai-org--GLM-4.5"
    snapshot = repository / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(source.iterdir())):
        shutil.move(file, repository / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    assert glmconv("convert", snapshot, tmp_path / "there", "--to", "hf").code == 0
    assert release(tmp_path / "there") == release(snapshot)


def test_a_release_without_an_index_is_read_as_it_lies(source, tmp_path, glmconv):
    (source / INDEX).unlink()
    assert glmconv("convert", source, tmp_path / "there", "--to", "torch_dist").code == 0
    assert glmconv("verify", source, tmp_path / "there").code == 0
