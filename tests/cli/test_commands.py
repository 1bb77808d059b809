"""Each command as a user meets it: its exit code, what it says and where, and what it leaves."""

from __future__ import annotations

import json
import math
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import pytest

from glmconv import convert, plan
from glmconv.archs import presets
from glmconv.check import inspect as inspecting
from glmconv.cli import group
from tests.cli.processes import ENVIRONMENT, GLMCONV, ROOT, alone, called, may_mount
from tests.roundtrip.shards import ITEMSIZE, MANIFEST, Surgery, contents, copied, load, marks, reindexed, release

COMMANDS = ("convert", "inspect", "models", "models list", "models show", "plan", "toy", "verify")
needs_mounts = pytest.mark.skipif(not may_mount(), reason="no tmpfs may be mounted here")


def document(text: str) -> dict[str, object]:
    """All of stdout is one JSON document."""
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


# Help and usage


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_tells_what_it_does_and_takes(command, glmconv):
    answer = glmconv(*command.split(), "--help")
    assert answer.code == 0
    assert answer.err == ""
    assert answer.out.startswith(f"Usage: glmconv {command} ")
    assert "--json" in answer.out or command == "models"
    assert answer.out == glmconv(*command.split(), "-h").out


def test_the_help_lists_every_command_and_every_exit_code(glmconv):
    text = " ".join(glmconv("--help").out.split())
    assert all(f" {command} " in text for command in {command.split()[0] for command in COMMANDS})
    assert all(f" {code} " in text for code in range(9))
    assert glmconv().code in (0, 2)


@pytest.mark.parametrize("command", ["convert", "toy", "verify"])
def test_help_shows_examples_that_the_command_line_accepts(command, glmconv):
    lines = [line.split("#")[0].split() for line in glmconv(command, "--help").out.split("Examples:")[1].splitlines()]
    examples = [line[line.index("glmconv") + 2 :] for line in lines if "glmconv" in line]
    assert len(examples) >= 2
    for example in examples:
        parser = group.get_command(click.Context(group), command)
        assert parser.make_context(command, example)  # parsed, not run: a wrong one raises


def test_it_runs_as_a_module_and_as_a_script():
    module = called("--version")
    script = subprocess.run([Path(sys.executable).parent / "glmconv", "--version"], capture_output=True, text=True)
    assert (module.returncode, script.returncode) == (0, 0)
    assert module.stdout == script.stdout
    assert module.stdout.startswith("glmconv 0.")


@pytest.mark.parametrize("first", ["import glmconv", "import glmconv.convert", "import glmconv.cli.convert, glmconv.cli.plan, glmconv.cli.verify"])
def test_the_verbs_are_functions_whatever_was_imported_before(first):
    code = f"{first}\nimport glmconv\nfor _ in 1, 2: print(*(callable(getattr(glmconv, verb)) for verb in glmconv.__all__))"
    found = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, cwd=ROOT, capture_output=True, text=True)
    assert set(found.stdout.split()) == {"True"}, found.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("nope",),
        ("--nope",),
        ("convert",),
        ("convert", "SRC", "DST"),
        ("convert", "SRC", "--to", "torch_dist"),
        ("convert", "SRC", "DST", "--to", "gguf:Q4"),
        ("convert", "SRC", "DST", "--to", "hf=OTHER"),
        ("convert", "SRC", "--to", "hf=OTHER", "--to", "torch_dist=OTHER"),
        ("convert", "SRC", "--to", "hf=OTHER", "--to", "torch_dist=OTHER/inside"),
        ("convert", "SRC", "DST", "--to", "hf", "--shard-size", "5XB"),
        ("convert", "SRC", "DST", "--to", "hf", "--shard-size", "0"),
        ("convert", "SRC", "DST", "--to", "hf", "--workers", "0"),
        ("convert", "SRC", "DST", "--to", "hf", "--mtp", "maybe"),
        ("convert", "SRC", "DST", "--to", "hf", "EXTRA"),
        ("convert", "SRC", "DST", "--to", "torch_dist", "--iteration", "-1"),
        ("plan", "SRC", "--to", "nope"),
        ("plan", "SRC"),
        ("models", "show", "glm9_none"),
        ("models", "nope"),
        ("toy", "glm9-none", "-o", "DST"),
        ("toy", "glm4.5-355B-A32B"),
        ("toy", "glm4.5-355B-A32B", "-o", "DST", "--scale", "2"),
        ("toy", "glm4.5-355B-A32B", "-o", "DST", "--scale", "1/0"),
        ("toy", "glm4.5-355B-A32B", "-o", "DST", "--scale", "1e-99999999"),
        ("toy", "glm4.5-355B-A32B", "-o", "DST", "--experts", "1"),
        ("verify",),
        ("verify", "A", "B", "C"),
        ("inspect",),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2_and_touches_nothing(arguments, tiny, tmp_path, monkeypatch, glmconv):
    monkeypatch.chdir(tmp_path)
    Path("SRC").symlink_to(tiny)
    answer = glmconv(*arguments)
    assert answer.code == 2
    assert answer.out == ""
    assert "rror: " in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["SRC"]


@pytest.mark.parametrize("arguments", [("nope",), ("verify", "SRC", "SRC")], ids=" ".join)
@pytest.mark.parametrize("stderr", ["2>/dev/full", "2>&-", "2>&- --progress bar"])
def test_the_exit_code_is_right_where_stderr_is_full_or_closed(arguments, stderr, tiny):
    command = " ".join([*GLMCONV, *(str(tiny) if argument == "SRC" else argument for argument in arguments)])
    ended = subprocess.run(["sh", "-c", f"{command} {stderr}"], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert ended.returncode == (2 if arguments == ("nope",) else 0)


def test_a_plan_takes_its_destination_as_text_too(tiny, tmp_path):
    assert plan(tiny, ["hf"], str(tmp_path / "there")).targets == plan(tiny, ["hf"], tmp_path / "there").targets


# What is there


def test_inspect_counts_what_the_files_hold(toy, glmconv):
    path = toy("glm4.6-355B-A32B")
    found = document(glmconv("inspect", path, "--json").out)
    stored = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load(file).items()}
    mtp = {name for name in stored if name.startswith("model.layers.4.")}
    assert found | {
        "format": "hf", "model_type": "glm4_moe", "layers": 4, "experts": 16, "mtp_layers": 1, "tensors": len(stored), "mtp_tensors": len(mtp),
        "parameters": sum(math.prod(tensor.shape) for tensor in stored.values()), "bytes": sum(len(tensor.data) for tensor in stored.values()),
        "dtypes": {"bfloat16": len(stored) - 2, "float32": 2}, "missing": [], "unexpected": [], "wrong": [],
    } == found  # fmt: skip
    assert sum(ITEMSIZE[tensor.dtype] * math.prod(tensor.shape) for tensor in stored.values()) == found["bytes"]
    assert found["preset"] is None


def test_inspect_tells_the_same_of_both_formats(toy, torch_dist, glmconv):
    preset = "glm4.5-106B-A12B"
    here, there = (document(glmconv("inspect", path, "--json", "--tensors").out) for path in (toy(preset), torch_dist(preset)))
    assert (here.pop("format"), there.pop("format")) == ("hf", "torch_dist")
    for found in (here, there):
        del found["path"], found["files"], found["stored_bytes"]
    assert here == there
    assert len(here["tensor_list"]) == here["tensors"]


def test_inspect_names_a_preset_by_its_config(tmp_path, glmconv):
    from glmconv.archs import preset_named

    spec, preset = preset_named("glm4.5-106B-A12B")
    (tmp_path / "config.json").write_text(json.dumps(dict(preset.config)))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    answer = glmconv("inspect", tmp_path, "--json")
    found = document(answer.out)
    assert answer.code == 5
    assert (found["preset"], found["model_type"], found["tensors"]) == ("glm4.5-106B-A12B", spec.model_type, 0)
    assert len(found["missing"]) == 18329 - 404  # what may be absent as a whole is not expected: copies, MTP layer


def test_inspect_lists_what_does_not_fit_and_exits_5(tiny, tmp_path, glmconv):
    changed = copied(tiny, tmp_path / "changed")
    work = Surgery.at(changed, "model.norm.weight")
    work.tensors["model.extra.weight"] = work.tensors.pop("model.norm.weight")
    work.close()
    other = Surgery.at(changed, "model.layers.1.input_layernorm.weight")
    other.tensors["model.layers.1.input_layernorm.weight"].shape.append(1)
    other.close()
    reindexed(changed)
    answer = glmconv("inspect", changed, "--json")
    found = document(answer.out)
    assert answer.code == 5
    assert (found["missing"], found["unexpected"]) == (["model.norm.weight"], ["model.extra.weight"])
    assert [name for name, _ in found["wrong"]] == ["model.layers.1.input_layernorm.weight"]
    assert len(answer.errors) == 3
    assert len(glmconv("inspect", changed).errors) == 3


def test_inspect_prints_a_table_for_people(tiny, glmconv):
    answer = glmconv("inspect", tiny)
    assert answer.code == 0
    assert answer.err == ""
    assert dict(line.split(None, 1) for line in answer.out.splitlines())["format"].strip() == "hf"
    assert "model.layers.2.eh_proj.weight" in glmconv("inspect", tiny, "--tensors").out


def test_models_lists_the_releases_with_their_sizes(glmconv):
    listed = {entry["preset"]: entry for entry in json.loads(glmconv("models", "list", "--json").out)}
    assert {name: entry["tensors"] for name, entry in listed.items()} == {preset.name: preset.tensors for _, preset in presets()}
    assert listed["glm4.5-355B-A32B"]["tensors"] == 44691
    text = glmconv("models").out
    assert all(name in text and entry["hub"] in text for name, entry in listed.items())


@pytest.mark.parametrize("arch", ["glm4_moe", "glm4.5-106B-A12B"])
def test_models_shows_the_table_of_an_architecture(arch, glmconv):
    text = glmconv("models", "show", arch).out
    assert "self_attn.q_proj.weight" in text
    assert "self_attention.linear_qkv" in text
    assert "attn_q.weight" in text
    assert json.loads(glmconv("models", "show", arch, "--json").out)


# Plan


@pytest.mark.parametrize("preset", ["glm4.5-355B-A32B", "glm4.6-355B-A32B"])
def test_plan_says_what_convert_then_does(preset, toy, tmp_path, glmconv):
    options = (toy(preset), f"--to=torch_dist={tmp_path / 'there'}", f"--to=hf={tmp_path / 'copy'}", "--shard-size", "3MB", "--json")
    planned = document(glmconv("plan", *options).out)
    done = document(glmconv("convert", *options, "--verify", "none").out)
    assert [target["to"] for target in planned["targets"]] == ["torch_dist", "hf"]
    assert planned["jobs"] == sum(target["files_written"] for target in done["targets"])
    assert planned["ranks"] == [{"rank": 0, "jobs": planned["jobs"], "bytes": sum(target["bytes_written"] for target in done["targets"])}]
    for target, result in zip(planned["targets"], done["targets"], strict=True):
        assert target["tensors"] > 100
        written = {name: data for name, data in contents(Path(target["path"])).items() if name != MANIFEST}
        assert target["path"] == result["path"]
        assert target["plan_id"] == result["plan_id"]
        assert target["files"] == len(written)
        assert target["bytes"] == result["bytes"] == sum(map(len, written.values()))
    assert planned["disk_needed"] == planned["bytes_written"] == sum(target["bytes"] for target in planned["targets"])
    assert document(glmconv("plan", *options).out)["disk_needed"] == 0
    weights = sum(len(tensor.data) for file in toy(preset).glob("*.safetensors") for tensor in load(file).values())
    assert weights <= planned["bytes_read"] <= weights + 100_000
    assert 1 << 20 < planned["peak_memory"] < 4 << 30


def test_plan_balances_the_jobs_over_ranks(toy, glmconv):
    source, options = toy("glm4.6-355B-A32B"), ("--to", "torch_dist", "--shard-size", "200kB", "--json")
    planned = document(glmconv("plan", source, *options, "--nodes", 2, "--ranks-per-node", 4).out)
    ranks = planned["ranks"]
    assert [rank["rank"] for rank in ranks] == list(range(8))
    assert sum(rank["jobs"] for rank in ranks) == planned["jobs"]
    assert max(rank["bytes"] for rank in ranks) <= min(rank["bytes"] for rank in ranks) + 2_000_000
    assert len(document(glmconv("plan", source, *options).out)["ranks"]) == 1


def test_a_dry_run_says_what_plan_says_and_writes_nothing(tiny, tmp_path, glmconv):
    options = (tiny, tmp_path / "there", "--to", "torch_dist", "--json")
    before = marks(tmp_path), marks(tiny)
    dry, planned = document(glmconv("convert", *options, "--dry-run").out), document(glmconv("plan", *options).out)
    assert (marks(tmp_path), marks(tiny)) == before
    assert {**dry, "peak_memory": 0} == {**planned, "peak_memory": 0}


# Convert


def test_convert_says_what_it_did(tiny, tmp_path, glmconv):
    answer = glmconv("convert", tiny, tmp_path / "there", "--to", "torch_dist", "--mtp", "drop", "--json", "--verify", "full")
    found = document(answer.out)
    tensors = [name for file in tiny.glob("*.safetensors") for name in load(file)]
    mtp = [name for name in tensors if name.startswith("model.layers.2.")]
    assert (found["tensors"], found["dropped"], found["verify"]) == (len(tensors) - len(mtp), len(mtp), "full")
    assert found["verified"]["tensors"] == found["tensors"]
    assert found["source"] == {"path": str(tiny), "format": "hf", "model_type": "glm4_moe"}
    (target,) = found["targets"]
    assert Path(target["manifest"]).read_bytes()
    assert (target["already_done"], target["files_kept"]) == (False, 0)


def test_the_same_command_again_writes_nothing(tiny, tmp_path, glmconv):
    command = ("convert", tiny, tmp_path / "there", "--to", "torch_dist")
    assert glmconv(*command).code == 0
    before = marks(tmp_path)
    again = glmconv(*command)
    assert again.code == 0
    assert "already done" in again.out
    assert marks(tmp_path) == before


def test_overwrite_moves_what_was_there_aside(tiny, toy, tmp_path, glmconv):
    there = tmp_path / "there"
    assert glmconv("convert", tiny, there, "--to", "torch_dist").code == 0
    before = contents(there)
    other = ("convert", toy("glm4.6-355B-A32B"), there, "--to", "hf")
    assert glmconv(*other).code == 4
    assert contents(there) == before
    assert glmconv(*other, "--overwrite").code == 0
    assert contents(tmp_path / "there.bak-1") == before
    assert release(there) == release(toy("glm4.6-355B-A32B"))


def test_a_toy_is_a_function_of_its_seed(tmp_path, glmconv):
    sizes = ("--layers", 2, "--experts", 2, "--scale", "1/64")
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert glmconv("toy", "glm4.7-355B-A32B", "-o", tmp_path / name, *sizes, "--seed", seed).code == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert release(tmp_path / "a") != release(tmp_path / "c")
    assert glmconv("verify", tmp_path / "a").code == 0
    assert glmconv("verify", tmp_path / "a", tmp_path / "c").code == 1


def test_a_toy_without_mtp_has_none(tmp_path, glmconv):
    assert glmconv("toy", "glm4.5-355B-A32B", "-o", tmp_path / "toy", "--layers", 1, "--experts", 2, "--scale", "1/64", "--mtp", "drop").code == 0
    found = document(glmconv("inspect", tmp_path / "toy", "--json").out)
    assert (found["mtp_layers"], found["mtp_tensors"], found["aliases"]) == (0, 0, 0)


# Refused: exit 3, 4, 6


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_too_little_memory_is_exit_3_before_anything_is_written(command, tiny, tmp_path, glmconv):
    answer = glmconv(command, tiny, tmp_path / "there", "--to", "torch_dist", "--max-memory", "1MB")
    assert answer.code == 3
    assert len(answer.err.splitlines()) == len(answer.errors) == 1
    assert not (tmp_path / "there").exists()


@needs_mounts
def test_too_small_a_disk_is_exit_3_before_anything_is_written(toy, tmp_path):
    script = 'mount -t tmpfs -o size=1m tmpfs "$2"; $GLMCONV convert "$1" "$2/there" --to torch_dist || echo "exit $?"; ls -A "$2"'
    found = alone(script, toy("glm4.6-355B-A32B"), tmp_path)
    assert found.stdout == "exit 3\n"
    assert found.stderr.startswith(f"error: {tmp_path}: ")
    assert "missing" in found.stderr


@needs_mounts
def test_a_read_only_destination_is_exit_4(tiny, tmp_path):
    script = 'mount -t tmpfs -o ro tmpfs "$2"; $GLMCONV convert "$1" "$2/there" --to torch_dist || echo "exit $?"'
    found = alone(script, tiny, tmp_path)
    assert found.stdout == "exit 4\n"
    assert "read-only" in found.stderr


def foreign(root: Path) -> Path:
    (root / "there").mkdir()
    (root / "there" / "thesis.tex").write_text("years of work")
    return root / "there"


def is_file(root: Path) -> Path:
    (root / "there").write_text("years of work")
    return root / "there"


def below_a_file(root: Path) -> Path:
    (root / "file").write_text("years of work")
    return root / "file" / "there"


def inside(root: Path) -> Path:
    return root / "source" / "there"


def inside_by_a_link(root: Path) -> Path:
    (root / "link").symlink_to(root / "source")
    return root / "link" / "there"


def the_source(root: Path) -> Path:
    return root / "source"


def around(root: Path) -> Path:
    return root


def dangling(root: Path) -> Path:
    (root / "there").symlink_to(root / "nowhere")
    return root / "there"


def dotted(root: Path) -> Path:
    return root / "source" / ".." / "source" / "there"


@pytest.mark.parametrize("place", [foreign, is_file, below_a_file, inside, inside_by_a_link, the_source, around, dangling, dotted])
def test_a_destination_that_is_not_ours_is_exit_4_and_stays_as_it_is(place, tiny, tmp_path, glmconv):
    copied(tiny, tmp_path / "source")
    there = place(tmp_path)
    before = marks(tmp_path)
    answer = glmconv("convert", tmp_path / "source", there, "--to", "torch_dist")
    assert answer.code == 4
    assert len(answer.err.splitlines()) == len(answer.errors) == 1
    assert answer.out == ""
    assert marks(tmp_path) == before


def test_a_destination_in_or_around_anything_that_is_read_is_exit_4(tiny, tmp_path, glmconv):
    there, origin = tmp_path / "there", copied(tiny, tmp_path / "origin")
    convert(tiny, {"torch_dist": there})
    before = marks(tmp_path)
    for source, destination in ((there, origin), (there, origin / "deep"), (there / "release", there / "deep"), (there / "release", there)):
        for verb in ("convert", "plan"):
            answer = glmconv(verb, source, destination, "--to", "hf", "--origin", origin, "--overwrite")
            assert (answer.code, len(answer.errors)) == (4, 1), (verb, destination)
    assert marks(tmp_path) == before


@needs_mounts
def test_a_destination_inside_the_source_by_a_bind_mount_is_exit_4(tiny, tmp_path):
    source = copied(tiny, tmp_path / "source")
    (tmp_path / "bound").mkdir()
    script = 'mount --bind "$1" "$2"; $GLMCONV convert "$1" "$2/there" --to torch_dist || echo "exit $?"'
    found = alone(script, source, tmp_path / "bound")
    assert found.stdout == "exit 4\n", found.stderr
    assert not (source / "there").exists()


# What is said, and where


def test_data_goes_to_stdout_and_all_else_to_stderr(tiny, tmp_path, glmconv):
    command = ("convert", tiny, tmp_path / "there", "--to", "torch_dist")
    loud = glmconv(*command, "--json", "--progress", "plain", "-v")
    assert document(loud.out)["targets"]
    assert "convert" in loud.err
    quiet = glmconv("convert", tiny, tmp_path / "other", "--to", "torch_dist", "-q")
    assert quiet.err == ""
    assert str(tmp_path / "other") in quiet.out


@pytest.mark.parametrize("command", ["inspect", "verify", "plan --to hf", "convert DST --to hf"])
def test_an_error_is_one_line_on_stderr_and_nothing_on_stdout(command, tmp_path, glmconv):
    verb, *rest = command.split()
    answer = glmconv(verb, tmp_path / "no such folder", *rest, "--json")
    assert answer.code == 5
    assert answer.out == ""
    assert len(answer.err.splitlines()) == len(answer.errors) == 1
    assert "no such folder" in answer.err


def test_control_characters_of_a_name_are_escaped(tmp_path, glmconv):
    answer = glmconv("inspect", tmp_path / "a\nb\x1b[31m\u202e")
    assert answer.code == 5
    assert len(answer.err.splitlines()) == 1
    assert "\x1b" not in answer.err
    assert "\u202e" not in answer.err
    assert r"a\nb\x1b[31m" in answer.err


def test_the_exit_code_is_right_even_when_nothing_can_be_said():
    with Path("/dev/full").open("w") as full:
        assert called("inspect", "/no/such/folder", stderr=full, stdout=full, capture_output=False).returncode == 5
        assert called("models", stderr=full, stdout=full, capture_output=False).returncode == 7
    closed = subprocess.run(
        [*GLMCONV, "inspect", "/no/such/folder"], env=ENVIRONMENT, cwd=ROOT, stderr=None, preexec_fn=lambda: __import__("os").close(2)
    )
    assert closed.returncode == 5


def test_a_reader_that_has_seen_enough_is_no_error():
    listing = subprocess.Popen(
        [*GLMCONV, "models", "show", "glm4_moe", "--json"], env=ENVIRONMENT, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    assert listing.stderr.read() == b""
    assert listing.wait(60) == 0


def test_a_defect_of_ours_is_exit_70_with_its_traceback_in_a_file(tiny, tmp_path, monkeypatch, glmconv):
    def defect(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(inspecting, "open_checkpoint", defect)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    answer = glmconv("inspect", tiny)
    assert answer.code == 70
    assert len(answer.err.splitlines()) == len(answer.errors) == 1
    (log,) = tmp_path.glob("glmconv-*.log")
    assert str(log) in answer.err
    assert "ZeroDivisionError: a defect" in log.read_text()


def test_debug_keeps_the_exit_code_and_shows_the_traceback():
    found = called("--debug", "inspect", "/no/such/folder")
    assert found.returncode == 5
    assert "Traceback" in found.stderr
    assert found.stderr.splitlines()[-1].startswith("error: ")


def test_an_unfinished_output_is_no_source(tiny, tmp_path, glmconv):
    convert(tiny, {"torch_dist": tmp_path / "there"})
    (tmp_path / "there" / MANIFEST).unlink()
    for command in (("inspect",), ("verify",), ("plan", "--to", "hf")):
        answer = glmconv(command[0], tmp_path / "there", *command[1:])
        assert answer.code == 5
        assert "unfinished" in answer.err
    assert glmconv("verify", tiny, tmp_path / "there").code == 5


@pytest.mark.parametrize("command", [("convert", "--to", "torch_dist"), ("verify",)])
def test_a_rank_that_is_no_number_is_exit_2(command, tiny, tmp_path, monkeypatch, glmconv):
    monkeypatch.setenv("RANK", "abc")
    there = [tmp_path / "there"] if command[0] == "convert" else [tiny]
    answer = glmconv(command[0], tiny, *there, *command[1:], "--progress", "bar")
    assert answer.code == 2
    assert answer.errors == ["error: RANK=abc in the environment is not a number."]
    assert not (tmp_path / "there").exists()


@pytest.mark.parametrize("there", ["link", "link/below"])
def test_a_destination_may_be_reached_through_a_link(there, tiny, tmp_path, glmconv):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    assert glmconv("convert", tiny, tmp_path / there, "--to", "torch_dist").code == 0
    assert (tmp_path / there.replace("link", "disk") / MANIFEST).exists()
    again = glmconv("convert", tiny, tmp_path / there.replace("link", "disk"), "--to", "torch_dist")
    assert again.code == 0
    assert "already done" in again.out


def test_values_that_are_not_finite_are_passed_on_and_said(tiny, tmp_path, glmconv):
    source = copied(tiny, tmp_path / "source")
    for name, at, bits in (("model.norm.weight", 3, b"\xc0\x7f"), ("model.layers.0.mlp.down_proj.weight", 2, b"\x80\xff")):
        surgery = Surgery.at(source, name)
        raw = bytearray(surgery.tensors[name].data)
        raw[2 * at : 2 * at + 2] = bits
        surgery.tensors[name].data = bytes(raw)
        surgery.close()
    answer = glmconv("convert", source, tmp_path / "there", "--to", "torch_dist")
    assert answer.code == 0
    assert "note: 2 tensors hold NaN or Inf, which was passed on as it is; model.layers.0.mlp.down_proj.weight does in row 0" in answer.err
    assert glmconv("verify", source, tmp_path / "there").code == 0
    assert "NaN" not in glmconv("convert", tiny, tmp_path / "fine", "--to", "torch_dist").err


def test_an_empty_source_is_a_usage_error_and_not_this_folder(tiny, tmp_path, monkeypatch, glmconv):
    monkeypatch.chdir(copied(tiny, tmp_path / "here"))
    before = marks(tmp_path)
    for command in (("convert", "", "DST", "--to", "hf", "--overwrite"), ("inspect", ""), ("verify", "", "")):
        assert glmconv(*command).code == 2
    assert marks(tmp_path) == before


@pytest.mark.parametrize("options", [("--to", "hf", "--iteration", "3"), ("--to", "hf", "--nodes", "100000", "--ranks-per-node", "1000")])
def test_options_that_make_no_sense_here_are_usage_errors(options, tiny, glmconv):
    assert glmconv("plan", tiny, *options).code == 2


def test_the_next_command_of_a_plan_is_the_same_conversion(tiny, tmp_path, glmconv):
    options = ["--to", "fp8:channel", "--keep", "layers\\.0", "--shard-size", "100kB", "--mtp", "drop", "--first-layers-bf16", "1"]
    answer = glmconv("plan", tiny, tmp_path / "there", *options, "--json")
    (line,) = [line for line in glmconv("plan", tiny, tmp_path / "there", *options).err.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: glmconv "))
    assert glmconv(*words).code == 0
    (claim,) = (tmp_path / "there").glob(".glmconv/plan.json")
    assert document(answer.out)["targets"][0]["plan_id"] in claim.read_text()


def test_what_was_moved_aside_is_said_in_json_too(tiny, tmp_path, glmconv):
    assert glmconv("convert", tiny, tmp_path / "there", "--to", "torch_dist").code == 0
    answer = document(glmconv("convert", tiny, tmp_path / "there", "--to", "hf", "--overwrite", "--json").out)
    assert answer["targets"][0]["moved_aside"] == str(tmp_path / "there.bak-1")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_help_text_without_room_is_exit_7():
    with open("/dev/full", "w") as full:
        assert subprocess.run([*GLMCONV, "--help"], env=ENVIRONMENT, stdout=full, stderr=subprocess.PIPE).returncode == 7


def test_tied_embeddings_are_said_to_be_unsupported(tiny, tmp_path, glmconv):
    source = copied(tiny, tmp_path / "source")
    surgery = Surgery.at(source, "lm_head.weight")
    del surgery.tensors["lm_head.weight"]
    surgery.close()
    reindexed(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    answer = glmconv("inspect", source)
    assert answer.code == 6
    assert "ties lm_head" in answer.errors[0]
