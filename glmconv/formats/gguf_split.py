"""Several files instead of one: names, keys and what lies in which as llama-gguf-split has them.

Source: llama.cpp's tools/gguf-split/gguf-split.cpp, and files that it wrote (tests/vectors/gguf_split).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePath

from glmconv.formats.gguf_header import padded
from glmconv.formats.gguf_options import GgufOptions
from glmconv.formats.gguf_types import Entry, Kind

PART = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def split_name(name: str, number: int, count: int) -> str:
    """The file `number` (from 0) of `count`, of the output `name`, which ends in `.gguf`."""
    return f"{PurePath(name).stem}-{number + 1:05d}-of-{count:05d}.gguf"


def whole_name(name: str) -> str:
    """The output that a file belongs to: itself, or what it is a part of by its name."""
    found = PART.fullmatch(name)
    return f"{found['prefix']}.gguf" if found else name


def groups(sizes: Sequence[int], options: GgufOptions) -> list[range]:
    """Which tensors lie in which file, by their bytes: padding counts, headers do not. A tensor that is too large lies alone."""
    begins, filled = [0], 0
    for at, size in enumerate(map(padded, sizes)):
        if at and _full(at, filled + size, options):
            begins.append(at)
            filled = 0
        filled += size
    return [range(begin, end) for begin, end in zip(begins, [*begins[1:], len(sizes)], strict=True)]


def _full(at: int, size: int, options: GgufOptions) -> bool:
    """Whether tensor `at`, with which its file would have `size` bytes, begins another."""
    if options.split_max_tensors is not None:
        return at % options.split_max_tensors == 0
    return options.split_max_size is not None and size > options.split_max_size


def split_entries(number: int, count: int, tensors: int) -> list[Entry]:
    """The keys of one file of several; `tensors` are those of all files. The first has them behind all others, the others have no more."""
    return [
        Entry("split.no", Kind.U16, number),
        Entry("split.tensors.count", Kind.I32, tensors),
        Entry("split.count", Kind.U16, count),
    ]
