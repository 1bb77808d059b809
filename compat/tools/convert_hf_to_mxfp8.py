"""miles' tools/convert_hf_to_mxfp8.py: FP8 in groups of 32 under powers of two."""

from __future__ import annotations

import re
import sys

from dropin import Parser, accept, finish, option, run, workers


def parser() -> Parser:
    made = Parser("miles' tools/convert_hf_to_mxfp8.py", "Quantize a release to MXFP8.")
    made.add_argument("--model-dir", required=True, help="folder or Hub id of the release")
    made.add_argument("--save-dir", required=True, help="folder to write")
    made.add_argument("--num-layers-at-start-in-bf16", type=int, default=0, help="first layers to leave as they are")
    made.add_argument("--num-layers-at-end-in-bf16", type=int, default=0, help="last layers to leave as they are")
    made.add_argument("--extra-high-precision-layers-hf", nargs="*", default=[], help="pieces of names of tensors to leave as they are")
    made.add_argument("--max-workers", type=int, help="threads")
    accept(made, "--device", because="everything is done on the CPU")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    keep = [word for piece in args.extra_high_precision_layers_hf for word in ("--keep", re.escape(piece))]
    first, last = args.num_layers_at_start_in_bf16 or None, args.num_layers_at_end_in_bf16 or None
    layers = (*option("--first-layers-bf16", first), *option("--last-layers-bf16", last))
    return run("convert", args.model_dir, args.save_dir, "--to", "mxfp8", *layers, *keep, *workers(args.max_workers))


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
