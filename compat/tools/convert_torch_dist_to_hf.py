"""slime's and miles' tools/convert_torch_dist_to_hf.py, with the options of its parallel and Ray spellings: torch_dist as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys

from dropin import Parser, accept, finish, glmconv, note, option, run, workers

WHOSE = "slime's and miles' tools/convert_torch_dist_to_hf.py"
DOES = "Write a Hugging Face folder from a torch_dist checkpoint: its root, release or iter_N folder, of any parallel layout."


def parser(whose: str = WHOSE) -> Parser:
    made = Parser(whose, DOES)
    made.add_argument("--input-dir", required=True, help="the checkpoint")
    made.add_argument("--output-dir", required=True, help="folder to write")
    made.add_argument("--origin-hf-dir", help="the release that it came from: config, tokenizer, file layout")
    made.add_argument("-f", "--force", action="store_true", help="move what is at the output aside (nothing is deleted)")
    made.add_argument("-a", "--add-missing-from-origin-hf", action="store_true", help="take the MTP layers from the release if they are missing")
    made.add_argument("--chunk-size", type=int, help="bytes a shard; default: the release's own files, or 5 GB")
    made.add_argument("--vocab-size", type=int, help="rows of the vocabulary; must be the release's")
    accept(made, "--model-name", because="config.json says which architecture it is")
    return made


def main(argv: list[str]) -> int:
    return convert(parser().parse_args(argv))


def convert(args: argparse.Namespace, *more: object, threads: int | None = None) -> int:
    """Run what `parser` has parsed; `more` are further words for glmconv."""
    with glmconv.open_checkpoint(args.input_dir, origin=args.origin_hf_dir, strict=False) as checkpoint:
        vocab, has_mtp = checkpoint.arch.sizes["vocab"], checkpoint.arch.sizes.get("mtp", 0)
    if args.vocab_size not in (None, vocab):
        note(f"error: --vocab-size {args.vocab_size}: config.json says {vocab}. Padding is cut off by config.json; leave --vocab-size out.")
        return 2
    graft = args.origin_hf_dir if args.add_missing_from_origin_hf and not has_mtp else None
    if args.add_missing_from_origin_hf and has_mtp:
        note("note: -a: nothing to add, the MTP layer is there; any other missing tensor is an error that names it")
    return run(
        "convert", args.input_dir, args.output_dir, "--to", "hf", *option("--origin", args.origin_hf_dir), *option("--mtp-from", graft),
        *option("--overwrite", args.force), *option("--shard-size", args.chunk_size), *workers(threads), *more,
    )  # fmt: skip


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
