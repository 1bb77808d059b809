"""A release's tokenizer as GGUF keeps it: tokens by id, their types, merges, special tokens, the chat template.

Source: llama.cpp's convert_hf_to_gguf.py (get_vocab_base and the GLM classes' set_vocab) and gguf-py's vocab.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.gguf_types import Array, Entry, Kind
from glmconv.strict_json import array, integer, mapping, parse, string

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
DEFAULT = "default"  # the name of the chat template where there are several
SPLIT = (  # of every GLM since 4-0414; llama.cpp calls it glm4
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE = "glm4"
LARGEST = 32 << 20
VALUES, CONTAINERS = 2_000_000, 600_000  # GLM-5's tokenizer.json: 1.1 million values, 322,000 arrays
SPACE = chr(ord(" ") + 256)
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
FROM_SETTINGS = ("bos", "eos", "unk", "sep", "pad", "mask")
STAND_IN = {"bos": "cls", "eos": "sep"}  # where tokenizer_config.json has none
CONTROLS = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", re.DOTALL)  # whatever their flags say
PLAIN = re.compile(r"[^A-Za-z0-9]")
KEYS = {"unk": "unknown", "sep": "seperator", "pad": "padding"}  # so spelled
# What the converter sets where the release's own files have not
FORCED = {"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"}
FORCED_IN_GLM4 = {"eos": "<|endoftext|>", "eot": "<|user|>", "unk": "<|endoftext|>", "bos": "<|endoftext|>"}


@dataclass(frozen=True)
class Tokenizer:
    """tokenizer.json and tokenizer_config.json, checked: a byte-level BPE that splits as GLM's does."""

    vocab: Mapping[str, int]
    added: Mapping[str, int]
    special: frozenset[str]
    merges: Sequence[str]
    settings: Mapping[str, object]
    templates: Mapping[str, str]  # by name


def tokenizer_entries(architecture: str, vocab_size: int, config: Mapping[str, object], files: Mapping[str, bytes]) -> list[Entry]:
    """The keys of a tokenizer, in the converter's order.

    config: the language model's own, for the ids that tokenizer_config.json leaves out
    files:  those beside the weights, by name
    """
    tokenizer = read_tokenizer(files)
    tokens, types = _tokens(tokenizer, vocab_size)
    entries = [
        Entry("tokenizer.ggml.model", Kind.STRING, "gpt2"),
        Entry("tokenizer.ggml.pre", Kind.STRING, PRE),
        Entry("tokenizer.ggml.tokens", Kind.ARRAY, Array(Kind.STRING, tokens)),
        Entry("tokenizer.ggml.token_type", Kind.ARRAY, Array(Kind.I32, types)),
        Entry("tokenizer.ggml.merges", Kind.ARRAY, Array(Kind.STRING, tokenizer.merges)),
    ]
    ids = _special_ids(tokenizer, config, FORCED_IN_GLM4 if architecture == "glm4" else FORCED, vocab_size)
    entries += [Entry(f"tokenizer.ggml.{KEYS.get(kind, kind)}_token_id", Kind.U32, number) for kind, number in ids.items()]
    entries += [Entry(f"tokenizer.ggml.add_{kind}_token", Kind.BOOL, False) for kind in ("bos", "eos")]  # the template begins with [gMASK]<sop>
    return entries + _template_entries(tokenizer.templates)


def read_tokenizer(files: Mapping[str, bytes]) -> Tokenizer:
    """SourceError if it is missing or broken; UnsupportedError if llama.cpp's `glm4` would cut text otherwise than it does."""
    document = _read(files, TOKENIZER)
    settings = _read(files, SETTINGS) if SETTINGS in files else {}
    _check_splitting(document)
    model = mapping(document["model"], "model", TOKENIZER)
    vocab = {
        token: integer(number, f"the id of {token[:60]}", TOKENIZER) for token, number in mapping(model.get("vocab"), "vocab", TOKENIZER).items()
    }
    added: dict[str, int] = {}
    special: set[str] = set()
    for number, token in [*_added(document), *_added_by_settings(settings)]:
        content = string(token.get("content"), f"the added token {number}", TOKENIZER)
        if added.setdefault(content, number) != number:
            raise SourceError(f"the token {content[:60]} is added as {added[content]} and as {number}.", file=TOKENIZER)
        special.discard(content)
        if token.get("special") is True:
            special.add(content)
    return Tokenizer(vocab, added, frozenset(special), _merges(model), settings, _templates(files, settings))


def _read(files: Mapping[str, bytes], name: str) -> dict[str, object]:
    if name not in files:
        raise SourceError("is missing: a GGUF file holds its tokenizer.", file=name, hint="Take it from the model's release.")
    value = parse(files[name], file=name, limit=LARGEST, wide=LARGEST, values=VALUES, containers=CONTAINERS)
    return mapping(value, name, name)


def _check_splitting(document: Mapping[str, object]) -> None:
    model = document.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedError("is no byte-level BPE.", file=TOKENIZER)
    pre = document.get("pre_tokenizer")
    found = pre.get("pretokenizers") if isinstance(pre, dict) else None
    steps = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    split = len(steps) == 2 and _facts(steps[0]) == ("Split", {"Regex": SPLIT}, "Isolated", False)
    if not split or not _plain_bytes(steps[1]) or document.get("normalizer"):
        what = "cuts text otherwise than GLM's tokenizers since GLM-4-0414 do, which are all that is known here."
        raise UnsupportedError(what, file=TOKENIZER, hint="Is this tokenizer.json from another model?")


def _facts(step: Mapping[str, object]) -> tuple[object, ...]:
    return step.get("type"), step.get("pattern"), step.get("behavior"), step.get("invert", False)


def _plain_bytes(step: Mapping[str, object]) -> bool:
    return step.get("type") == "ByteLevel" and not step.get("add_prefix_space") and not step.get("use_regex")


def _added(document: Mapping[str, object]) -> Iterator[tuple[int, Mapping[str, object]]]:
    for token in array(document.get("added_tokens") or [], "added_tokens", TOKENIZER):
        members = mapping(token, "an added token", TOKENIZER)
        yield integer(members.get("id"), "an added token's id", TOKENIZER), members


def _added_by_settings(settings: Mapping[str, object]) -> Iterator[tuple[int, Mapping[str, object]]]:
    """transformers lets these win over tokenizer.json's."""
    for number, token in mapping(settings.get("added_tokens_decoder") or {}, "added_tokens_decoder", SETTINGS).items():
        if not number.isdecimal() or not number.isascii() or len(number) > 9:
            raise SourceError(f"added_tokens_decoder has {number[:60]}, which is no id.", file=SETTINGS)
        yield int(number), mapping(token, "an added token", SETTINGS)


def _merges(model: Mapping[str, object]) -> list[str]:
    """Each as "a b". A space inside a part becomes the character that stands for its byte."""
    found: list[str] = []
    for merge in array(model.get("merges"), "merges", TOKENIZER):
        if isinstance(merge, str) and merge.count(" ") == 1:
            found.append(merge)
        elif isinstance(merge, list) and len(merge) == 2 and isinstance(merge[0], str) and isinstance(merge[1], str):
            found.append(f"{merge[0].replace(' ', SPACE)} {merge[1].replace(' ', SPACE)}")
        else:
            raise SourceError(f"{str(merge)[:60]} is no pair of merged parts.", file=TOKENIZER)
    return found


def _templates(files: Mapping[str, bytes], settings: Mapping[str, object]) -> dict[str, str]:
    """The chat templates by name. As for the converter, tokenizer_config.json's goes before the file of its own."""
    if "chat_template" not in settings and TEMPLATE in files:
        try:
            text = files[TEMPLATE].decode("utf-8")
        except UnicodeDecodeError as problem:
            raise SourceError("is not UTF-8.", file=TEMPLATE, offset=problem.start) from None
        return {DEFAULT: text.replace("\r\n", "\n").replace("\r", "\n")}
    found = settings.get("chat_template")
    if not isinstance(found, list):
        return {} if found is None else {DEFAULT: string(found, "chat_template", SETTINGS)}
    named = [mapping(choice, "a chat template", SETTINGS) for choice in found]
    texts = {choice.get("name"): choice.get("template") for choice in named}
    return {PLAIN.sub("_", name): string(text, name, SETTINGS) for name, text in texts.items() if isinstance(name, str) and name and text is not None}


def _template_entries(templates: Mapping[str, str]) -> list[Entry]:
    others = [name for name in templates if name != DEFAULT]
    entries = [Entry(f"tokenizer.chat_template.{name}", Kind.STRING, templates[name]) for name in others]
    if others:
        entries.append(Entry("tokenizer.chat_templates", Kind.ARRAY, Array(Kind.STRING, others)))
    if DEFAULT in templates:
        entries.append(Entry("tokenizer.chat_template", Kind.STRING, templates[DEFAULT]))
    return entries


def _tokens(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int]]:
    """(tokens, types) of every id below `size`. SourceError for ids beyond it, or two tokens of one id."""
    by_id: dict[int, str] = {}
    for token, number in {**tokenizer.vocab, **tokenizer.added}.items():
        if number >= size:
            raise SourceError(f"{token[:60]} is token {number}, the model has {size}.", file=TOKENIZER, hint="Is config.json of the same model?")
        if by_id.setdefault(number, token) != token:
            raise SourceError(f"{by_id[number][:60]} and {token[:60]} are both token {number}.", file=TOKENIZER)
    tokens, types = [], []
    for number in range(size):
        token = by_id.get(number, f"[PAD{number}]")
        if number not in by_id:
            kind = UNUSED
        elif token not in tokenizer.added:
            kind = NORMAL
        elif token in tokenizer.special or CONTROLS.fullmatch(token):
            kind = CONTROL
        else:
            kind, token = USER_DEFINED, token.replace("\u2581", " ")
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _special_ids(tokenizer: Tokenizer, config: Mapping[str, object], forced: Mapping[str, str], size: int) -> dict[str, int]:
    """Kind -> id. The first to name a kind wins: tokenizer_config.json, config.json where it names one id, the converter."""
    ids: dict[str, int] = {}
    for kind in FROM_SETTINGS:
        entry = tokenizer.settings.get(f"{kind}_token") or tokenizer.settings.get(f"{STAND_IN.get(kind)}_token")
        content = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(content, str) and content in tokenizer.added:
            ids[kind] = tokenizer.added[content]
    for kind in FROM_SETTINGS:
        number = config.get(f"{kind}_token_id")  # a list, as of GLM's eos, is not read
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size:
            ids.setdefault(kind, number)
    for kind, token in forced.items():
        if token not in tokenizer.added:
            raise SourceError(f"has no token {token}, which is GLM's {kind}.", file=TOKENIZER, hint="Is this tokenizer.json from another model?")
        ids.setdefault(kind, tokenizer.added[token])
    return ids
