"""The deployment guide's gguf_convert.py: llama.cpp's file."""

from __future__ import annotations

from pathlib import Path

from quantize import finish, guide_parser, quantize, sys


def main(argv: list[str]) -> int:
    made = guide_parser("gguf_convert.py", "Write llama.cpp's GGUF file: OUTPUT_PATH if that ends in .gguf, else a file in that folder.")
    made.add_argument("--quant", "--quantization", "--type", "--outtype", default="Q4_K_M", help="file type, as llama-quantize calls it")
    args = made.parse_args(argv)
    output, kind = Path(args.output_path), args.quant.upper()
    if output.suffix.lower() != ".gguf":
        output = output / f"{Path(args.model_path).name}-{kind}.gguf"
        output.parent.mkdir(parents=True, exist_ok=True)
    return quantize(args.model_path, str(output), f"gguf:{kind}", args.max_workers)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
