"""GGUF, llama.cpp's files: written in one pass from any source; not read yet."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from glmconv.engine.plan import Plan
from glmconv.errors import UnsupportedError
from glmconv.formats import gguf_layout, gguf_mmproj
from glmconv.formats.format import Format, LayoutOptions, Opened, OpenOptions


def detect(path: Path) -> bool:
    return False


def plan(opened: Opened, options: LayoutOptions) -> Plan:
    """The language model's file, or the vision tower's."""
    write = gguf_mmproj.plan if gguf_mmproj.mmproj_named(options.file_type) else gguf_layout.plan
    return write(opened, options)


def open_file(path: Path, options: OpenOptions) -> NoReturn:
    raise UnsupportedError("is GGUF, which is not read yet.", file=path)


GGUF = Format("gguf", "GGUF (llama.cpp)", detect, open_file, plan, readable=False)
