"""slime's and miles' tools/convert_hf_to_fp8.py: FP8 in blocks, rows or tensors."""

from __future__ import annotations

import sys

from dropin import Parser, finish, note, run, workers


def parser() -> Parser:
    made = Parser("slime's and miles' tools/convert_hf_to_fp8.py", "Quantize a release to FP8. An FP8 release is dequantized first.")
    made.add_argument("--model-dir", required=True, help="folder or Hub id of the release")
    made.add_argument("--save-dir", required=True, help="folder to write; a finished one is left as it is, an unfinished one is finished")
    made.add_argument("--strategy", choices=["block", "channel", "tensor"], default="block", help="what a scale is for")
    made.add_argument("--block-size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="of --strategy block; 128 128 if it is left out")
    made.add_argument("--scale-fmt", choices=["ue8m0"], help="scales that are powers of two, rounded so")
    made.add_argument("--max-workers", type=int, help="threads")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.strategy != "block":
        if args.block_size:
            note(f"note: --block-size is not used: --strategy {args.strategy} has no blocks")
        if args.scale_fmt:
            note(f"error: --scale-fmt {args.scale_fmt}: only blocks have such scales. Leave it out, or use --strategy block.")
            return 2
        target = f"fp8:{args.strategy}"
    else:
        rows, columns = args.block_size or (128, 128)
        block = "" if (rows, columns) == (128, 128) else f":{rows}x{columns}"
        target = "fp8" + (":ue8m0" if args.scale_fmt else "") + block
    return run("convert", args.model_dir, args.save_dir, "--to", target, *workers(args.max_workers))


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
