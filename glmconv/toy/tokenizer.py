"""A small byte-level BPE tokenizer of GLM's form: the same pre-tokenizer, special tokens and templates, a vocabulary of a few hundred."""

from __future__ import annotations

import json
from collections.abc import Mapping

from glmconv.toy.images import TOKENS, preprocessor

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # GLM-4.5's tokenizer.json
)
SPECIAL = (
    "<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "/nothink",
)  # fmt: skip
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
WORDS = ("the", "of", "and", "to", "in", "is", "that", "for", "it", "as", "with", "was", "on", "be", "by", "at", "this", "are", "from", "or")
TEMPLATE = """[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>
{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""


def byte_characters() -> list[str]:
    """The printable stand-in of each of the 256 bytes. Source: GPT-2's byte-level BPE, which every byte-level tokenizer.json uses."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def merges() -> list[tuple[str, str]]:
    """Pairs that build each of WORDS, with and without a blank before it, letter by letter."""
    blank = byte_characters()[ord(" ")]
    found: dict[tuple[str, str], None] = {}
    for word in [form for plain in WORDS for form in (plain, blank + plain)]:
        left = word[0]
        for letter in word[1:]:
            found[left, letter] = None
            left += letter
    return list(found)


def special_ids(*, images: bool = False) -> dict[str, int]:
    """Token -> id: the special tokens stand behind bytes and merges, as in the releases; `images`: those of a model that sees at the end."""
    first = 256 + len(merges())
    return {token: first + n for n, token in enumerate(SPECIAL + ADDED + (TOKENS if images else ()))}


SMALLEST_VOCABULARY = 256 + len(merges()) + len(SPECIAL) + len(ADDED) + len(TOKENS)


def tokenizer_json(ids: Mapping[str, int]) -> bytes:
    pairs = merges()
    vocab = {token: n for n, token in enumerate([*byte_characters(), *(left + right for left, right in pairs)])}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [{"id": n, "content": token, **flags, "special": token not in ADDED} for token, n in ids.items()]
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated", "invert": False}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, levels]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": True, "vocab": vocab, "merges": [list(pair) for pair in pairs],
        },
    }  # fmt: skip
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def side_files(config: Mapping[str, object], vision: Mapping[str, object] | None = None) -> dict[str, bytes]:
    """The files beside a release's weights, by name. `config` is the language model's, with the token ids, `vision` the tower's, if there is one."""
    ids = special_ids(images=vision is not None)
    decoder = {
        str(n): {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": token not in ADDED}
        for token, n in ids.items()
    }
    settings = {
        "added_tokens_decoder": decoder, "additional_special_tokens": [token for token in ids if token not in ADDED],
        "clean_up_tokenization_spaces": False, "do_lower_case": False,
        "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "model_max_length": 128000, "padding_side": "left", "remove_space": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    generation = {"_from_model_config": True, "do_sample": True, "eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"],
                  "temperature": 1.0, "top_p": 0.95}  # fmt: skip
    files = {
        "tokenizer.json": tokenizer_json(ids),
        "tokenizer_config.json": (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode(),
        "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
        "chat_template.jinja": TEMPLATE.encode(),
    }
    if vision is not None:
        files["preprocessor_config.json"] = preprocessor(vision)
    return files
