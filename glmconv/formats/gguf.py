"""GGUF, llama.cpp's files: written in one pass from any source; not read yet."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from glmconv.errors import UnsupportedError
from glmconv.formats.format import Format, OpenOptions
from glmconv.formats.gguf_layout import plan


def detect(path: Path) -> bool:
    return False


def open_file(path: Path, options: OpenOptions) -> NoReturn:
    raise UnsupportedError("is GGUF, which is not read yet.", file=path)


GGUF = Format("gguf", "GGUF (llama.cpp)", detect, open_file, plan, readable=False)
