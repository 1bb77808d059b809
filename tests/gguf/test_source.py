"""GGUF as a source: every architecture comes back, whoever wrote the file, in one piece or in parts; quantized tensors hold what ggml says."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from glmconv import Options, convert, open_checkpoint, verify
from glmconv.archs import preset_named, preset_of
from glmconv.codecs import bound_of
from glmconv.errors import SourceError, UnsupportedError, UsageError
from glmconv.formats.gguf_types import Array, Entry, Kind
from glmconv.kernels.ggml_decode import DECODE
from glmconv.toy.build import ToyOptions
from tests.conftest import EACH, ONE_OF_EACH
from tests.gguf.rewritten import changed, header, parts, split, with_source
from tests.loading import logits
from tests.roundtrip.shards import contents, release

gguf = pytest.importorskip("gguf")

WIDE = ToyOptions(layers=2, experts=2, scale=Fraction(1, 8))  # rows of whole super-blocks of 256
TOWERS = ("glm4.5v-108B-A12B", "glm5.3-flash-321B")
WHOLE = [name for name in ONE_OF_EACH if name not in TOWERS]
DECAY = "A_log"  # -exp(x) is what GGUF stores


@pytest.fixture(scope="module")
def there(toy, tmp_path_factory):
    """`there(preset, type, options)`: the toy as a GGUF file, made once. Nobody writes into its folder."""
    root = tmp_path_factory.mktemp("gguf")

    def make(preset, file_type="BF16", options=EACH):
        path = root / f"{preset}-{file_type}-{options.scale.denominator}.gguf"
        if not path.exists():
            convert(toy(preset, options), {f"gguf:{file_type}": path})
        return path

    return make


@pytest.mark.parametrize("file_type", ["BF16", "F32"])
@pytest.mark.parametrize("preset", WHOLE)
def test_every_file_comes_back_byte_for_byte_with_what_rides_along(preset, file_type, toy, there, tmp_path):
    source = toy(preset, EACH)
    convert(with_source(there(preset, file_type), source, tmp_path / "model.gguf"), {"hf": tmp_path / "back"})
    assert release(tmp_path / "back") == release(source)


@pytest.mark.parametrize("preset", WHOLE)
def test_transformers_gives_the_same_logits_of_what_is_rebuilt_from_the_keys_alone(preset, toy, there, tmp_path):
    convert(there(preset), {"hf": tmp_path / "back"})
    assert verify(toy(preset, EACH), tmp_path / "back").same
    assert torch.equal(logits(tmp_path / "back"), logits(toy(preset, EACH)))


@pytest.mark.parametrize("file_type", ["BF16", "F32"])
@pytest.mark.parametrize("preset", TOWERS)
def test_a_language_model_without_its_tower_is_read_and_says_so(preset, file_type, toy, there, glmconv, tmp_path):
    source, path = toy(preset, EACH), there(preset, file_type)
    with open_checkpoint(source) as before, open_checkpoint(path) as after:
        assert {name for name in before.tensors if "visual." not in name} == set(after.tensors)
        for name, tensor in after:
            found, wanted = tensor.read(), before[name].read()
            assert found.dtype == wanted.dtype
            if name.endswith(DECAY):
                assert torch.allclose(found, wanted, rtol=0, atol=1e-6)
            else:
                assert torch.equal(found, wanted), name
    answer = glmconv("convert", path, tmp_path / "back", "--to", "hf")
    assert answer.code == 5
    assert "--mmproj" in answer.err
    assert not (tmp_path / "back").exists()
    assert glmconv("inspect", path).code == 0
    assert glmconv("convert", path, tmp_path / "again.gguf", "--to", f"gguf:{file_type}").code == 0
    assert (tmp_path / "again.gguf").read_bytes() == path.read_bytes()


def test_a_decay_of_bfloat16_comes_back_exactly():
    from glmconv.formats.gguf_stored import logarithms

    bits = np.arange(1 << 16, dtype=np.uint32)
    plain = (bits << 16).view(np.float32)
    plain = plain[np.isfinite(plain) & (np.abs(plain) < 80) & (np.abs(plain) > 2**-14)]
    assert logarithms(decayed(plain)).tobytes() == plain.tobytes()
    decays = decayed(np.random.default_rng(0).standard_normal(100_000).astype(np.float32))
    assert decayed(logarithms(decays)).tobytes() == decays.tobytes()


def decayed(values):
    return (-np.exp(values.astype(np.float64))).astype(np.float32)


def test_float16_comes_back_where_it_holds_the_numbers(toy, there):
    with open_checkpoint(toy("glm4-9B-0414", EACH)) as before, open_checkpoint(there("glm4-9B-0414", "F16")) as after:
        for name, tensor in after:
            wanted = before[name].read()
            held = wanted.half().to(torch.bfloat16)
            assert torch.equal(tensor.read(), held)
    result = verify(toy("glm4-9B-0414", EACH), there("glm4-9B-0414", "F16"))
    assert result.same
    assert {loss.codec for loss in result.losses} == {"F16"}
    assert max(loss.rmse for loss in result.losses) < 1e-5


@pytest.mark.parametrize(
    ("preset", "file_type"),
    [("glm4.7-flash-30B-A3B", "Q4_K_M"), ("glm4.7-flash-30B-A3B", "Q8_0"), ("glm4.5-355B-A32B", "IQ4_XS"), ("glm4.5-355B-A32B", "Q3_K_M"),
     ("glm4-9B-0414", "Q5_1"), ("glm4-9B-0414", "Q6_K")],
)  # fmt: skip
def test_quantized_tensors_are_what_the_gguf_package_makes_of_them_rounded_to_bfloat16(preset, file_type, toy, there, tmp_path):
    path = there(preset, file_type, WIDE)
    convert(path, {"hf": tmp_path / "back"})
    stored = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors}
    with open_checkpoint(tmp_path / "back") as back:
        s = back.arch.sizes
        pairs = {"token_embd.weight": "model.embed_tokens.weight", "output.weight": "lm_head.weight", "output_norm.weight": "model.norm.weight"}
        if "experts" in s:
            for expert in range(s["experts"]):
                found = back[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"].read()
                assert torch.equal(found, torch.tensor(stored["blk.1.ffn_down_exps.weight"][expert]).to(torch.bfloat16))
        else:
            pairs["blk.0.ffn_up.weight"] = "model.layers.0.mlp.gate_up_proj.weight"
        if "kv_rank" in s:
            keys = torch.tensor(stored["blk.1.attn_k_b.weight"]).transpose(1, 2)
            both = torch.cat([keys, torch.tensor(stored["blk.1.attn_v_b.weight"])], dim=1).reshape(-1, s["kv_rank"])
            assert torch.equal(back["model.layers.1.self_attn.kv_b_proj.weight"].read(), both.to(torch.bfloat16))
        for name, canonical in pairs.items():
            assert torch.equal(back[canonical].read(), torch.tensor(stored[name]).to(torch.bfloat16)), name
    result = verify(toy(preset, WIDE), path)
    assert result.same
    assert any(loss.codec.startswith(file_type.partition("_M")[0]) for loss in result.losses)
    assert all(loss.rmse <= bound_of(loss.codec) for loss in result.losses)
    assert verify(path, tmp_path / "back").same


def test_every_type_that_is_decoded_has_a_bound():
    assert all(0 < bound_of(name) <= 1 for name in DECODE if name != "F32")
    assert bound_of("Q5_0+Q4_K") == bound_of("Q4_K") > bound_of("Q5_0")


def test_rows_are_the_same_however_they_are_asked_for(there):
    with open_checkpoint(there("glm4.7-flash-30B-A3B", "Q4_K_M", WIDE)) as source:
        for name in ("model.layers.1.self_attn.kv_b_proj.weight", "model.layers.1.mlp.experts.1.up_proj.weight", "model.norm.weight"):
            whole = source[name].read()
            for begin in (0, 1, 5, len(whole) - 3):
                assert torch.equal(source[name].read(slice(begin, begin + 3)), whole[begin : begin + 3])


def test_a_gguf_source_is_requantized_from_float32_and_what_fits_is_copied(toy, there, tmp_path):
    source = there("glm4.7-flash-30B-A3B", "Q8_0", WIDE)
    convert(source, {"gguf:Q8_0": tmp_path / "same.gguf", "gguf:Q4_K_M": tmp_path / "less.gguf", "gguf:F32": tmp_path / "wide.gguf"})
    assert (tmp_path / "same.gguf").read_bytes() == source.read_bytes()
    convert(tmp_path / "wide.gguf", {"gguf:Q4_K_M": tmp_path / "again.gguf"})
    assert (tmp_path / "less.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    read = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    for tensor in gguf.GGUFReader(source).tensors:
        assert np.array_equal(gguf.quants.dequantize(tensor.data, tensor.tensor_type), read[tensor.name].data, equal_nan=True), tensor.name


def test_a_gguf_source_goes_to_every_other_target(toy, there, glmconv, tmp_path):
    for preset, file_type in (("glm4.5-355B-A32B", "Q8_0"), ("glm5.2-744B-A40B", "BF16")):
        path, out = there(preset, file_type, EACH), tmp_path / preset
        assert glmconv("convert", path, "--to", f"torch_dist={out}-td", "--to", f"fp8:channel={out}-fp8", "--verify", "full").code == 0
        assert verify(path, Path(f"{out}-td")).same
    convert(Path(f"{out}-td"), {"hf": tmp_path / "back"})
    assert verify(toy("glm5.2-744B-A40B", EACH), tmp_path / "back").same


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_set_is_read_by_any_of_its_files_and_by_its_folder(count, toy, there, tmp_path):
    files = split(there("glm4.5-106B-A12B"), tmp_path / "parts", count)
    for path in (files[0], files[-1], tmp_path / "parts"):
        assert verify(toy("glm4.5-106B-A12B", EACH), path).same
    convert(files[0], {"gguf:BF16": tmp_path / "one.gguf"})
    assert (tmp_path / "one.gguf").read_bytes() == there("glm4.5-106B-A12B").read_bytes()


def cut(name, **change):
    """A set of three with one part changed."""

    def make(files):
        entries, tensors = parts(files[1])
        for key, value in change.items():
            at = next(n for n, entry in enumerate(entries) if entry.key == key.replace("_", "."))
            entries[at] = Entry(entries[at].key, entries[at].kind, value)
        from tests.gguf.rewritten import written

        written(files[1], entries, tensors)

    return pytest.param(make, id=name)


@pytest.mark.parametrize(
    "spoil",
    [
        cut("another number", split_no=0),
        cut("another count", split_count=4),
        cut("another total", split_tensors_count=5),
        pytest.param(lambda files: files[2].unlink(), id="one missing"),
        pytest.param(lambda files: files[1].write_bytes(files[2].read_bytes()), id="one twice"),
        pytest.param(lambda files: files[1].write_bytes(files[1].read_bytes()[:-64]), id="one cut off"),
        pytest.param(lambda files: changed(files[1], files[1], lambda e, t: e.clear()), id="one that says nothing of a set"),
        pytest.param(lambda files: changed(files[1], files[1], lambda e, t: t.pop(next(iter(t)))), id="a tensor missing"),
    ],
)
def test_a_set_that_does_not_add_up_is_refused(spoil, there, glmconv, tmp_path):
    files = split(there("glm4-9B-0414"), tmp_path / "parts", 3)
    assert glmconv("inspect", files[0]).code == 0
    spoil(files)
    answer = glmconv("convert", files[0], tmp_path / "back", "--to", "hf")
    assert (answer.code, len(answer.errors)) == (5, 1)
    assert not (tmp_path / "back").exists()


def test_a_part_under_another_name_is_refused(there, glmconv, tmp_path):
    files = split(there("glm4-9B-0414"), tmp_path / "parts", 2)
    files[0].rename(tmp_path / "alone.gguf")
    answer = glmconv("inspect", tmp_path / "alone.gguf")
    assert answer.code == 5
    assert "part 1 of 2" in answer.err
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).write_bytes(there("glm4-9B-0414").read_bytes())
    assert glmconv("inspect", tmp_path / "two").code == 6


@pytest.mark.parametrize("preset", ["glm4.7-flash-30B-A3B", "glm4-9B-0414", "glm5.2-744B-A40B"])
def test_a_file_of_the_gguf_package_in_its_converters_order_is_read(preset, toy, there, tmp_path):
    entries, tensors = parts(there(preset))
    kinds = {Kind.U32: "uint32", Kind.F32: "float32", Kind.BOOL: "bool", Kind.STRING: "string", Kind.ARRAY: "array", Kind.I32: "int32"}
    architecture = next(entry.value for entry in entries if entry.key == "general.architecture")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", architecture)
    for entry in entries:
        if entry.key != "general.architecture":
            getattr(writer, f"add_{kinds[entry.kind]}")(entry.key, list(entry.value.values) if isinstance(entry.value, Array) else entry.value)
    for name in sorted(tensors, key=lambda name: name[::-1]):  # no order of ours
        kind, ne, data = tensors[name]
        shape = [*ne[::-1][:-1], ne[0] * (2 if kind.name == "BF16" else 4)]
        writer.add_tensor(name, np.frombuffer(data, np.uint8).reshape(shape), raw_dtype=gguf.GGMLQuantizationType[kind.name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert list(header(tmp_path / "model.gguf").tensors) != list(tensors)
    assert verify(toy(preset, EACH), tmp_path / "model.gguf").same


@pytest.mark.parametrize("preset", [name for name in ONE_OF_EACH if preset_named(name)[1].mtp_tensors])
def test_mtp_layers_are_those_whose_tensors_are_there(preset, toy, there, glmconv, tmp_path):
    path = there(preset)
    with open_checkpoint(path, mtp=False) as source:
        assert source.opened.dropped
        assert not source.opened.unexpected
    lost = changed(path, tmp_path / "lost.gguf", lambda entries, tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("blk.4.")])
    with open_checkpoint(lost) as source:
        assert source.arch.sizes.get("mtp", 0) == 0
        assert source.arch.sizes["layers"] == 4
    if preset not in TOWERS:
        assert glmconv("convert", lost, tmp_path / "back", "--to", "hf", "--mtp-from", toy(preset, EACH)).code == 0
        assert verify(toy(preset, EACH), tmp_path / "back").same
        convert(path, {"gguf:BF16": tmp_path / "dropped.gguf"}, options=Options(mtp=False))
        convert(toy(preset, EACH), {"gguf:BF16": tmp_path / "wanted.gguf"}, options=Options(mtp=False))
        first, second = header(tmp_path / "dropped.gguf"), header(tmp_path / "wanted.gguf")
        assert list(first.kv) == list(second.kv)
        own = [{key: value for key, value in made.kv.items() if not key.startswith("general.")} for made in (first, second)]
        assert own[0] == own[1]


@pytest.mark.parametrize("preset", [preset.name for name in ONE_OF_EACH for preset in preset_named(name)[0].presets])
def test_the_config_of_a_release_is_found_again_by_its_sizes(preset, tmp_path):
    """Keys of the release's own config, without its weights: their names and shapes are all that is asked of them."""
    from glmconv.archs import bind, text_of
    from glmconv.formats.gguf_config import Told, rebuilt
    from glmconv.formats.gguf_files import GgufFiles, StoredTensor
    from glmconv.formats.gguf_header import GgufTensor
    from glmconv.formats.gguf_metadata import ARCHITECTURES, _Keys
    from glmconv.formats.gguf_tensors import gguf_tensors
    from glmconv.formats.gguf_types import BY_NAME, Value

    spec, found = preset_named(preset)
    model = bind(spec, found.config, aliases=found.aliases)
    architecture = ARCHITECTURES[spec.model_type]
    kv = {entry.key: Value(entry.kind, entry.value) for entry in _Keys(architecture, model, text_of(spec, found.config)).entries()}
    kv["general.architecture"] = Value(Kind.STRING, architecture)
    tensors = {t.name: StoredTensor(t.name, None, 0, GgufTensor(BY_NAME["F32"], t.ne, 0)) for t in gguf_tensors(model)}
    made = rebuilt(Told(GgufFiles(tmp_path, None, {}, kv, tensors, {})))
    assert made.config == preset_of(found.config).config | {k: v for k, v in made.config.items() if k in ("torch_dtype", "transformers_version")}


def test_the_command_line_inspects_compares_and_finds_a_flipped_bit(toy, there, glmconv, tmp_path):
    path = tmp_path / "model.gguf"
    convert(toy("glm4-9B-0414", EACH), {"gguf:BF16": path})
    found = json.loads(glmconv("inspect", path, "--json").out)
    assert (found["format"], found["model_type"], found["tensors"], found["files"]) == ("gguf", "glm4", 55, 1)
    assert glmconv("inspect", there("glm4-9B-0414", "Q6_K", WIDE)).out.count("Q6_K: 12") == 1
    assert glmconv("verify", toy("glm4-9B-0414", EACH), path).code == 0
    content = bytearray(path.read_bytes())
    at = header(path).tensors["blk.1.ffn_up.weight"].offset
    content[at + 10] ^= 1
    path.write_bytes(content)
    answer = glmconv("verify", toy("glm4-9B-0414", EACH), path)
    assert answer.code == 1
    assert "model.layers.1.mlp.gate_up_proj.weight: differs in 1 of" in answer.out
    assert glmconv("verify", path).code == 1


def test_a_quantized_tensor_that_is_another_is_out_of_bounds(toy, there, glmconv, tmp_path):
    path = there("glm4-9B-0414", "Q6_K", WIDE)

    def swap(entries, tensors):
        tensors["blk.0.attn_q.weight"], tensors["blk.1.attn_q.weight"] = tensors["blk.1.attn_q.weight"], tensors["blk.0.attn_q.weight"]

    swapped = changed(path, tmp_path / "swapped.gguf", swap)
    answer = glmconv("verify", toy("glm4-9B-0414", WIDE), swapped)
    assert answer.code == 1
    assert "model.layers.0.self_attn.q_proj.weight: is off by" in answer.out


def test_a_target_may_lie_beside_a_gguf_source_but_not_on_it(there, glmconv, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(there("glm4-9B-0414").read_bytes())
    for to in ("gguf:BF16", "gguf:Q8_0"):
        for more in ((), ("--overwrite",)):
            assert glmconv("convert", path, path, "--to", to, *more).code == 4
    assert glmconv("convert", path, tmp_path, "--to", "hf").code == 4
    assert path.read_bytes() == there("glm4-9B-0414").read_bytes()
    assert glmconv("convert", path, tmp_path / "back", "--to", "hf").code == 0
    assert glmconv("convert", path, tmp_path / "other.gguf", "--to", "gguf:Q8_0").code == 0


def test_an_interrupted_conversion_from_gguf_goes_on_to_the_same_bytes(there, tmp_path):
    import threading

    from glmconv.errors import Interrupted

    source = there("glm5.2-744B-A40B", "Q8_0")
    options = Options(file_size=300_000)
    convert(source, {"hf": tmp_path / "whole"}, options=options)
    stop = threading.Event()
    with pytest.raises(Interrupted):
        convert(source, {"hf": tmp_path / "again"}, options=Options(workers=1, file_size=300_000), progress=lambda done: stop.set(), stop=stop)
    convert(source, {"hf": tmp_path / "again"}, options=options)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_mmproj_is_refused_where_there_is_no_gguf(toy):
    with pytest.raises(UsageError, match="--mmproj"):
        open_checkpoint(toy("glm4-9B-0414", EACH), mmproj="x.gguf")


def test_other_models_are_refused(there, tmp_path):
    def other(entries, tensors):
        at = next(n for n, entry in enumerate(entries) if entry.key == "tokenizer.ggml.pre")
        entries[at] = Entry("tokenizer.ggml.pre", Kind.STRING, "deepseek-v3")

    with pytest.raises(UnsupportedError, match="another model"):
        open_checkpoint(changed(there("glm4.7-flash-30B-A3B"), tmp_path / "x.gguf", other))
    with pytest.raises(UnsupportedError, match="architecture llama"):
        open_checkpoint(changed(there("glm4-9B-0414"), tmp_path / "x.gguf", lambda e, t: e.__setitem__(0, Entry(e[0].key, e[0].kind, "llama"))))
    with pytest.raises(SourceError, match="no language model"):
        open_checkpoint(changed(there("glm4-9B-0414"), tmp_path / "x.gguf", lambda e, t: t.clear()))
