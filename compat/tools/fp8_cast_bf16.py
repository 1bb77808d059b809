"""slime's tools/fp8_cast_bf16.py: a quantized release as bfloat16."""

from __future__ import annotations

import sys

from dropin import Parser, finish, run


def parser() -> Parser:
    made = Parser("slime's tools/fp8_cast_bf16.py", "Dequantize a release (FP8 blocks, rows or tensors): code times scale in float32, rounded once.")
    made.add_argument("--input-fp8-hf-path", required=True, help="folder or Hub id of the FP8 release")
    made.add_argument("--output-bf16-hf-path", required=True, help="folder to write")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    return run("convert", args.input_fp8_hf_path, args.output_bf16_hf_path, "--to", "hf")


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
