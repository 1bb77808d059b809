"""GGUF, llama.cpp's files: written in one pass from any source, read by the table that writes them."""

from __future__ import annotations

from glmconv.formats.format import Format
from glmconv.formats.gguf_layout import plan
from glmconv.formats.gguf_source import detect, manifest_at, open_source

GGUF = Format("gguf", "GGUF (llama.cpp)", detect, open_source, plan, manifest_at=manifest_at)
