"""The command line that the deployment guide's three scripts share: --model_path, --output_path, and what each calls its bits."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from dropin import Parser, finish, note, run, workers

__all__ = ["finish", "guide_parser", "note", "quantize", "sys"]


def guide_parser(script: str, does: str) -> Parser:
    """A parser with the options that all three have, in both spellings."""
    made = Parser(f"the deployment guide's src/deployment/quantization/{script}", does)
    made.add_argument("--model_path", "--model-path", required=True, help="folder or Hub id of the model: Hugging Face or torch_dist, any iteration")
    made.add_argument("--output_path", "--output-path", required=True, help="what to write")
    made.add_argument("--max_workers", "--max-workers", type=int, help="threads")
    return made


def quantize(model: str, output: str, target: str, threads: int | None) -> int:
    return run("convert", model, output, "--to", target, *workers(threads))
