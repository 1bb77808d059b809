"""The files of a release that are not weights: tokenizer, templates, generation config. They travel as bytes and are never interpreted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from glmconv.dtypes import BY_NAME
from glmconv.engine.inputs import InputFolder
from glmconv.engine.plan import OutputFile, Piece, Run
from glmconv.errors import SourceError
from glmconv.formats.format import FILE_PREFIX, FileRows, RowReader

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".md", ".tiktoken")
NAMES = ("LICENSE", "NOTICE", "merges", "vocab")
LARGEST = 256 << 20
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
OURS = ("glmconv_manifest.json", "glmconv_layout.json")
MEGATRONS = ("metadata.json", "latest_checkpointed_iteration.txt", "progress.txt")


def travels(name: str) -> bool:
    """Whether a file beside the weights is one that a release is not complete without."""
    if name in (*OURS, *MEGATRONS, CONFIG) or name.endswith(".index.json") or name.startswith("."):
        return False
    return name.endswith(SUFFIXES) or name in NAMES


@dataclass(frozen=True)
class SideFiles:
    """Side files ready to be copied, their digests, and what was left behind and why."""

    files: Mapping[str, RowReader]
    digests: Mapping[str, tuple[int, str]]
    notes: tuple[str, ...]


def side_files(folder: InputFolder, names: list[str], first_number: int) -> SideFiles:
    """The side files among `names`. SourceError if one is too large."""
    files: dict[str, RowReader] = {}
    digests: dict[str, tuple[int, str]] = {}
    left = [name for name in names if not travels(name) and name.endswith((".py", ".bin", ".pt", ".pth", ".pkl"))]
    for name in filter(travels, names):
        file = folder.open(name)
        if file.size > LARGEST:
            raise SourceError(f"is {file.size:,} bytes; a side file has at most {LARGEST:,}.", file=name)
        files[name] = FileRows(file, first_number + len(files), 0, (file.size,), BY_NAME["uint8"], 1)
        digests[name] = (file.size, file.digest())
    notes = (f"not copied: {', '.join(left)} (code and pickles are never copied)",) if left else ()
    return SideFiles(files, digests, notes)


def as_json(value: object) -> bytes:
    """A release's JSON file, indented as transformers writes them."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def output_files(files: Mapping[str, RowReader], folder: str = "") -> list[OutputFile]:
    """One job per side file: its bytes, unchanged."""
    made = []
    for name, rows in sorted(files.items()):
        size = rows.shape[0]
        runs = (Run(FILE_PREFIX + name, 0, size),) if size else ()
        made.append(OutputFile(folder + name, b"", (Piece(name, "uint8", (size,), size, runs, digested=False),)))
    return made
