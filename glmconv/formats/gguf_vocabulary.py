"""A release's tokenizer files out of a GGUF file's keys: tokens, types and merges as a byte-level BPE that cuts text as GLM's does.

The way there is `gguf_tokenizer`. Not in GGUF: which added tokens strip blanks, which of those that look like `<|…|>` are special, the
post-processor, and what tokenizer_config.json says beside its special tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.gguf_config import shortest
from glmconv.formats.gguf_general import GENERATION, SAMPLING
from glmconv.formats.gguf_tokenizer import CONTROL, NORMAL, SETTINGS, SPLIT, TEMPLATE, TOKENIZER, UNUSED, USER_DEFINED
from glmconv.formats.gguf_types import Array, Kind, Value
from glmconv.formats.side_files import as_json

TYPES = (NORMAL, CONTROL, USER_DEFINED, UNUSED)
PREFIX = "tokenizer.ggml."
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
HOLE = "[PAD"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, checked; `added` are those that are no pieces of text, id -> whether it is special."""

    tokens: Sequence[str]
    added: Mapping[int, bool]
    merges: Sequence[tuple[str, str]]


def tokenizer_files(kv: Mapping[str, Value], ends: Sequence[int], size: int, file: Path) -> dict[str, bytes]:
    """tokenizer.json, tokenizer_config.json, generation_config.json and the chat template, by name; none if the file has no tokens.

    ends: the tokens that end an answer
    size: of the model's vocabulary
    SourceError for tokens, types or merges that do not fit together; UnsupportedError for a tokenizer that is none of GLM's.
    """
    if f"{PREFIX}tokens" not in kv:
        return {}
    if (model := kv.get(f"{PREFIX}model")) is None or model.value != "gpt2":
        raise UnsupportedError(f"{PREFIX}model is {str(model.value)[:60] if model else 'missing'}; GLM's is gpt2.", file=file)
    vocabulary = read_vocabulary(kv, size, file)
    found = {TOKENIZER: as_json(tokenizer_json(vocabulary)), SETTINGS: as_json(settings(kv, vocabulary, file))}
    template = kv.get("tokenizer.chat_template")
    if template is not None and isinstance(template.value, str):
        found[TEMPLATE] = template.value.encode("utf-8", "surrogateescape")
    return found | {GENERATION: as_json(generation(kv, ends))}


def read_vocabulary(kv: Mapping[str, Value], size: int, file: Path) -> Vocabulary:
    tokens = _strings(kv, "tokens", file)
    types = _elements(kv, "token_type", Kind.I32, file) if f"{PREFIX}token_type" in kv else [NORMAL] * len(tokens)
    if len(tokens) != size or len(types) != size:
        raise SourceError(f"has {len(tokens):,} tokens and {len(types):,} types of them; the model has {size:,}.", file=file)
    wrong = next((kind for kind in types if kind not in TYPES), None)
    if wrong is not None:
        raise UnsupportedError(f"{PREFIX}token_type has {wrong}, which no GLM has.", file=file)
    used = [token for token, kind in zip(tokens, types, strict=True) if kind != UNUSED]
    known = set(used)
    if len(known) < len(used):
        twice = next(token for token in used if used.count(token) > 1)
        raise SourceError(f"has the token {twice[:60]!r} twice.", file=file)
    merges = [_parts(merge, known, file) for merge in _strings(kv, "merges", file)]
    added = {number: kind == CONTROL for number, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)}
    return Vocabulary([token if kind != UNUSED else "" for token, kind in zip(tokens, types, strict=True)], added, merges)


def _parts(merge: str, known: set[str], file: Path) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not {left, right, left + right} <= known:
        raise SourceError(f"merges {merge[:60]!r}, which are no tokens, or make none.", file=file)
    return left, right


def _elements(kv: Mapping[str, Value], name: str, kind: Kind, file: Path) -> Sequence[object]:
    found = kv.get(PREFIX + name)
    if found is None or not isinstance(found.value, Array) or (found.value.kind is not kind and found.value.values):
        raise SourceError(f"{PREFIX}{name} is {'missing' if found is None else f'no array of {kind.name}'}.", file=file)
    return found.value.values


def _strings(kv: Mapping[str, Value], name: str, file: Path) -> list[str]:
    found = [value for value in _elements(kv, name, Kind.STRING, file) if isinstance(value, str)]
    if any("\udc80" <= max(text, default="") <= "\udcff" for text in found):
        raise SourceError(f"{PREFIX}{name} has bytes that are no UTF-8.", file=file)
    return found


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, object]:
    added = vocabulary.added
    pieces = {token: number for number, token in enumerate(vocabulary.tokens) if token and number not in added}
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": n, "content": vocabulary.tokens[n], **FLAGS, "special": special} for n, special in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": True, "vocab": pieces, "merges": [list(pair) for pair in vocabulary.merges],
        },
    }  # fmt: skip


def settings(kv: Mapping[str, Value], vocabulary: Vocabulary, file: Path) -> dict[str, object]:
    """tokenizer_config.json. The start and unknown tokens that llama.cpp's converter forces are none of the releases'."""
    architecture = kv["general.architecture"].value
    decoder = {str(n): {"content": vocabulary.tokens[n], **FLAGS, "special": special} for n, special in vocabulary.added.items()}
    found: dict[str, object] = {
        "added_tokens_decoder": decoder,
        "additional_special_tokens": [vocabulary.tokens[n] for n, special in vocabulary.added.items() if special],
        "clean_up_tokenization_spaces": False, "do_lower_case": False,
    }  # fmt: skip
    for field, key in (("eos_token", "eos"), ("pad_token", "padding")):
        number = kv.get(f"{PREFIX}{key}_token_id")
        if number is not None:
            if not isinstance(number.value, int) or not 0 <= number.value < len(vocabulary.tokens):
                raise SourceError(f"{PREFIX}{key}_token_id is {str(number.value)[:60]}; there are {len(vocabulary.tokens):,} tokens.", file=file)
            found[field] = vocabulary.tokens[number.value]
    length = kv.get(f"{architecture}.context_length")
    if length is not None:
        found["model_max_length"] = length.value
    return found | {"padding_side": "left", "remove_space": False, "tokenizer_class": "PreTrainedTokenizerFast"}


def generation(kv: Mapping[str, Value], ends: Sequence[int]) -> dict[str, object]:
    """generation_config.json: what ends an answer, and how to sample where the file says so."""
    found: dict[str, object] = {"_from_model_config": True, "eos_token_id": list(ends)}
    pad = kv.get(f"{PREFIX}padding_token_id")
    if pad is not None:
        found["pad_token_id"] = pad.value
    for fields, key, kind in SAMPLING:
        value = kv.get(f"general.sampling.{key}")
        if value is not None and value.kind is kind:
            found[fields.rpartition("|")[2]] = _plain(value.value)
    if "temperature" in found or "top_p" in found:
        found["do_sample"] = True
    return found


def _plain(value: object) -> object:
    return shortest(value) if isinstance(value, float) else value
