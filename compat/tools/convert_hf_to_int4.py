"""slime's tools/convert_hf_to_int4.py, which calibrates: refused, since rounding to nearest under its name would be another thing."""

from __future__ import annotations

import sys

from dropin import Parser, finish, refuse


def parser() -> Parser:
    made = Parser("slime's tools/convert_hf_to_int4.py", "Refused: it quantizes with calibration (GPTQ), which glmconv does not do yet.")
    made.add_argument("--input-dir", required=True, help="folder of the release")
    made.add_argument("--output-dir", required=True, help="folder to write")
    for name in ("--data-dir", "--quant-type", "--num-calibration-samples", "--max-sequence-length", "--dampening-frac", "--quant-group-size"):
        made.add_argument(name)
    made.add_argument("--trust-remote-code", action="store_true")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    instead = f"python tools/convert_hf_to_int4_direct.py --model-dir {args.input_dir} --save-dir {args.output_dir}"
    return refuse("this script calibrates (GPTQ on --data-dir), which is not there yet.", f"Rounded to nearest, without data: {instead}")


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
