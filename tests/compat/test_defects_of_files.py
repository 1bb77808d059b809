"""Defects of other converters in what they write around the weights, in what a crash leaves, in safety and cost, each under its number."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

import glmconv
from glmconv import Options, convert, open_checkpoint
from glmconv.errors import Interrupted, SourceError, UnsupportedError
from tests.compat.conftest import COMPAT, SMALL, WIDE
from tests.roundtrip.shards import contents, copied

GLM = "glm4.5-355B-A32B"
INDEX = "model.safetensors.index.json"
CODE = b"cos\nsystem\n(S'touch %s'\ntR."


@pytest.fixture
def source(toy) -> Path:
    return toy(GLM, SMALL)


@pytest.fixture
def mcore(source, tmp_path) -> Path:
    convert(source, {"torch_dist": tmp_path / "mcore"})
    return tmp_path / "mcore"


def total(folder: Path) -> tuple[int, int]:
    """(the index's total_size, the bytes of all tensors)."""
    index = json.loads((folder / INDEX).read_text())
    return index["metadata"]["total_size"], sum(t.nbytes for shard in folder.glob("*.safetensors") for t in load_file(shard).values())


def stopped(source: Path, to: str, there: Path) -> None:
    """A conversion that is stopped in its middle, as if by a signal."""
    stop = threading.Event()
    with pytest.raises(Interrupted):
        convert(source, {to: there}, options=Options(workers=1), stop=stop, progress=lambda done: stop.set())


@pytest.mark.parametrize("to", ["fp8", "int4:g32"])
def test_d30_total_size_is_the_sum_of_all_bytes(to, wide, tmp_path):
    convert(wide, {to: tmp_path / "out"}, options=Options(file_size=4_000_000))
    said, there = total(tmp_path / "out")
    assert said == there


def test_d31_total_size_is_right_where_tensors_come_from_the_origin(source, dropin, tmp_path):
    convert(source, {"torch_dist": tmp_path / "mcore"}, options=Options(mtp=False))
    words = ("--input-dir", tmp_path / "mcore", "--output-dir", tmp_path / "out", "--origin-hf-dir", source, "-a", "--chunk-size", 200_000)
    assert dropin("tools/convert_torch_dist_to_hf.py", *words).code == 0
    said, there = total(tmp_path / "out")
    assert said == there
    assert "model.layers.4.eh_proj.weight" in json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]


def test_d32_shards_are_numbered_from_one_and_have_the_size_that_the_help_says(source, mcore, dropin, tmp_path):
    words = ("--input-dir", mcore, "--output-dir", tmp_path / "out", "--chunk-size", 400_000)
    assert dropin("tools/convert_torch_dist_to_hf.py", *words).code == 0
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    largest = max(t.nbytes for shard in source.glob("*.safetensors") for t in load_file(shard).values())
    assert all((tmp_path / "out" / name).stat().st_size < max(400_000, largest) + 50_000 for name in shards)


@pytest.mark.parametrize("to", ["hf", "fp8:channel", "torch_dist"])
def test_d33_d40_d41_d42_d47_a_run_that_is_stopped_leaves_nothing_that_says_done(to, toy, tmp_path):
    wide = toy("glm4.7-355B-A32B", WIDE)
    stopped(wide, to, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").rglob("*")}
    assert not names & {INDEX, "config.json", "latest_checkpointed_iteration.txt", "metadata.json", ".metadata", "glmconv_manifest.json"}
    with pytest.raises((SourceError, UnsupportedError)):  # nor is it taken for a cache hit
        open_checkpoint(tmp_path / "out")
    convert(wide, {to: tmp_path / "out"})
    convert(wide, {to: tmp_path / "whole"})
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_d34_every_script_that_the_documents_name_is_there():
    named = ("tools/convert_hf_to_torch_dist.py", "tools/convert_torch_dist_to_hf.py", "tools/convert_torch_dist_to_hf_parallel.py",
             "tools/convert_torch_dist_to_hf_ray.py", "tools/convert_hf_to_fp8.py", "tools/fp8_cast_bf16.py", "tools/convert_hf_to_int4.py",
             "tools/convert_hf_to_int4_direct.py", "tools/convert_hf_to_mxfp8.py", "tools/convert_to_hf.py", "tools/offline_hf_consolidation.py",
             "tools/merge_lora.py", "examples/conversion/convert_checkpoints.py", "scripts/conversion/convert.sh",
             "scripts/models/glm4.5-355B-A32B.sh", "src/deployment/quantization/awq_quantize.py", "src/deployment/quantization/gguf_convert.py",
             "src/deployment/quantization/fp8_quant.py")  # fmt: skip
    assert [name for name in named if not (COMPAT / name).is_file()] == []


def test_d43_a_failure_keeps_the_files_that_are_done(source, tmp_path):
    convert(source, {"torch_dist": tmp_path / "mcore"}, options=Options(file_size=200_000))
    broken = copied(tmp_path / "mcore", tmp_path / "broken")
    last = max((broken / "release").glob("*.distcp"), key=lambda path: int(path.stem.rpartition("_")[2]))
    data = bytearray(last.read_bytes())
    at = data.index(b"PK\x05\x06")
    data[at : at + 4] = b"\0\0\0\0"
    last.write_bytes(data)
    with pytest.raises(SourceError):
        convert(broken, {"hf": tmp_path / "hf"}, options=Options(file_size=100_000, workers=1))
    assert list((tmp_path / "hf").glob("*.safetensors"))


@pytest.mark.parametrize("to", ["gguf:F16", "hf"])
def test_d44_d45_a_file_has_its_name_only_when_it_is_whole(to, toy, tmp_path):
    wide = toy("glm4.7-355B-A32B", WIDE)
    there = tmp_path / ("model.gguf" if to.startswith("gguf") else "hf")
    stopped(wide, to, there)
    left = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".safetensors")}
    convert(wide, {to: there})
    whole = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".gguf", ".safetensors")}
    assert all(whole[name] == data for name, data in left.items())
    assert not to.startswith("gguf") or not left


def test_d46_force_moves_aside_and_deletes_nothing(mcore, dropin, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/weeks.txt").write_text("of training")
    words = ("--input-dir", mcore, "--output-dir", tmp_path / "out", "--force")
    assert dropin("tools/convert_torch_dist_to_hf_ray.py", *words).code == 0
    assert (tmp_path / "out.bak-1/weeks.txt").read_text() == "of training"


@pytest.mark.parametrize("name", ["common.pt", ".metadata"])
def test_d50_d51_no_pickle_runs(name, mcore, tmp_path):
    broken = copied(mcore, tmp_path / "broken")
    (broken / "release" / name).write_bytes(CODE % str(tmp_path / "pwned").encode())
    (broken / "glmconv_origin/config.json").unlink()  # so that common.pt is asked
    with pytest.raises((SourceError, UnsupportedError)):
        open_checkpoint(broken)
    assert not (tmp_path / "pwned").exists()


def test_d52_code_that_a_release_names_is_not_loaded(source, tmp_path):
    folder = copied(source, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    (folder / "modeling.py").write_text(f"open({str(tmp_path / 'pwned')!r}, 'w')")
    done = convert(folder, {"torch_dist": tmp_path / "mcore"})
    assert any("auto_map ignored" in note for note in done.notes)
    assert not (tmp_path / "pwned").exists()
    assert not list((tmp_path / "mcore").rglob("*.py"))


def test_d53_pickled_weights_are_refused(source, tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "hf/pytorch_model.bin").write_bytes(CODE % b"x")
    with pytest.raises(UnsupportedError, match="pickled weights"):
        open_checkpoint(tmp_path / "hf")


def test_d60_any_number_of_ranks_will_do(source):
    shares = glmconv.plan(source, ["torch_dist"], ranks=97).ranks  # far more than layers, and a prime
    assert len(shares) == 97
    assert sum(share["jobs"] for share in shares) == glmconv.plan(source, ["torch_dist"]).jobs


def test_d61_d62_memory_does_not_grow_with_the_model(toy, tmp_path):
    small, large = toy(GLM, SMALL), toy("glm4.7-355B-A32B", WIDE)
    options = Options(workers=2)
    first = glmconv.plan(small, ["torch_dist"], options=options)  # imports what it needs
    peaks = [glmconv.plan(path, ["torch_dist"], options=options).peak_memory for path in (small, large)]
    assert glmconv.plan(large, ["torch_dist"]).bytes_written > 5 * first.bytes_written
    assert peaks[1] - peaks[0] < 4_000_000


def test_d65_gguf_is_written_from_a_quantized_source_without_a_file_between(wide_fp8, tmp_path):
    convert(wide_fp8, {"gguf:Q8_0": tmp_path / "out/model.gguf"})
    beside = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != "model.gguf")
    assert beside < (tmp_path / "out/model.gguf").stat().st_size / 20


def test_d66_a_difference_is_an_exit_code(source, toy, glmconv):
    assert glmconv("verify", source, toy(GLM, replace(SMALL, seed=1))).code == 1
    assert glmconv("verify", source, source).code == 0


@pytest.mark.parametrize(
    ("words", "symmetric"),
    [((), True), (("--is-symmetric",), True), (("--is-symmetric", "true"), True), (("--is-symmetric", "False"), False)],
)
def test_d68_symmetric_is_a_flag_and_a_word_and_its_default_is_said(words, symmetric, dropin, wide, tmp_path):
    answer = dropin("tools/convert_hf_to_int4_direct.py", "--model-dir", wide, "--save-dir", tmp_path / "out", *words)
    assert answer.code == 0, answer.err
    groups = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]["config_groups"]
    assert [group["weights"]["symmetric"] for group in groups.values()] == [symmetric]
    assert ("symmetric is taken" in answer.err) == (not words)


def test_d69_a_checkpoint_with_common_pt_alone_is_exported(source, mcore, dropin, tmp_path):
    bare = tmp_path / "bare"
    copied(mcore / "release", bare / "iter_0000037")
    (bare / "latest_checkpointed_iteration.txt").write_text("37")
    assert not list(bare.rglob("run_config.yaml"))
    words = ("export", "--hf-model", source, "--megatron-path", bare, "--hf-path", tmp_path / "out")
    assert dropin("examples/conversion/convert_checkpoints.py", *words).code == 0
    assert glmconv.verify_same(source, tmp_path / "out").same
