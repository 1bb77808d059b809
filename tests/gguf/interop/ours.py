"""glmconv's own files of a fixture, by its command line, and what stands in tests/vectors/interop of them."""

from __future__ import annotations

import io
import json
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

from glmconv.cli import execute
from tests.gguf.interop.digests import Content, content
from tests.gguf.interop.fixtures import FIXTURES
from tests.gguf.interop.importance import in_gguf, in_the_old_form, sums_of

VECTORS = Path(__file__).parents[2] / "vectors/interop"
AIDED = "+imatrix"
IMATRIX = "model.imatrix"
# What only glmconv's files say, on purpose (docs/gguf.md): llama.cpp's converter leaves it out where config.json has no scoring_func
DELIBERATE = frozenset({"deepseek2.expert_gating_func"})


def stored(name: str) -> dict:
    return json.loads((VECTORS / f"{name}.json").read_text(encoding="utf-8"))


def written(name: str, source: Path, folder: Path, types: tuple[str, ...], importance: str = "") -> dict[str, Content]:
    """File type -> what the file holds that `glmconv convert` writes; all in one run, below `folder`, where nothing is left of them."""
    aided = ["--imatrix", importance] if importance else []
    dropped = [] if FIXTURES[name].mtp else ["--mtp", "drop"]
    with tempfile.TemporaryDirectory(dir=folder) as inside, redirect_stdout(io.StringIO()):
        targets = [part for each in types for part in ("--to", f"gguf:{each}={inside}/{each}.gguf")]
        code = execute(["convert", "-q", str(source), *targets, *aided, *dropped])
        if code:
            raise RuntimeError(f"{name}: glmconv convert ended with {code}")
        return {each: content(Path(inside) / f"{each}.gguf").without(DELIBERATE) for each in types}


def importance_file(name: str, made_of: Content, folder: Path) -> str:
    """Writes the fixture's importance file; its name in `folder`. `made_of` is any of its GGUF files."""
    fixture = FIXTURES[name]
    sums = sums_of(made_of, fixture.layers, unseen=fixture.unseen)
    (in_the_old_form if fixture.old else in_gguf)(sums, folder / IMATRIX)
    return IMATRIX
