"""slime's tools/convert_to_hf.py: the checkpoint that a run would load as a Hugging Face folder, without starting Megatron."""

from __future__ import annotations

import sys

from dropin import Parser, finish, note, option, run


def parser() -> Parser:
    made = Parser("slime's tools/convert_to_hf.py", "Write a Hugging Face folder from the torch_dist checkpoint that --load names.",
                  epilog="Every argument of Megatron is accepted.")  # fmt: skip
    made.add_argument("--load", required=True, help="the checkpoint: its root, release or iter_N folder")
    made.add_argument("--hf-checkpoint", required=True, help="folder or Hub id of the release that it came from")
    made.add_argument("--output-dir", help="folder to write")
    made.add_argument("--check-same", action="store_true", help="compare with the release, bit by bit: exit 1 if a bit differs")
    return made


def main(argv: list[str]) -> int:
    args, _ = parser().parse_known_args(argv)
    if not args.output_dir and not args.check_same:
        note("error: neither --output-dir nor --check-same: there is nothing to do.")
        return 2
    code = run("convert", args.load, args.output_dir, "--to", "hf", *option("--origin", args.hf_checkpoint)) if args.output_dir else 0
    if code == 0 and args.check_same:
        return run("verify", args.hf_checkpoint, args.load, *option("--origin", args.hf_checkpoint))
    return code


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
