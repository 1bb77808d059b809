"""The deployment guide's awq_quantize.py: 4 bits in AutoAWQ's layout."""

from __future__ import annotations

from quantize import finish, guide_parser, note, quantize, sys


def main(argv: list[str]) -> int:
    made = guide_parser("awq_quantize.py", "Quantize a model to 4 bits in AutoAWQ's gemm layout, rounded to nearest.")
    made.add_argument("--bits", type=int, choices=[4], default=4, help="4")
    made.add_argument("--group_size", "--group-size", default="128", choices=["128", "64", "32", "auto"], help="auto: the largest that divides")
    args = made.parse_args(argv)
    note("note: rounded to nearest, without calibration: a calibrated AWQ loses less")
    return quantize(args.model_path, args.output_path, f"awq:{'' if args.group_size == 'auto' else 'g'}{args.group_size}", args.max_workers)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
