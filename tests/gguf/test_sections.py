"""GGUF files in sections: the same bytes as whole ones, several workers at one file, and a stopped run goes on where it was."""

from __future__ import annotations

import threading

import pytest

from glmconv import Options, convert, open_checkpoint
from glmconv.convert import plan, plan_targets
from glmconv.engine.files import Disk
from glmconv.engine.inputs import InputFolder
from glmconv.engine.manifest import load_manifest
from glmconv.engine.preflight import Target
from glmconv.engine.run import run
from glmconv.errors import Interrupted
from glmconv.formats import gguf_layout, gguf_pieces
from glmconv.formats.gguf_header import read_header
from glmconv.targets import parse_target
from tests.conftest import EACH, ONE_OF_EACH
from tests.gguf.importance import written as imatrix
from tests.roundtrip.shards import contents


def header(path):
    return read_header(InputFolder(path.parent).open(path.name))


@pytest.fixture
def small_sections(monkeypatch):
    def sections(size: int) -> None:
        for module in (gguf_layout, gguf_pieces):
            monkeypatch.setattr(module, "SECTION", size)

    return sections


@pytest.mark.parametrize("preset", ONE_OF_EACH)
@pytest.mark.parametrize("target", ["gguf:Q4_0", "gguf:F16"])
def test_a_file_in_sections_has_the_bytes_of_a_whole_one(preset, target, toy, small_sections, tmp_path):
    convert(toy(preset, EACH), {target: tmp_path / "whole.gguf"})
    small_sections(3000)
    assert plan(toy(preset, EACH), [target]).jobs > 20
    convert(toy(preset, EACH), {target: tmp_path / "cut.gguf"}, options=Options(workers=3))
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("target", ["gguf:mmproj", "gguf:mmproj-F16", "gguf:mmproj-Q8_0"])
def test_a_tower_in_sections_has_the_bytes_of_a_whole_one(target, toy, small_sections, tmp_path):
    convert(toy("glm4.5v-108B-A12B", EACH), {target: tmp_path / "whole.gguf"})
    small_sections(3000)
    assert plan(toy("glm4.5v-108B-A12B", EACH), [target]).jobs > 20
    convert(toy("glm4.5v-108B-A12B", EACH), {target: tmp_path / "cut.gguf"}, options=Options(workers=3))
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("preset", ["glm4.5-355B-A32B", "glm5.2-744B-A40B"])
def test_each_part_of_a_stack_has_the_importance_of_its_own_experts(preset, toy, small_sections, tmp_path):
    source = toy(preset, EACH)
    convert(source, {"gguf:F16": tmp_path / "plain.gguf"})
    options = Options(imatrix=imatrix(header(tmp_path / "plain.gguf").tensors, tmp_path / "imatrix.gguf"))
    convert(source, {"gguf:Q5_0": tmp_path / "whole.gguf"}, options=options)
    small_sections(2000)
    convert(source, {"gguf:Q5_0": tmp_path / "cut.gguf"}, options=options)
    assert (tmp_path / "cut.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert any("exps.weight[" in name for name in load_manifest(Disk(), tmp_path / "cut.gguf.glmconv").tensors)


def test_a_stopped_run_keeps_the_sections_that_were_done(toy, small_sections, glmconv, tmp_path):
    source, target = toy("glm4.7-flash-30B-A3B", EACH), "gguf:Q8_0"
    small_sections(5000)
    convert(source, {target: tmp_path / "whole" / "model.gguf"})
    size, stop, written = plan(source, [target]).bytes_written, threading.Event(), []

    def progress(done):
        written.append(done)
        if sum(written) > size // 2:
            stop.set()

    with pytest.raises(Interrupted):
        convert(source, {target: tmp_path / "again" / "model.gguf"}, options=Options(workers=2), progress=progress, stop=stop)
    assert not (tmp_path / "again" / "model.gguf").exists()
    done = convert(source, {target: tmp_path / "again" / "model.gguf"}, options=Options(workers=2))
    assert 0 < done.outcomes[0].bytes_written < 0.7 * size
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")
    out = tmp_path / "again" / "model.gguf"
    assert glmconv("verify", out).code == glmconv("verify", source, out, "--exact").code == 0
    content = bytearray(out.read_bytes())
    content[len(content) // 2] ^= 1
    out.write_bytes(content)
    answer = glmconv("verify", out)
    assert answer.code == 1
    assert "differs from its sha256" in answer.out + answer.err


def test_the_first_of_several_files_is_named_last(toy, tmp_path):
    class Watching(Disk):
        def link(self, source, target):
            if target.suffix == ".gguf":
                order.append(target.name)
            super().link(source, target)

    order: list[str] = []
    source = toy("glm4-9B-0414", EACH)
    with open_checkpoint(source) as opened:
        options = Options(split_max_tensors=7)
        specs = [parse_target("gguf:Q8_0", tmp_path / "model.gguf")]
        plans = plan_targets(opened, specs, options)
        run([Target(plans[0], specs[0].root)], opened, disk=Watching())
    assert len(order) > 3
    assert order[-1].startswith("model-00001-of-")
