"""A source's small files inside a GGUF, under keys of glmconv's own that loaders pass over, so that the way back loses nothing.

`glmconv.source.NAME` is the text of the file NAME: config.json, the tokenizer's files, and `glmconv_layout.json`, which tells what tensor lay in
which shard, as in a torch_dist checkpoint.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from glmconv.formats.format import Opened, content_of
from glmconv.formats.gguf_header import BELOW_FOUR, HEADER_LARGEST, HELD_LARGEST, KEY_LONGEST, STRING_LARGEST
from glmconv.formats.gguf_metadata import SOURCE, embedded
from glmconv.formats.gguf_types import Array, Entry, Kind, packed
from glmconv.formats.huggingface_layout import config_for
from glmconv.formats.side_files import CONFIG
from glmconv.formats.torch_dist_layout import LAYOUT, layout_json

ROOM = 1 << 20  # of the header, for what is not counted here: the tensors' names and places


def source_files(opened: Opened) -> Iterator[tuple[str, bytes | None]]:
    """Name and content of what rides along, the small ones first; None for what is too large to be read."""
    yield CONFIG, config_for(opened)
    for name, rows in sorted(opened.side_files.items(), key=lambda item: (item[1].shape[0], item[0])):
        if rows.shape[0] > STRING_LARGEST:
            yield name, None
            continue
        yield name, content_of(rows)
    if opened.layout is not None:
        yield LAYOUT, layout_json(opened.layout)


def embedded_source(opened: Opened, others: Sequence[Entry], tensors: int) -> tuple[list[Entry], list[str]]:
    """The entries that hold the source's files, and notes on what is left out.

    others, tensors: what is in the header beside them. What does not fit with it into what `read_header` reads is left out, and what is no UTF-8.
    """
    size, held = ROOM + 128 * tensors, ROOM
    for entry in others:
        size, held = size + written(entry), held + in_memory(entry)
    files, notes = {}, []
    for name, content in source_files(opened):
        text, why = _text(name, content)
        entry = Entry(SOURCE + name, Kind.STRING, text)
        size, held = size + written(entry), held + in_memory(entry)
        if not why and content is not None and size <= HEADER_LARGEST and held <= HELD_LARGEST:
            files[name] = content
            continue
        size, held = size - written(entry), held - in_memory(entry)
        notes.append(f"{name} does not ride along: {why or 'the header would grow too large'}")
    return embedded(files), notes


def _text(name: str, content: bytes | None) -> tuple[str, str]:
    """The content as text, or why it cannot be written."""
    if not (name.isascii() and name.isprintable() and len(SOURCE + name) <= KEY_LONGEST):
        return "", "its name cannot be a key"
    if content is None or len(content) > STRING_LARGEST:
        return "", f"it has more than {STRING_LARGEST:,} bytes"
    try:
        return content.decode("utf-8"), ""
    except UnicodeDecodeError:
        return "", "it is not UTF-8"


def written(entry: Entry) -> int:
    """Bytes of the entry in the file."""
    return 12 + len(entry.key) + len(packed(entry.kind, entry.value))


def in_memory(entry: Entry) -> int:
    """What `read_header` counts for the entry."""
    if isinstance(entry.value, str):
        data = packed(Kind.STRING, entry.value)[8:]
        return len(data) * (1 if data.isascii() else 4 if data.translate(None, BELOW_FOUR) else 2)
    if isinstance(entry.value, Array):
        texts = [text for text in entry.value.values if isinstance(text, str)]
        return 256 + 40 * len(entry.value.values) + sum(map(sys.getsizeof, texts))
    return 0
