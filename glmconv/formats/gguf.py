"""GGUF, llama.cpp's files: written in one pass from any source, read by the table that writes them."""

from __future__ import annotations

from glmconv.engine.plan import Plan
from glmconv.formats import gguf_layout, gguf_mmproj
from glmconv.formats.format import Format, LayoutOptions, Opened
from glmconv.formats.gguf_source import detect, manifest_at, open_source


def plan(opened: Opened, options: LayoutOptions) -> Plan:
    """The language model's file, or the vision tower's."""
    write = gguf_mmproj.plan if gguf_mmproj.mmproj_named(options.file_type) else gguf_layout.plan
    return write(opened, options)


GGUF = Format("gguf", "GGUF (llama.cpp)", detect, open_source, plan, manifest_at=manifest_at)
