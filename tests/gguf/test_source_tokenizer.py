"""A tokenizer rebuilt from a GGUF file's keys cuts text as the original does; what cannot be rebuilt a note says."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from glmconv import convert, open_checkpoint
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.gguf_types import Array, Entry, Kind
from tests.conftest import EACH
from tests.gguf.rewritten import changed, with_source

TEXTS = (
    "", " ", "the of and to in is that", "  with   was\n\n on \t be", "It's they've I'd WE'LL", "12 345 6789 ½ ٣", "naïve café — “q” 中文字符 🙂‍↔️",
    "[gMASK]<sop><|user|>\nhello<|assistant|>\n<think></think>the", "<|endoftext|><|observation|>/nothink", "<tool_call>x</tool_call> < |user|>",
    "a\r\nb\r\n\r\n  c", "\x00\x7f\u200b", "ThE oF aNd", "that that  that",
)  # fmt: skip
PRESET = "glm4.7-flash-30B-A3B"


@pytest.fixture(scope="module")
def files(toy, tmp_path_factory):
    """(the release's folder, its GGUF file, what is rebuilt from that)"""
    root = tmp_path_factory.mktemp("tokenizer")
    convert(toy(PRESET, EACH), {"gguf:BF16": root / "model.gguf"})
    convert(root / "model.gguf", {"hf": root / "back"})
    return toy(PRESET, EACH), root / "model.gguf", root / "back"


@pytest.fixture(scope="module")
def both(files):
    return [Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (files[0], files[2])]


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_cut_alike_and_put_together_again(text, both):
    first, second = both
    ids = first.encode(text, add_special_tokens=False).ids
    assert second.encode(text, add_special_tokens=False).ids == ids
    for skip in (True, False):
        assert first.decode(ids, skip_special_tokens=skip) == second.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_text_is_cut_alike(both, text):
    first, second = both
    assert second.encode(text).ids == first.encode(text).ids


def test_transformers_loads_it_with_its_special_tokens_and_template(files):
    source, _, back = files
    first, second = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(back)
    assert (second.eos_token, second.pad_token, second.bos_token) == (first.eos_token, first.pad_token, first.bos_token)
    assert second.all_special_tokens == first.all_special_tokens
    said = [{"role": "user", "content": "the answer"}]
    for form in ({"tokenize": False}, {"tokenize": True}):
        wanted = first.apply_chat_template(said, add_generation_prompt=True, **form)
        assert second.apply_chat_template(said, add_generation_prompt=True, **form) == wanted
    assert (back / "chat_template.jinja").read_bytes() == (source / "chat_template.jinja").read_bytes()


def test_what_ends_an_answer_and_how_to_sample_is_found_again(files):
    source, _, back = files
    assert json.loads((back / "generation_config.json").read_bytes()) == json.loads((source / "generation_config.json").read_bytes())
    before, after = (json.loads((folder / "config.json").read_bytes()) for folder in (source, back))
    assert after == before


def test_notes_say_what_is_rebuilt_and_what_is_lost(files, tmp_path):
    source, path, _ = files
    with open_checkpoint(path) as opened:
        notes = "\n".join(opened.opened.notes)
    for word in (
        "config.json is rebuilt",
        "zai-org/GLM-4.7-Flash",
        "tokenizer.json",
        "ids",
        "flags of added tokens",
        "post-processor",
        "spread over files",
    ):
        assert word in notes
    with open_checkpoint(with_source(path, source, tmp_path / "whole.gguf")) as opened:
        assert opened.opened.notes == ()


def swapped(key, change):
    """The file with the elements of one array of its tokenizer changed."""

    def make(entries, tensors):
        at = next(n for n, entry in enumerate(entries) if entry.key == f"tokenizer.ggml.{key}")
        entries[at] = Entry(entries[at].key, entries[at].kind, change(entries[at].value))

    return make


def elements(change):
    def make(array):
        values = list(array.values)
        change(values)
        return Array(array.kind, values)

    return make


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (swapped("tokens", elements(lambda values: values.pop())), "the model has"),
        (swapped("tokens", elements(lambda values: values.__setitem__(3, values[4]))), "twice"),
        (swapped("tokens", elements(lambda values: values.__setitem__(3, "x\udcff"))), "no UTF-8"),
        (swapped("tokens", lambda array: Array(Kind.I32, list(range(len(array.values))))), "no array of STRING"),
        (swapped("token_type", elements(lambda values: values.pop())), "the model has"),
        (swapped("merges", elements(lambda values: values.append("q x"))), "no tokens"),
        (swapped("merges", elements(lambda values: values.append("qx"))), "no tokens"),
        (swapped("eos_token_id", lambda value: 2**31), "eos_token_id"),
    ],
)
def test_a_tokenizer_that_does_not_fit_together_is_refused(change, says, files, glmconv, tmp_path):
    path = changed(files[1], tmp_path / "broken.gguf", change)
    answer = glmconv("convert", path, tmp_path / "out", "--to", "hf")
    assert (answer.code, len(answer.errors)) == (5, 1)
    assert says in answer.err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_another_kind_is_refused(files, tmp_path):
    with pytest.raises(UnsupportedError, match="gpt2"):
        open_checkpoint(changed(files[1], tmp_path / "llama.gguf", swapped("model", lambda value: "llama")))
    with pytest.raises(UnsupportedError, match="token_type has 6"):
        open_checkpoint(changed(files[1], tmp_path / "bytes.gguf", swapped("token_type", elements(lambda values: values.__setitem__(0, 6)))))
    with pytest.raises(SourceError, match="config"):
        open_checkpoint(changed(with_source(files[1], files[0], tmp_path / "a.gguf"), tmp_path / "b.gguf", other_size))


def other_size(entries, tensors):
    at = next(n for n, entry in enumerate(entries) if entry.key.endswith(".embedding_length"))
    entries[at] = Entry(entries[at].key, entries[at].kind, 4096)
