"""`glmconv run`: what a pipeline's file may say, which steps it gives, that only a manifest makes one done, and what a second run does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from glmconv import Options, convert
from glmconv.cli.pipelines import load_pipeline, parse_options
from glmconv.fleet.steps import readings
from tests.roundtrip.shards import MANIFEST, contents, copied, marks

THREE = """\
source: ${BASE_DIR}/GLM
targets:
  torch_dist: ${BASE_DIR}/GLM_torch_dist
  fp8:
    to: fp8:channel
    path: ${BASE_DIR}/GLM-FP8
    options:
      last-layers-bf16: 1
  hf:
    source: ${BASE_DIR}/GLM_torch_dist
    path: ${BASE_DIR}/GLM-hf
options:
  shard-size: 100kB
verify: [sample, manifest]
"""


@pytest.fixture
def base(tiny, tmp_path, monkeypatch):
    """A folder with a source in it, named by the environment, and a pipeline beside."""
    copied(tiny, tmp_path / "GLM")
    (tmp_path / "pipeline.yaml").write_text(THREE)
    monkeypatch.setenv("BASE_DIR", str(tmp_path))
    return tmp_path


def states(answer) -> dict[str, str]:
    return {step["step"]: step["state"] for step in json.loads(answer.out)["steps"] if step["step"] != "verify"}


def test_a_pipeline_writes_what_its_conversions_one_by_one_would(base, glmconv, tiny, tmp_path):
    answer = glmconv("run", base / "pipeline.yaml", "--json")
    assert answer.code == 0, answer.err
    assert states(answer) == dict.fromkeys(("torch_dist", "fp8", "hf"), "converted")
    convert(base / "GLM", {"torch_dist": tmp_path / "alone"}, options=Options(file_size=100_000))
    convert(base / "GLM", {"fp8:channel": tmp_path / "alone8"}, options=Options(file_size=100_000, last_layers_bf16=1))
    convert(tmp_path / "alone", {"hf": tmp_path / "back"}, options=Options(file_size=100_000))
    for made, alone in (("GLM_torch_dist", "alone"), ("GLM-FP8", "alone8"), ("GLM-hf", "back")):
        assert contents(base / made) == contents(tmp_path / alone)
    checks = [step["action"] for step in json.loads(answer.out)["steps"] if step["step"] == "verify"]
    assert checks == [f"verify {name}: {how}" for name in ("torch_dist", "fp8", "hf") for how in ("sample", "manifest")]


def test_targets_of_one_source_share_a_reading_unless_their_options_contradict(base):
    pipeline = load_pipeline(base / "pipeline.yaml")
    assert [[target.name for target in reading.targets] for reading in readings(pipeline, pipeline.targets)] == [["torch_dist", "fp8"], ["hf"]]
    other = THREE.replace("      last-layers-bf16: 1\n", "      shard-size: 200kB\n")
    (base / "pipeline.yaml").write_text(other)
    pipeline = load_pipeline(base / "pipeline.yaml")
    assert [[target.name for target in reading.targets] for reading in readings(pipeline, pipeline.targets)] == [["torch_dist"], ["fp8"], ["hf"]]


def test_a_dry_run_shows_what_is_done_and_what_is_left_and_writes_nothing(base, glmconv):
    before = marks(base)
    first = glmconv("run", base / "pipeline.yaml", "--dry-run", "--json")
    assert states(first) == {"torch_dist": "to do", "fp8": "to do", "hf": "waits for its source"}
    assert marks(base) == before
    assert glmconv("run", base / "pipeline.yaml", "--only", "torch_dist").code == 0
    (base / "GLM-FP8").mkdir()  # a folder that exists is not a target that is done
    second = glmconv("run", base / "pipeline.yaml", "--dry-run", "--json")
    assert states(second) == {"torch_dist": "done", "fp8": "to do", "hf": "to do"}
    (base / "GLM_torch_dist" / MANIFEST).unlink()
    third = glmconv("run", base / "pipeline.yaml", "--dry-run", "--json")
    assert states(third) == {"torch_dist": "begun", "fp8": "to do", "hf": "waits for its source"}
    sizes = {step["step"]: (step["bytes"], step["left"]) for step in json.loads(third.out)["steps"]}
    assert sizes["torch_dist"][1] == 0  # the manifest alone is to be written
    assert sizes["fp8"][0] == sizes["fp8"][1] > 0


def test_a_dry_run_of_a_source_on_the_hub_fetches_nothing(tmp_path, glmconv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("hub.yaml").write_text("source: zai-org/GLM-4.5\ntargets: {torch_dist: out}\n")
    answer = glmconv("run", "hub.yaml", "-n", "--json")
    assert (answer.code, states(answer)) == (0, {"torch_dist": "waits for its source"})
    assert glmconv("run", "hub.yaml").code == 5  # offline, and nowhere in the cache


def test_a_relative_path_of_a_target_is_not_taken_for_a_repository_of_the_hub(tiny, tmp_path, glmconv, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("chain.yaml").write_text(f"source: {tiny}\ntargets: {{torch_dist: made/mcore, hf: {{source: made/mcore, path: made/back}}}}\n")
    answer = glmconv("run", "chain.yaml", "--json")
    assert (answer.code, states(answer)) == (0, {"torch_dist": "converted", "hf": "converted"}), answer.err


def test_a_second_run_writes_nothing_and_an_unfinished_target_is_finished(base, glmconv):
    assert glmconv("run", base / "pipeline.yaml").code == 0
    before = marks(base)
    again = glmconv("run", base / "pipeline.yaml", "--json")
    assert states(again) == dict.fromkeys(("torch_dist", "fp8", "hf"), "done")
    assert marks(base) == before
    whole = contents(base / "GLM-FP8")
    (base / "GLM-FP8" / MANIFEST).unlink()
    (base / "GLM-FP8" / "config.json").unlink()
    assert states(glmconv("run", base / "pipeline.yaml", "--json")) == {"torch_dist": "done", "fp8": "converted", "hf": "done"}
    assert contents(base / "GLM-FP8") == whole


def test_only_names_steps_and_verify_checks_what_is_there(base, glmconv):
    nothing = glmconv("run", base / "pipeline.yaml", "--only", "verify")
    assert (nothing.code, "no target is finished" in nothing.err) == (5, True)
    assert glmconv("run", base / "pipeline.yaml", "--only", "fp8").code == 0
    assert not (base / "GLM_torch_dist").exists()
    assert glmconv("run", base / "pipeline.yaml", "--only", "verify").code == 0
    shard = next((base / "GLM-FP8").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    damaged = glmconv("run", base / "pipeline.yaml", "--only", "verify")
    assert (damaged.code, damaged.out, len(damaged.errors)) == (8, "", 1)
    unknown = glmconv("run", base / "pipeline.yaml", "--only", "fp16")
    assert (unknown.code, "Steps: torch_dist, fp8, hf" in unknown.err) == (2, True)


def test_a_place_that_belongs_to_something_else_is_exit_4_and_shown_by_a_dry_run(base, glmconv):
    (base / "GLM-FP8").mkdir()
    (base / "GLM-FP8" / "thesis.tex").write_text("years of work")
    assert states(glmconv("run", base / "pipeline.yaml", "-n", "--json"))["fp8"] == "something else is there"
    assert glmconv("run", base / "pipeline.yaml", "--only", "fp8").code == 4
    assert [path.name for path in (base / "GLM-FP8").iterdir()] == ["thesis.tex"]


def test_variables_come_from_set_then_the_environment_then_the_file(base, monkeypatch):
    path = base / "variables.yaml"
    path.write_text("source: ${A}/${B}\nvariables: {A: file, B: 4}\ntargets: {hf: /x}\n")
    assert load_pipeline(path).source == "file/4"
    monkeypatch.setenv("A", "${B}")  # what is filled in is not looked at again
    assert load_pipeline(path).source == "${B}/4"
    assert load_pipeline(path, {"A": "set"}).source == "set/4"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("source: /a\ntargets: {hf: /b}\nsauce: x\n", "'sauce' means nothing here"),
        ("source: /a\nsource: /b\ntargets: {hf: /c}\n", "is there twice"),
        ("source: /a\ntargets: {hf: /b, torch_dist: /b}\n", "two targets are /b"),
        ("source: /a\ntargets: {hf: {to: hf}}\n", "path is missing"),
        ("source: /a\ntargets: {banana: /b}\n", "no target is called so"),
        ("source: /a\ntargets: {verify: /b}\n", "no name for a target"),
        ("source: /a\ntargets: {x: {to: 'gguf:Q8_0', path: '/b/{preset}.gguf'}}\n", "a pipeline's are written out"),
        ("source: /a\ntargets: {hf: /b}\nverify: maybe\n", "verify is none, or"),
        ("source: /a\ntargets: {hf: /b}\noptions: {mtp: perhaps}\n", "the option mtp"),
        ("source: /a\ntargets: {hf: /b}\noptions: {shard-size: huge}\n", "the option shard-size"),
        ("source: /a\ntargets: {hf: /b}\noptions: {workers: 3}\n", "'workers' is no option of a target"),
        ("source: /a\ntargets: {hf: {path: /b, options: {iteration: 7}}}\n", "means nothing to a target of this kind"),
        ("source: ${NOT_SET_ANYWHERE}\ntargets: {hf: /b}\n", "${NOT_SET_ANYWHERE} is not set"),
        ("source: ${EMPTY}/x\ntargets: {hf: /b}\nvariables: {EMPTY: ''}\n", "${EMPTY} is empty"),
        ("source: /a\ntargets: {hf: {path: /b, source: /c}, torch_dist: {path: /c, source: /b}}\n", "each other's source"),
        ("source: /a\n", "neither targets nor a download"),
        ("source: [/a]\ntargets: {hf: /b}\n", "source is no text"),
        ("source: /a\ndownload: zai/../x\ntargets: {hf: /b}\n", "no preset is called"),
        ("- source\n", "is no mapping"),
        ("source: &a /a\ntargets: {hf: *a}\n", "aliases"),
        ("source: !!python/object/apply:os.system [id]\ntargets: {hf: /b}\n", "source is missing"),
        ("a: " + "[" * 100, "nested too deeply"),
        ("source: \x00", "is not plain YAML"),
    ],
)  # fmt: skip
def test_a_pipeline_that_is_wrong_is_exit_2_with_one_line(text, said, tmp_path, glmconv):
    (tmp_path / "wrong.yaml").write_text(text)
    answer = glmconv("run", tmp_path / "wrong.yaml")
    assert (answer.code, answer.out, len(answer.errors)) == (2, "", 1), answer.err
    assert said in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.yaml"]


def test_a_pipeline_that_is_not_there_is_exit_2(tmp_path, glmconv):
    assert glmconv("run", tmp_path / "none.yaml").code == 2


def test_options_mean_what_they_mean_to_convert():
    spelled = {"shard-size": "5GB", "mtp": "drop", "keep": ["a", "b"], "serve-tp": 8, "megatron-dialect": "bridge"}
    found = parse_options(spelled)
    assert {name: found[name] for name in ("file_size", "mtp", "keep", "serve_tp", "megatron_dialect")} == {
        "file_size": 5 * 10**9, "mtp": False, "keep": ("a", "b"), "serve_tp": 8, "megatron_dialect": "bridge",
    }  # fmt: skip
    assert Options(**found).mtp is False


def test_the_pipelines_that_ship_are_in_order():
    folder = Path(__file__).parent.parent.parent / "pipelines"
    values = {"BASE_DIR": "/data", "NAME": "GLM-4.5", "MODEL": "GLM-4.5-355B-A32B", "TRAINED": "/data/run"}
    found = {path.name: load_pipeline(path, values) for path in folder.glob("*.yaml")}
    assert [target.name for target in found["release.yaml"].targets] == ["torch_dist", "fp8", "awq", "gguf"]
    assert len(readings(found["release.yaml"], found["release.yaml"].targets)) == 1
    assert found["release.yaml"].download.hub == "zai-org/GLM-4.5"
    assert [str(target.path) for target in found["export.yaml"].targets] == ["/data/GLM-4.5-hf"]
