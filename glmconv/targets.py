"""What is to be written: `--to torch_dist`, `--to hf=DIR`. Parsed here, looked up in the registry of formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.errors import UsageError
from glmconv.formats import FORMATS

SPELLINGS = {"huggingface": "hf", "safetensors": "hf", "megatron": "torch_dist", "torch-dist": "torch_dist"}


@dataclass(frozen=True)
class TargetSpec:
    """A format and the folder to write it to; `path` None while only planning."""

    to: str
    path: Path | None


def parse_targets(texts: Sequence[str], destination: Path | None, *, need_path: bool = True) -> list[TargetSpec]:
    """`FORMAT` or `FORMAT=DIR`, one or several; a single one may take the destination from its own argument. UsageError if they do not add up."""
    if not texts:
        raise UsageError("no target is given.", hint=f"Add --to FORMAT; formats: {', '.join(FORMATS)}.")
    found = []
    for text in texts:
        form, _, folder = text.partition("=")
        to = SPELLINGS.get(form.lower(), form.lower())
        if to not in FORMATS:
            raise UsageError(f"--to {form}: no format is called so.", hint=f"Formats: {', '.join(FORMATS)}.")
        if folder and destination is not None:
            raise UsageError("give DST or --to FORMAT=DIR, not both.")
        path = Path(folder) if folder else destination
        if path is None and need_path:
            raise UsageError(f"--to {form}: no folder to write to.", hint=f"Add DST after SRC, or write --to {form}=DIR.")
        found.append(TargetSpec(to, path))
    if need_path and len({target.path for target in found}) < len(found):
        raise UsageError("two targets have the same folder.", hint="Write --to FORMAT=DIR for each.")
    return found
