"""A model's GGUF keys: llama.cpp's own lists, every released config, tokenizers of toys, and what is refused."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glmconv.archs import bind, presets, spec_for, text_of
from glmconv.engine.inputs import InputFolder
from glmconv.errors import GlmconvError, SourceError, UnsupportedError
from glmconv.formats.gguf_general import name_parts, rounded
from glmconv.formats.gguf_header import read_header, write_header
from glmconv.formats.gguf_metadata import FILE_TYPES, ImportanceOrigin, embedded, embedded_files, metadata, quantized
from glmconv.formats.gguf_tokenizer import CONTROL, NORMAL, UNUSED, USER_DEFINED, read_tokenizer, tokenizer_entries
from glmconv.formats.gguf_types import Array, Entry, Kind
from glmconv.toy.tokenizer import side_files, special_ids

VECTORS = Path(__file__).parent.parent / "vectors" / "gguf_header"
KINDS = {"str": Kind.STRING, "arr": Kind.ARRAY} | {kind.name.lower(): kind for kind in Kind}
PRESETS = {preset.name: (spec, preset) for spec, preset in presets()}
SEED = int(os.environ.get("GLMCONV_SEED", "20261101"))
SMALL = {"vocab_size": 1000, "eos_token_id": [1], "pad_token_id": 1}


def golden(model: str, name: str) -> list[Entry]:
    rows = json.loads((VECTORS / model / f"{name}.json").read_text(encoding="utf-8"))["kv"]
    return [Entry(key, KINDS[kind], Array(KINDS[value[0]], value[1]) if kind == "arr" else value) for key, kind, value in rows]


def made(model: str, **changed: object) -> list[Entry]:
    """The keys of a folder of tests/vectors/gguf_header, its config changed; None takes a field away."""
    files = {path.name: path.read_bytes() for path in (VECTORS / model).iterdir()}
    config = {key: value for key, value in {**json.loads(files["config.json"]), **changed}.items() if value is not None}
    return metadata(bind(spec_for(config), config), config, files, model)


def of_preset(name: str, **changed: object) -> dict[str, object]:
    spec, preset = PRESETS[name]
    text = {**text_of(spec, preset.config), **changed}
    config = {**preset.config, spec.text: text} if spec.text else text
    entries = metadata(bind(spec, config), config, side_files(text), preset.hub.rpartition("/")[2])
    assert len({entry.key for entry in entries}) == len(entries)
    return {entry.key: entry.value for entry in entries}


def toy_files(**changed: object) -> dict[str, bytes]:
    """A toy's tokenizer files, parts of tokenizer.json's model changed."""
    files = side_files(SMALL)
    document = json.loads(files["tokenizer.json"])
    document["model"] |= changed
    return {**files, "tokenizer.json": json.dumps(document).encode()}


def tokenizer_of(files: dict[str, bytes], architecture: str = "glm4moe", size: int = 1000, **config: object) -> dict[str, object]:
    return {entry.key.removeprefix("tokenizer.ggml."): entry.value for entry in tokenizer_entries(architecture, size, config, files)}


@pytest.mark.parametrize("model", ["glm4_moe", "glm_moe_dsa"])
def test_keys_order_kinds_and_values_are_llama_quantizes(model):
    assert [*made(model), *quantized("Q4_K_M")] == golden(model, "quantize-Q4_K_M")


@pytest.mark.parametrize("model", ["glm4_moe", "glm_moe_dsa"])
def test_the_converters_own_keys_are_the_same_but_for_those_that_llama_quantize_moves(model):
    moved = ("general.quantization_version", "general.file_type")
    assert made(model) == [entry for entry in golden(model, "convert-bf16") if entry.key not in moved]


@pytest.mark.parametrize("name", PRESETS)
def test_every_release_has_keys_that_can_be_written_and_read(name, tmp_path):
    spec, preset = PRESETS[name]
    files = side_files(text_of(spec, preset.config))
    entries = [*metadata(bind(spec, preset.config), preset.config, files, "model"), *quantized("Q4_K_M")]
    (tmp_path / "model.gguf").write_bytes(write_header(entries, []))
    with InputFolder(tmp_path) as folder:
        header = read_header(folder.open("model.gguf"))
    assert [Entry(key, *value) for key, value in header.kv.items()] == entries
    assert len(header.kv["tokenizer.ggml.tokens"].value.values) == text_of(spec, preset.config)["vocab_size"]


def test_facts_of_the_released_models():
    flash, glm5, v, dense = (of_preset(name) for name in ("glm4.7-flash-30B-A3B", "glm5.2-744B-A40B", "glm4.5v-108B-A12B", "glm4-9B-0414"))
    assert flash["general.architecture"] == "deepseek2"
    assert (flash["deepseek2.block_count"], flash["deepseek2.nextn_predict_layers"], flash["deepseek2.expert_gating_func"]) == (48, 1, 2)
    assert (flash["deepseek2.attention.head_count_kv"], flash["deepseek2.attention.key_length"]) == (1, 576)
    assert list(flash).index("deepseek2.attention.key_length") == list(flash).index("deepseek2.attention.kv_lora_rank") + 1
    assert sum(glm5["glm-dsa.attention.indexer.types"].values) == 21
    assert v["glm4moe.rope.dimension_sections"] == Array(Kind.I32, [8, 12, 12, 0])
    assert "glm4moe.nextn_predict_layers" not in v
    assert v["glm4moe.block_count"] == 46
    assert (dense["glm4.rope.dimension_count"], dense["glm4.block_count"]) == (64, 40)
    assert "glm4.expert_count" not in dense
    assert dense["general.size_label"] == "9B"


def test_glm_5_3_flash_has_deepseek2s_keys_and_its_own():
    found = of_preset("glm5.3-flash-321B")
    assert found["glm5-next.attention.head_count_kv"].values[:4] == [0, 0, 0, 1]
    assert len(found["glm5-next.attention.head_count_kv"].values) == found["glm5-next.block_count"] == 46
    assert found["glm5-next.rope.dimension_count"] == 0
    assert found["glm5-next.kda.gate_lower_bound"] == -5.0
    assert found["glm5-next.swiglu_clamp_exp"].values == [10.0] * 46
    assert "glm5-next.rope.freq_base" not in found


@pytest.mark.parametrize("how", [{"mtp": False}, {"without": ("mtp",)}], ids=["dropped", "lost"])
def test_mtp_layers_are_counted_where_there_are_any(how):
    spec, preset = PRESETS["glm4.5-106B-A12B"]
    without = bind(spec, preset.config, **how)
    found = {entry.key: entry.value for entry in metadata(without, preset.config, side_files(preset.config), "x")}
    assert found["glm4moe.block_count"] == 46
    assert "glm4moe.nextn_predict_layers" not in found


def test_no_mtp_layer_is_said_where_the_config_says_so_and_the_converter_repeats_it():
    for name, key in (("glm4.5-106B-A12B", "glm4moe"), ("glm5-744B-A40B", "glm-dsa")):
        assert of_preset(name, num_nextn_predict_layers=0)[f"{key}.nextn_predict_layers"] == 0
    assert "deepseek2.nextn_predict_layers" not in of_preset("glm4.7-flash-30B-A3B", num_nextn_predict_layers=0)


def test_configs_that_say_it_otherwise_give_the_same_keys():
    lite = of_preset("glm4.7-flash-30B-A3B")
    saved = {"first_k_dense_replace": None, "rope_theta": None, "mlp_layer_types": ["dense"] + ["sparse"] * 46,
             "rope_parameters": {"rope_theta": 1000000, "rope_type": "default", "partial_rotary_factor": 1.0}}  # fmt: skip
    assert of_preset("glm4.7-flash-30B-A3B", **saved) == lite
    whole = made("glm_moe_dsa")
    assert made("glm_moe_dsa", index_topk_freq=None, index_topk_pattern="FFSSFS") == whole
    assert made("glm_moe_dsa", indexer_types=["full", "full", "shared", "shared", "full", "shared"]) == whole
    assert made("glm_moe_dsa", scoring_func=None, n_group=None) == whole
    assert made("glm4_moe", rope_theta=None, partial_rotary_factor=None, rope_parameters={
        "rope_type": "default", "rope_theta": 1000000, "partial_rotary_factor": 0.5}) == made("glm4_moe")  # fmt: skip


def test_yarn_is_said():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 32}
    found = of_preset("glm4-9B-0414", rope_scaling=rope)
    scaling = {key.removeprefix("glm4.rope.scaling."): value for key, value in found.items() if ".scaling." in key}
    assert scaling == {"type": "yarn", "factor": 4.0, "original_context_length": 32768, "yarn_beta_fast": 32.0}
    with pytest.raises(UnsupportedError, match=r"rope_type dynamic"):
        of_preset("glm4-9B-0414", rope_scaling={"type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"rms_norm_eps": None}, "rms_norm_eps is missing"), ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is 1e-5, a number"),
     ({"max_position_embeddings": 1.5}, "max_position_embeddings is 1.5"), ({"max_position_embeddings": 2**32}, "max_position_embeddings"),
     ({"norm_topk_prob": 1}, "norm_topk_prob is 1"), ({"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
     ({"routed_scaling_factor": 1e39}, "routed_scaling_factor"), ({"n_group": True}, "n_group"), ({"rope_theta": []}, "rope_theta")],
)  # fmt: skip
def test_a_config_with_nonsense_in_it_is_refused(changed, said):
    with pytest.raises(SourceError, match=f"config.json: {said}"):
        made("glm4_moe", **changed)


def test_dense_layers_behind_sparse_ones_are_refused():
    with pytest.raises(UnsupportedError, match=r"behind layers with experts"):
        made("glm_moe_dsa", mlp_layer_types=["dense", "sparse", "dense", "sparse", "sparse", "sparse"])


def test_what_llama_quantize_appends_with_an_importance_matrix():
    origin = ImportanceOrigin("é" * 70, "calibration.txt", 97, 0)
    assert [entry[1:] for entry in quantized("IQ4_XS", origin)] == [
        (Kind.U32, 2), (Kind.U32, 30), (Kind.STRING, "é" * 63 + "\udcc3"), (Kind.STRING, "calibration.txt"), (Kind.U32, 97)]  # fmt: skip
    more = quantized("BF16", ImportanceOrigin("i", "", 97, 12))
    assert [entry.key.rpartition(".")[2] for entry in more[2:]] == ["file", "entries_count", "chunks_count"]
    assert len(set(FILE_TYPES.values())) == len(FILE_TYPES)


def test_files_ride_along_byte_by_byte():
    files = {"config.json": b'{"a": 1}\r\n', "chat_template.jinja": "é\n".encode()}
    entries = embedded(files)
    assert [entry.key for entry in entries] == ["glmconv.source.config.json", "glmconv.source.chat_template.jinja"]
    assert embedded_files({entry.key: (entry.kind, entry.value) for entry in entries}) == files
    with pytest.raises(SourceError, match=r"config.json: @0: is not UTF-8"):
        embedded({"config.json": b"\xff"})


def test_sampling_is_taken_from_the_generation_config():
    files = side_files(SMALL) | {"generation_config.json": b'{"top_k": 40, "repetition_penalty": 1.1, "temperature": 0.6, "min_p": null}'}
    spec, preset = PRESETS["glm4-9B-0414"]
    found = metadata(bind(spec, preset.config), preset.config, files, "x")[2:5]
    assert [(entry.key.rpartition(".")[2], entry.kind) for entry in found] == [("top_k", Kind.I32), ("temp", Kind.F32), ("penalty_repeat", Kind.F32)]
    for content in (b'{"top_k": 4.5}', b'{"temperature": true}', b'{"top_k": 3000000000}', b'{"top_p": "high"}', b"[]"):
        with pytest.raises(SourceError, match=r"generation_config.json: "):
            metadata(bind(spec, preset.config), preset.config, files | {"generation_config.json": content}, "x")


def test_a_model_card_says_licence_tags_languages_and_base():
    card = b"---\nlicense: mit\nlanguage:\n- en\n- no\npipeline_tag: text-generation\nbase_model: zai-org/GLM-4.5-Air\n---\n# Title\n"
    spec, preset = PRESETS["glm4.5-106B-A12B"]
    entries = metadata(bind(spec, preset.config), preset.config, side_files(SMALL) | {"README.md": card}, "My-Model-v2-7B-Instruct")
    found = {entry.key: entry.value for entry in entries if entry.key.startswith("general.")}
    assert found["general.license"] == "mit"
    assert found["general.languages"].values == ["en", "no"]
    assert found["general.tags"].values == ["text-generation"]
    assert found["general.base_model.0.name"] == "GLM 4.5 Air"
    assert found["general.base_model.0.organization"] == "Zai Org"
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/zai-org/GLM-4.5-Air"
    assert (found["general.basename"], found["general.finetune"]) == ("My-Model-v2", "7b-Instruct")


@pytest.mark.parametrize(
    "card", [b"---\na: &x [1]\nb: *x\n---\n", b"---\n" + b"[" * 99 + b"\n---\n", b"---\n\xff\n---\n", b"---\nlicense: mit\n", b"# Hi"]
)
def test_a_model_card_that_is_no_plain_yaml_says_nothing(card):
    spec, preset = PRESETS["glm4-9B-0414"]
    plain = metadata(bind(spec, preset.config), preset.config, side_files(SMALL), "x")
    assert metadata(bind(spec, preset.config), preset.config, side_files(SMALL) | {"README.md": card}, "x") == plain


words = st.sampled_from(["GLM", "4.5", "Air", "v2", "7B", "7b1", "32b", "A12B", "8x7b", "instruct", "Chat", "mini", "large", "128k", "1M", "q4_k",
                         "BF16", "0414", "", "it", "iter3", "x", "1.5_B", "Base", "small"])  # fmt: skip
ids = st.lists(words, min_size=1, max_size=6).map("-".join).filter(lambda name: name.strip("-"))


@given(org=st.sampled_from(["", "zai-org/", "./", "My Org/"]), name=ids, parameters=st.sampled_from([0, 7 * 10**9, 10**11, 355 * 10**9]))
@settings(max_examples=250, deadline=None)
def test_names_are_taken_apart_as_gguf_does(org, name, parameters):
    gguf = pytest.importorskip("gguf")
    ours = name_parts(org + name, parameters)
    theirs = gguf.Metadata.get_model_id_components(org + name, parameters)
    assert (ours.name, ours.organization, ours.basename, ours.finetune, ours.version, ours.size_label) == tuple(part or "" for part in theirs)
    assert ours.title == gguf.Metadata.id_to_title(theirs[0])


@given(count=st.integers(1, 5 * 10**12) | st.sampled_from([10**6, 10**9, 10**12, 999_499, 9_949_999_999, 9_950_000_000]))
@settings(max_examples=250, deadline=None)
def test_numbers_of_parameters_are_rounded_as_gguf_does(count):
    gguf = pytest.importorskip("gguf")
    assert rounded(count) == gguf.utility.model_weight_count_rounded_notation(count)


def test_a_toys_tokenizer_is_taken_over_with_its_holes():
    found = tokenizer_of(side_files(SMALL), size=1000)
    ids = special_ids()
    tokens, types = found["tokens"].values, found["token_type"].values
    assert len(tokens) == len(types) == 1000
    assert tokens[:2] == ["Ā", "ā"] or len(tokens[0]) == 1
    assert [tokens[n] for n in ids.values()] == list(ids)
    assert {types[ids[token]] for token in ("[gMASK]", "<|user|>", "/nothink")} == {CONTROL}
    assert {types[ids[token]] for token in ("<think>", "</arg_value>")} == {USER_DEFINED}
    assert (tokens[999], types[999], types[0]) == ("[PAD999]", UNUSED, NORMAL)
    assert (found["pre"], found["model"]) == ("glm4", "gpt2")
    assert found["merges"].values[0].count(" ") == 1


def test_glm4_has_special_tokens_in_another_order():
    newer, older = (list(tokenizer_of(side_files(SMALL), architecture)) for architecture in ("glm4moe", "glm4"))
    kinds = [key.removesuffix("_token_id") for key in newer if key.endswith("_id")]
    assert kinds == ["eos", "padding", "bos", "eot", "unknown", "eom"]
    assert [key.removesuffix("_token_id") for key in older if key.endswith("_id")] == ["eos", "padding", "eot", "unknown", "bos"]
    found, ids = tokenizer_of(side_files(SMALL), "glm4"), special_ids()
    assert found["bos_token_id"] == found["unknown_token_id"] == found["eos_token_id"] == ids["<|endoftext|>"]


def test_ids_come_from_the_config_where_the_settings_name_no_token():
    files = {name: content for name, content in side_files(SMALL).items() if name != "tokenizer_config.json"}
    found = tokenizer_of(files, eos_token_id=[3, 4], pad_token_id=5, mask_token_id=True, sep_token_id=5000)
    assert [key for key in found if key.endswith("_id")][:2] == ["padding_token_id", "bos_token_id"]
    assert found["padding_token_id"] == 5
    assert "eos_token_id" not in found


def test_merges_are_read_in_both_spellings_and_spaces_become_their_character():
    pairs = tokenizer_of(toy_files(merges=[["a", "b"], ["a b", " "]]))["merges"].values
    assert pairs == ["a b", "aĠb Ġ"]
    assert tokenizer_of(toy_files(merges=["a b"]))["merges"].values == ["a b"]


def test_a_token_that_looks_special_is_one_and_settings_win_over_tokenizer_json():
    files = side_files(SMALL)
    settings_ = json.loads(files["tokenizer_config.json"])
    first = str(special_ids()["<think>"])
    settings_["added_tokens_decoder"][first]["special"] = True
    settings_["added_tokens_decoder"]["900"] = {"content": "<|mine|>", "special": False}
    settings_["added_tokens_decoder"]["901"] = {"content": "a\u2581b", "special": False}
    found = tokenizer_of(files | {"tokenizer_config.json": json.dumps(settings_).encode()})
    types, tokens = found["token_type"].values, found["tokens"].values
    assert (types[int(first)], types[900], types[901]) == (CONTROL, CONTROL, USER_DEFINED)
    assert (tokens[900], tokens[901]) == ("<|mine|>", "a b")


def test_the_template_is_the_settings_else_the_files():
    files = side_files(SMALL)
    assert tokenizer_of(files | {"chat_template.jinja": b"a\r\nb"})["tokenizer.chat_template"] == "a\nb"
    given_ = json.loads(files["tokenizer_config.json"]) | {"chat_template": "{{ x }}"}
    files["tokenizer_config.json"] = json.dumps(given_).encode()
    assert tokenizer_of(files)["tokenizer.chat_template"] == "{{ x }}"
    given_["chat_template"] = [{"name": "tool use", "template": "t"}, {"name": "default", "template": "{{ x }}"}]
    files["tokenizer_config.json"] = json.dumps(given_).encode()
    found = tokenizer_of(files)
    assert (found["tokenizer.chat_template.tool_use"], found["tokenizer.chat_template"]) == ("t", "{{ x }}")
    assert found["tokenizer.chat_templates"] == Array(Kind.STRING, ["tool_use"])
    del given_["chat_template"], files["chat_template.jinja"]
    files["tokenizer_config.json"] = json.dumps(given_).encode()
    assert "tokenizer.chat_template" not in tokenizer_of(files)


def test_the_fixed_tokenizer_of_glm_is_recognised_by_its_regex_alone():
    assert list(read_tokenizer(toy_files()).templates) == ["default"]
    document = json.loads(side_files(SMALL)["tokenizer.json"])
    for spoil in (
        lambda: document["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\p{L}+"),
        lambda: document["pre_tokenizer"]["pretokenizers"].append({"type": "Digits"}),
        lambda: document.update(pre_tokenizer=None),
    ):
        spoil()
        with pytest.raises(UnsupportedError, match=r"tokenizer.json: cuts text otherwise than GLM's"):
            read_tokenizer(side_files(SMALL) | {"tokenizer.json": json.dumps(document).encode()})
    with pytest.raises(UnsupportedError, match=r"no byte-level BPE"):
        read_tokenizer(toy_files(type="Unigram"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"vocab": {"a": 1000}}, "a is token 1000, the model has 1000"), ({"vocab": {"a": 1, "b": 1}}, "a and b are both token 1"),
     ({"vocab": {"a": -1}}, "the id of a is -1"), ({"vocab": {"a": "1"}}, "the id of a"), ({"vocab": []}, "vocab is not an object"),
     ({"merges": [["a"]]}, "no pair of merged parts"), ({"merges": ["a b c"]}, "no pair of merged parts"), ({"merges": [[1, 2]]}, "no pair"),
     ({"merges": None}, "merges is not an array")],
)  # fmt: skip
def test_a_broken_tokenizer_is_refused(changed, said):
    with pytest.raises(SourceError, match=f"tokenizer.json: .*{said}"):
        tokenizer_of(toy_files(**changed))


def test_a_model_without_its_tokenizer_is_refused():
    with pytest.raises(SourceError, match=r"tokenizer.json: is missing: a GGUF file holds its tokenizer"):
        tokenizer_of({})
    document = json.loads(side_files(SMALL)["tokenizer.json"])
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "<|user|>"]
    with pytest.raises(SourceError, match=r"has no token <\|user\|>, which is GLM's eot"):
        tokenizer_of({"tokenizer.json": json.dumps(document).encode()})


def test_a_tokenizer_as_large_as_a_releases_is_read():
    vocab = {f"Ġtoken{n}": n for n in range(154_000)}
    merges = [[f"Ġtok{n}", f"en{n}"] for n in range(321_000)]
    document = json.loads(side_files(SMALL)["tokenizer.json"])
    document["model"] |= {"vocab": vocab, "merges": merges}
    for number, token in enumerate(document["added_tokens"]):
        token["id"] = 154_000 + number
    files = {"tokenizer.json": json.dumps(document, separators=(",\n            ", ": "), ensure_ascii=False).encode()}
    assert len(files["tokenizer.json"]) > 18 << 20  # beyond what is read of other JSON
    found = tokenizer_of(files, size=154_880)
    assert len(found["merges"].values) == 321_000


JUNK = ("x", -1, 1.5, None, [], {}, True, 2**62, [[1]], ["x", 1], {"x": 1}, "é" * 300, 0)


def places(value: object, depth: int = 3) -> list[tuple[object, ...]]:
    """Where something else may stand: paths into a document, the first members of what is long."""
    if not depth or not isinstance(value, dict | list):
        return []
    members = list(value.items() if isinstance(value, dict) else enumerate(value))[:12]
    return [path for key, inner in members for path in [(key,), *((key, *rest) for rest in places(inner, depth - 1))]]


def spoiled(value: object, path: tuple[object, ...], junk: object) -> object:
    copied = dict(value) if isinstance(value, dict) else list(value)
    copied[path[0]] = spoiled(value[path[0]], path[1:], junk) if len(path) > 1 else junk
    return copied


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("model", ["glm4_moe", "glm_moe_dsa"])
def test_junk_anywhere_is_written_or_refused_with_a_reason(model, name):
    files = {path.name: path.read_bytes() for path in (VECTORS / model).iterdir()}
    document = json.loads(files[name])
    source = random.Random(SEED)
    everywhere = [(path, junk) for path in places(document) for junk in JUNK]
    refused = 0
    for path, junk in source.sample(everywhere, min(100, len(everywhere))):
        changed = files | {name: json.dumps(spoiled(document, path, junk)).encode()}
        config = json.loads(changed["config.json"])
        try:
            write_header(metadata(bind(spec_for(config), config), config, changed, model), [])
        except GlmconvError:
            refused += 1
        except Exception as problem:
            raise AssertionError(f"{path} = {junk!r}") from problem
    assert refused
