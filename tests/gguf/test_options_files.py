"""Which files a GGUF target has, what they are called, and what rides along in them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from glmconv import Options, convert, open_checkpoint
from glmconv.archs import bind, preset_named
from glmconv.convert import plan
from glmconv.dtypes import BY_NAME
from glmconv.formats.format import FileLayout
from glmconv.formats.gguf_embed import embedded_source
from glmconv.formats.gguf_header import write_header
from glmconv.formats.gguf_metadata import embedded_files
from glmconv.formats.gguf_types import Array, Entry, Kind
from glmconv.formats.origin import parse_layout
from tests.conftest import EACH, ONE_OF_EACH
from tests.gguf.llama import TOKENS, next_tokens
from tests.gguf.options_peer import PRESET, SPLIT, TOY, VECTORS, header, seen

PEER = json.loads(VECTORS.read_bytes())
PROMPT = [5, 70, 99, 260, 33]
FLAT = "glm4-9B-0414"


@pytest.mark.parametrize("case", SPLIT)
def test_several_files_are_those_of_llama_gguf_split(case, toy, glmconv, tmp_path):
    answer = glmconv("convert", toy(PRESET, TOY), tmp_path / "A.gguf", "--to", "gguf:Q8_0", *SPLIT[case])
    assert answer.code == 0, answer.err
    found = {path.name: seen(path) for path in sorted(tmp_path.glob("*.gguf"))}
    assert found == PEER[case]
    first = next(iter(found))
    assert answer.out.startswith(f"{tmp_path / first}: gguf:Q8_0")
    assert glmconv("verify", tmp_path / first).code == 0


def test_the_first_of_several_files_has_the_single_files_keys(toy, tmp_path):
    source = toy(FLAT, EACH)
    convert(source, {"gguf:Q8_0": tmp_path / "whole.gguf"})
    convert(source, {"gguf:Q8_0": tmp_path / "A.gguf"}, options=Options(split_max_tensors=20))
    whole, first = header(tmp_path / "whole.gguf").kv, header(tmp_path / "A-00001-of-00003.gguf").kv
    assert list(first.items())[:-3] == list(whole.items())
    assert list(first)[-3:] == list(header(tmp_path / "A-00003-of-00003.gguf").kv) == ["split.no", "split.tensors.count", "split.count"]


def test_several_files_are_checked_guarded_and_written_again_as_one_output(toy, glmconv, tmp_path):
    source, out, split = toy(FLAT, EACH), tmp_path / "A.gguf", ("--split-max-size", "60kB")
    answer = glmconv("convert", source, out, "--to", "gguf:Q8_0", *split, "--json")
    [target] = json.loads(answer.out)["targets"]
    assert Path(target["path"]).name.startswith("A-00001-of-000")
    assert "tensors are larger than --split-max-size" in answer.err
    files = sorted(tmp_path.glob("A-*.gguf"))
    assert len(files) == target["files_written"] > 3
    assert "nothing was written" in glmconv("convert", source, out, "--to", "gguf:Q8_0", *split).out
    assert glmconv("convert", source, out, "--to", "gguf:Q8_0").code == 4  # in one file it is another conversion
    assert glmconv("verify", source, files[1], "--exact").code == 0
    files[-1].write_bytes(files[-1].read_bytes()[:-1] + b"\1")
    assert glmconv("verify", files[0]).code == glmconv("verify", source, files[0], "--exact").code == 1
    files[1].unlink()
    assert glmconv("convert", source, out, "--to", "gguf:Q8_0", *split).code == 0
    assert glmconv("verify", files[1]).code == 0


def test_llama_cpp_runs_several_files_with_the_source_inside(toy, tmp_path):
    pytest.importorskip("xllamacpp")
    source = toy("glm4.7-flash-30B-A3B", replace(EACH, experts=16))
    convert(source, {"gguf:Q8_0": tmp_path / "A.gguf"}, options=Options(split_max_tensors=30, embed_source=True))
    convert(source, {"gguf:Q8_0": tmp_path / "whole.gguf"})
    found = next_tokens(min(tmp_path.glob("A-00001-of-*.gguf")), PROMPT)
    assert len(found) == TOKENS
    assert found == next_tokens(tmp_path / "whole.gguf", PROMPT)


@pytest.mark.parametrize("preset", ONE_OF_EACH)
def test_the_source_rides_along_behind_all_other_keys(preset, toy, tmp_path):
    source = toy(preset, EACH)
    options = Options(embed_source=True)
    convert(source, {"gguf:F16": tmp_path / "with.gguf"}, options=options)
    convert(source, {"gguf:F16": tmp_path / "without.gguf"})
    first, second = header(tmp_path / "with.gguf"), header(tmp_path / "without.gguf")
    assert list(first.kv.items())[: len(second.kv)] == list(second.kv.items())
    files = embedded_files(dict(list(first.kv.items())[len(second.kv) :]))
    layout = parse_layout(json.loads(files.pop("glmconv_layout.json")), tmp_path)
    with open_checkpoint(source) as opened:
        assert layout == opened.opened.layout
    beside = {path.name: path.read_bytes() for path in source.iterdir() if path.suffix != ".safetensors" and path.is_file()}
    assert files == {name: content for name, content in beside.items() if name in files}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"} & set(beside) <= set(files)
    assert (tmp_path / "with.gguf").read_bytes()[first.data_start :] == (tmp_path / "without.gguf").read_bytes()[second.data_start :]


def test_a_quantized_sources_config_rides_along_without_its_quantization(toy, tmp_path):
    convert(toy(FLAT, EACH), {"fp8:channel": tmp_path / "fp8"})
    convert(tmp_path / "fp8", {"gguf:Q8_0": tmp_path / "a.gguf"}, options=Options(embed_source=True))
    assert "quantization_config" in json.loads((tmp_path / "fp8/config.json").read_bytes())
    assert "quantization_config" not in json.loads(embedded_files(header(tmp_path / "a.gguf").kv)["config.json"])


class Bytes:
    """A side file of this content."""

    def __init__(self, content):
        self.content = content
        self.shape, self.dtype = (len(content),), BY_NAME["uint8"]

    def read_into(self, start, out):
        out[:] = self.content[start : start + len(out)]


def test_what_rides_along_of_a_large_model_can_be_read_again(tiny, tmp_path):
    spec, preset = preset_named("glm5-744B-A40B")
    names = tuple(bind(spec, preset.config, aliases=True).tensors)
    tokens = Array(Kind.STRING, [f"Ġ{number:06d}" for number in range(154_880)])
    merges = Array(Kind.STRING, [f"Ġ{number:05d} {number:05d}" for number in range(321_649)])
    others = [Entry("tokens", Kind.ARRAY, tokens), Entry("types", Kind.ARRAY, Array(Kind.I32, range(154_880))), Entry("merges", Kind.ARRAY, merges)]
    files = {"tokenizer.json": "aé".encode() * 6_600_000, "notes.md": b"\xff", "merges.txt": b"m" * 20_000_000, "vocab.json": b"v" * (25 << 20)}
    with open_checkpoint(tiny) as source:
        layout = FileLayout((("model-00001-of-00001.safetensors", {"format": "pt"}, names),), {})
        opened = replace(source.opened, side_files={name: Bytes(content) for name, content in files.items()}, layout=layout)
        entries, notes = embedded_source(opened, others, len(names))
    assert len(names) > 59_000
    (tmp_path / "a.gguf").write_bytes(write_header([*others, *entries], []))
    inside = embedded_files(header(tmp_path / "a.gguf").kv)  # within what is read
    assert {"config.json", "tokenizer.json"} <= set(inside)
    told = " ".join(notes)
    assert "notes.md does not ride along: it is not UTF-8" in told
    assert "vocab.json does not ride along: it has more than" in told
    assert set(inside) | {note.split()[0] for note in notes} == {"config.json", *files, "glmconv_layout.json"}


@pytest.mark.parametrize("preset", ["glm4.5-355B-A32B", "glm4.7-flash-30B-A3B", "glm5.2-744B-A40B"])
def test_mtp_only_and_mtp_drop_are_two_parts_of_the_whole(preset, toy, glmconv, tmp_path):
    for mtp in ("keep", "drop", "only"):
        assert glmconv("convert", toy(preset, EACH), tmp_path / f"{mtp}.gguf", "--to", "gguf:Q8_0", "--mtp", mtp).code == 0
        assert glmconv("verify", toy(preset, EACH), tmp_path / f"{mtp}.gguf", "--exact", "--mtp", "keep" if mtp == "only" else mtp).code == 0
    keep, drop, only = (header(tmp_path / f"{mtp}.gguf") for mtp in ("keep", "drop", "only"))
    shared = {"token_embd.weight", "output_norm.weight", "output.weight"}
    assert set(only.tensors) & set(drop.tensors) == shared
    assert set(only.tensors) | set(drop.tensors) == set(keep.tensors)
    assert all(name.startswith("blk.4.") for name in set(only.tensors) - shared)
    assert list(only.kv.items()) == list(keep.kv.items())  # as llama.cpp's converter has it with --mtp
    arch = keep.kv["general.architecture"].value
    assert keep.kv[f"{arch}.block_count"].value == drop.kv[f"{arch}.block_count"].value + 1 == 5
    assert [key for key in keep.kv if key not in drop.kv] == [f"{arch}.nextn_predict_layers"]


def test_mtp_only_of_a_model_without_mtp_layers_is_refused(toy, glmconv, tmp_path):
    answer = glmconv("convert", toy(FLAT, EACH), tmp_path / "a.gguf", "--to", "gguf:Q8_0", "--mtp", "only")
    assert answer.code == 5
    assert "has no MTP layer" in answer.err


def test_a_name_is_filled_in_for_each_target(toy, glmconv, tmp_path):
    source = toy(FLAT, EACH)
    answer = glmconv("convert", source, tmp_path / "{x}" / "GLM-{preset}-{arch}-{type}.gguf", "--to", "gguf:q8_0", "--to", "gguf:f16", "--json")
    assert answer.code == 0, answer.err
    preset = "glm4-9B-0414"
    assert [Path(target["path"]).name for target in json.loads(answer.out)["targets"]] == [
        f"GLM-{preset}-glm4-{kind}.gguf" for kind in ("Q8_0", "F16")
    ]
    out = tmp_path / "{x}" / f"GLM-{preset}-glm4-Q8_0.gguf"
    assert glmconv("verify", source, out, "--exact").code == 0
    [target] = json.loads(glmconv("plan", source, tmp_path / "{type}{{.gguf", "--to", "gguf:q4_k_m", "--json").out)["targets"]
    assert Path(target["path"]).name == "Q4_K_M{{.gguf"


@pytest.mark.parametrize("name", ["{}.gguf", "{Type}.gguf", "{type!r}.gguf", "{preset.__class__}.gguf", "{0}.gguf", "{type:>9}.gguf"])
def test_what_cannot_be_filled_in_is_a_usage_error(name, tiny, glmconv, tmp_path):
    answer = glmconv("plan", tiny, tmp_path / name, "--to", "gguf:Q8_0")
    assert answer.code == 2
    assert "{preset}, {arch}, {type}" in answer.err


def test_two_targets_of_one_name_are_a_usage_error(tiny, glmconv, tmp_path):
    assert glmconv("plan", tiny, tmp_path / "{preset}.gguf", "--to", "gguf:Q8_0", "--to", "gguf:F16").code == 2


def test_what_is_filled_in_leads_to_no_other_folder(toy, tmp_path):
    from tests.roundtrip.shards import copied

    changed = copied(toy(FLAT, EACH), tmp_path / "..{type} \\ a")
    config = json.loads((changed / "config.json").read_bytes())
    (changed / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 77}))
    [target] = plan(changed, ["gguf:Q8_0"], tmp_path / "o" / "{preset}.gguf").targets
    assert Path(str(target["path"])).parent == tmp_path / "o"
