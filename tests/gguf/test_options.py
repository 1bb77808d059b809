"""Options of writing GGUF: importance files, types chosen by hand, what a plan says of each tensor, what is refused."""

from __future__ import annotations

import json

import pytest

from glmconv import Options, convert, open_checkpoint
from glmconv.convert import plan, plan_again
from glmconv.errors import SourceError, UnsupportedError, UsageError
from glmconv.formats.gguf_imatrix import Importance, WeightImportance
from glmconv.formats.gguf_rows import gguf_derived
from tests.conftest import EACH
from tests.gguf.importance import gguf_form, sums_of, written
from tests.gguf.options_peer import PRESET, QUANTIZED, TOY, VECTORS, header, seen

PEER = json.loads(VECTORS.read_bytes())
FLAT = "glm4-9B-0414"  # no experts, no MTP layer


@pytest.fixture(scope="module")
def case(toy, tmp_path_factory):
    """The toy of the stored cases, and a folder with importance files of both forms."""
    folder = tmp_path_factory.mktemp("importance")
    convert(toy(PRESET, TOY), {"gguf:BF16": folder / "bf16.gguf"})
    tensors = header(folder / "bf16.gguf").tensors
    written(tensors, folder / "new.imatrix")
    written(tensors, folder / "old.imatrix", old=True)
    return toy(PRESET, TOY), folder


def importance(toy, folder, preset=FLAT, options=EACH, name="imatrix.gguf", without=()):
    """An importance file of this toy, but for the weights in whose name one of `without` is."""
    convert(toy(preset, options), {"gguf:BF16": folder / "model-bf16.gguf"})
    sums = sums_of(header(folder / "model-bf16.gguf").tensors)
    (folder / name).write_bytes(gguf_form({weight: pair for weight, pair in sums.items() if not any(part in weight for part in without)}))
    return folder / name


@pytest.mark.parametrize("name", QUANTIZED)
def test_the_file_is_llama_quantizes_own(name, case, glmconv, tmp_path):
    source, folder = case
    file_type, options = QUANTIZED[name]
    spelled = [str(folder / word) if word.endswith(".imatrix") else word for word in options]
    answer = glmconv("convert", source, tmp_path / "out.gguf", "--to", f"gguf:{file_type}", *spelled)
    assert answer.code == 0, answer.err
    assert seen(tmp_path / "out.gguf") == PEER[name]


def test_an_importance_file_belongs_to_the_plan_whatever_it_is_called_when_verified(toy, glmconv, tmp_path):
    source, file, out = toy(FLAT, EACH), importance(toy, tmp_path), tmp_path / "out.gguf"
    assert glmconv("convert", source, out, "--to", "gguf:Q4_0", "--imatrix", file).code == 0
    assert glmconv("convert", source, out, "--to", "gguf:Q4_0").code == 4  # another conversion
    answer = glmconv("verify", source, out, "--exact")
    assert (answer.code, "imatrix.gguf" in answer.err, "sha256" in answer.err) == (2, True, True)
    file.rename(tmp_path / "elsewhere")
    assert glmconv("verify", source, out, "--exact", "--imatrix", tmp_path / "elsewhere").code == 0
    (tmp_path / "elsewhere").write_bytes(gguf_form(sums_of({k: v for k, v in header(out).tensors.items() if "blk.0" in k})))
    assert glmconv("verify", source, out, "--exact", "--imatrix", tmp_path / "elsewhere").code == 2
    assert glmconv("verify", source, out, "--imatrix", tmp_path / "elsewhere").code == 2  # only --exact asks for it


def test_what_has_no_importance_data_is_said(toy, glmconv, tmp_path):
    preset = "glm4.7-flash-30B-A3B"
    file = importance(toy, tmp_path, preset, without=("blk.1.ffn_up_shexp",))
    said = glmconv("plan", toy(preset, EACH), "--to", "gguf:Q4_0", "--imatrix", file).err
    assert "imatrix.gguf has no entry for 1 of the 33 tensors that it could change: blk.1.ffn_up_shexp.weight" in said
    assert "imatrix.gguf has no entry for 10 tensors of MTP layers, embedding and head, as usual: token_embd.weight" in said
    idle = [int((counts == 0).sum()) for _, counts in sums_of(header(tmp_path / "model-bf16.gguf").tensors).values() if (counts == 0).any()]
    assert f"{sum(idle)} experts of {len(idle)} tensors have no data in imatrix.gguf" in said
    fewer = glmconv("plan", toy(preset, EACH), "--to", "gguf:Q4_0", "--imatrix", file, "--mtp", "only").err
    assert "entries of imatrix.gguf belong to no tensor here" in fewer


@pytest.mark.parametrize(("spoil", "says"), [
    (lambda data: data[:-32], "ends early"),
    (lambda data: data.replace(b"imatrix", b"imatrux"), "not imatrix"),
    (lambda data: data[:-200] + b"\xff\xff\xff\x7f" * 50, "not finite"),
    (lambda data: b"", "ends early"),
])  # fmt: skip
def test_a_spoilt_importance_file_is_refused_before_anything_is_written(spoil, says, toy, glmconv, tmp_path):
    file = importance(toy, tmp_path)
    file.write_bytes(spoil(file.read_bytes()))
    answer = glmconv("convert", toy(FLAT, EACH), tmp_path / "o" / "out.gguf", "--to", "gguf:Q4_0", "--imatrix", file)
    assert answer.code == 5
    assert says in answer.err
    assert not (tmp_path / "o").exists()


def test_an_importance_of_zeros_is_refused_for_what_it_would_make_of_the_weight(toy, glmconv, tmp_path):
    preset = "glm4.7-flash-30B-A3B"
    file = importance(toy, tmp_path, preset)
    sums = sums_of(header(tmp_path / "model-bf16.gguf").tensors)
    values, counts = sums["blk.2.ffn_up_exps.weight"]
    values[1], counts[1] = 0, 5
    file.write_bytes(gguf_form(sums))
    answer = glmconv("convert", toy(preset, EACH), tmp_path / "o" / "out.gguf", "--to", "gguf:Q4_0", "--imatrix", file)
    assert answer.code == 5
    assert "blk.2.ffn_up_exps.weight: has nothing but zeros in imatrix.gguf for matrix 1 of 4" in answer.err
    assert not (tmp_path / "o").exists()


def test_importance_of_another_shape_is_refused(toy, tmp_path):
    file = importance(toy, tmp_path, FLAT, TOY)
    with pytest.raises(SourceError, match="Was it made from this model"):
        convert(toy(FLAT, EACH), {"gguf:Q8_0": tmp_path / "out.gguf"}, options=Options(imatrix=file))


def test_an_importance_file_that_changes_is_noticed(toy, tmp_path, monkeypatch):
    file, read = importance(toy, tmp_path), WeightImportance.read

    def spoilt(self):
        file.write_bytes(file.read_bytes() + bytes(32))
        return read(self)

    monkeypatch.setattr(WeightImportance, "read", spoilt)
    with pytest.raises(SourceError, match="changed while it was read"):
        convert(toy(FLAT, EACH), {"gguf:Q4_0": tmp_path / "out.gguf"}, options=Options(imatrix=file))
    assert not (tmp_path / "out.gguf").exists()


def test_values_are_read_when_a_tensor_is_begun(toy, tmp_path, monkeypatch):
    file, asked = importance(toy, tmp_path), []
    read = Importance._read
    monkeypatch.setattr(Importance, "unused", {})  # which reads all once, to check them

    def counted(self, name, stored):
        asked.append(name)
        return read(self, name, stored)

    monkeypatch.setattr(Importance, "_read", counted)
    plan(toy(FLAT, EACH), ["gguf:Q4_0"], options=Options(imatrix=file))
    assert len(asked) == len(set(asked)) > 10  # looked at once, and not kept
    convert(toy(FLAT, EACH), {"gguf:Q4_0": tmp_path / "out.gguf"}, options=Options(imatrix=file))
    assert {asked.count(name) for name in asked} == {3}  # planned twice, begun once


def test_a_plan_gives_each_tensors_type_and_why(toy, glmconv):
    source = toy(FLAT, EACH)
    words = ("--tensor-type", r"blk\.0\..*=f16", "--token-embedding-type", "Q8_0")
    [target] = json.loads(glmconv("plan", source, "--to", "gguf:q4_k_m", *words, "--json").out)["targets"]
    tensors = {tensor["name"]: tensor for tensor in target["tensors"]}
    assert (target["to"], target["tensor_count"]) == ("gguf:Q4_K_M", len(tensors))
    assert tensors["token_embd.weight"]["why"] == tensors["blk.0.attn_q.weight"]["why"] == "override"
    assert (tensors["blk.0.attn_q.weight"]["type"], tensors["blk.0.attn_norm.weight"]["type"]) == ("F16", "F32")
    assert {tensor["why"] for tensor in tensors.values()} >= {"kept", "override", "fallback from Q4_K"}
    with_rows = [tensor for tensor in tensors.values() if tensor["name"] == "output.weight"]
    assert with_rows[0]["shape"][0] > with_rows[0]["shape"][1]  # as Hugging Face has it
    assert sum(tensor["bytes"] for tensor in tensors.values()) < target["bytes"]
    assert 4 < target["bits_per_weight"] < 17
    said = glmconv("plan", source, "--to", "gguf:q4_k_m", *words, "-v").out
    assert "bits per weight" in said
    assert all(name in said for name in tensors)
    [other] = json.loads(glmconv("plan", source, "--to", "hf", "--json").out)["targets"]
    assert other["tensors"] == other["tensor_count"] > 0


def test_types_that_need_importance_say_so_by_name(toy, glmconv, tmp_path):
    source = toy(PRESET, TOY)
    answer = glmconv("plan", source, "--to", "gguf:Q2_K_S")
    assert (answer.code, "--imatrix" in answer.err) == (6, True)
    file = importance(toy, tmp_path, PRESET, TOY, without=("blk.1.ffn_up_exps",))
    answer = glmconv("plan", source, "--to", "gguf:Q2_K_S", "--imatrix", file)
    assert (answer.code, "blk.1.ffn_up_exps.weight" in answer.err) == (6, True)
    assert glmconv("plan", source, "--to", "gguf:Q2_K_S", "--imatrix", file, "--tensor-type", "blk.1.ffn_up_exps=q4_k").code == 0
    with pytest.raises(UnsupportedError):
        plan(source, ["gguf:Q2_K_S"])


@pytest.mark.parametrize("words", [
    ("--tensor-type", "attn_q"), ("--tensor-type", "=q8_0"), ("--tensor-type", "attn_q=q9_9"), ("--tensor-type", "(=q8_0"),
    ("--token-embedding-type", "q9"), ("--split-max-size", "0"), ("--split-max-tensors", "0"),
    ("--split-max-size", "1G", "--split-max-tensors", "3"), ("--quantize-from", "float16"), ("--mtp", "none"),
    ("--shard-size", "1GB"),
])  # fmt: skip
def test_options_that_mean_nothing_are_usage_errors(words, toy, glmconv):
    answer = glmconv("plan", toy(FLAT, EACH), "--to", "gguf:Q8_0", *words)
    assert answer.code == 2, answer.err


@pytest.mark.parametrize("words", [
    ("--imatrix", "x"), ("--tensor-type", "a=q8_0"), ("--token-embedding-type", "q8_0"), ("--output-tensor-type", "q8_0"), ("--pure",),
    ("--split-max-size", "1G"), ("--split-max-tensors", "3"), ("--embed-source",), ("--quantize-from", "float32"), ("--mtp", "only"),
])  # fmt: skip
def test_options_of_gguf_are_refused_where_no_target_is_gguf(words, tiny, glmconv):
    answer = glmconv("plan", tiny, "--to", "hf", *words)
    assert answer.code == 2
    assert words[0] in answer.err
    assert "GGUF" in answer.err


def test_the_python_api_takes_the_same_options_and_checks_them(tiny, tmp_path):
    with pytest.raises(UsageError, match="not both"):
        plan(tiny, ["gguf:Q8_0"], options=Options(split_max_size=1, split_max_tensors=1))
    with pytest.raises(UsageError, match="quantize-from"):
        plan(tiny, ["gguf:Q8_0"], options=Options(quantize_from="f64"))
    with pytest.raises(UsageError, match="each other target"):
        plan(tiny, ["gguf:Q8_0", "hf"], options=Options(mtp_only=True))
    with pytest.raises(SourceError, match="is missing"):
        plan(tiny, ["gguf:Q8_0"], options=Options(imatrix=tmp_path / "none.gguf"))
    assert isinstance(plan(tiny, ["gguf:Q8_0"], options=Options(tensor_types=("attn_q=q4_0",))).targets[0]["tensors"], list)


def test_a_quantized_source_goes_through_what_is_asked_for(toy, glmconv, tmp_path):
    preset = "glm4.7-flash-30B-A3B"  # whose split matrices are transposed on the way
    convert(toy(preset, EACH), {"fp8:channel": tmp_path / "fp8"})
    for name in ("bf16", "float32"):
        answer = glmconv("convert", tmp_path / "fp8", tmp_path / f"{name}.gguf", "--to", "gguf:F32", "--quantize-from", name)
        assert answer.code == 0, answer.err
        assert glmconv("verify", tmp_path / "fp8", tmp_path / f"{name}.gguf", "--exact").code == 0
    gguf = pytest.importorskip("gguf")
    narrow, wide = ({t.name: t.data for t in gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors} for name in ("bf16", "float32"))
    weights = [name for name in wide if name.endswith(".weight")]
    assert {"blk.1.attn_k_b.weight", "blk.1.ffn_up_exps.weight", "blk.0.ffn_down.weight"} <= {name for name in weights if finer(wide[name])}
    assert not any(finer(narrow[name]) for name in weights)
    for name in weights:  # bf16 is the float32 value rounded to nearest, ties to even
        bits = wide[name].view("<u4").astype("u8")
        assert (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16) == narrow[name].view("<u4")).all(), name


def finer(values):
    """Whether some of the float32 values are no bfloat16 values."""
    return bool((values.view("<u4") & 0xFFFF).any())


def test_a_weight_beside_quantized_ones_is_widened_with_them(tiny):
    name = "model.layers.1.mlp.experts.0.up_proj.weight"
    with open_checkpoint(tiny) as source:
        reader = gguf_derived(source.opened.tensors, f"float32:{name}")
        out = bytearray(4 * reader.shape[0] * reader.shape[1])
        reader.read_into(0, memoryview(out))
        assert reader.dtype.name == "float32"
        assert bytes(out) == source[name].read().float().numpy().tobytes()


@pytest.mark.parametrize("chosen", [
    {"token_embedding_type": 5}, {"output_tensor_type": "q9"}, {"tensor_types": ["("]}, {"tensor_types": [5]}, {"imatrix": "a"}, {"imatrix": ["a"]},
    {"split_max_size": "9"}, {"split_max_tensors": True}, {"quantize_from": 5}, {"mtp_only": True}, {"name": "{x}.gguf"},
], ids=str)  # fmt: skip
def test_a_manifest_with_options_that_are_none_is_a_source_error(chosen, toy):
    with open_checkpoint(toy(FLAT, EACH)) as source, pytest.raises(SourceError):
        plan_again(source, "gguf:Q8_0", {"name": "a.gguf", **chosen})
