"""The deployment guide's fp8_quant.py: FP8 in blocks of 128 x 128, as the engines' fast kernels want it."""

from __future__ import annotations

from quantize import finish, guide_parser, quantize, sys

TARGETS = {"block": "fp8", "channel": "fp8:channel", "tensor": "fp8:tensor"}


def main(argv: list[str]) -> int:
    made = guide_parser("fp8_quant.py", "Quantize a model to FP8.")
    made.add_argument("--strategy", choices=list(TARGETS), default="block", help="what a scale is for")
    args = made.parse_args(argv)
    return quantize(args.model_path, args.output_path, TARGETS[args.strategy], args.max_workers)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
