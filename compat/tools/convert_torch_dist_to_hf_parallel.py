"""slime's tools/convert_torch_dist_to_hf_parallel.py: convert_torch_dist_to_hf.py with numbers of threads."""

from __future__ import annotations

import sys

from convert_torch_dist_to_hf import convert
from convert_torch_dist_to_hf import parser as plain_parser
from dropin import Parser, accept, finish


def parser() -> Parser:
    made = plain_parser("slime's tools/convert_torch_dist_to_hf_parallel.py")
    made.add_argument("--save-max-workers", type=int, default=16, help="threads; each reads, converts and writes")
    accept(made, "--load-max-workers", because="the threads of --save-max-workers read too")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    return convert(args, threads=args.save_max_workers)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
