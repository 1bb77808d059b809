"""miles' tools/convert_torch_dist_to_hf_ray.py: convert_torch_dist_to_hf.py for many workers. No Ray: threads, or torchrun's ranks."""

from __future__ import annotations

import sys

from convert_torch_dist_to_hf import convert
from convert_torch_dist_to_hf import parser as plain_parser
from dropin import Parser, accept, finish, option, refuse


def parser() -> Parser:
    made = plain_parser("miles' tools/convert_torch_dist_to_hf_ray.py")
    made.add_argument("--max-file-bytes", type=int, help="bytes a shard, as --chunk-size")
    made.add_argument("--concurrency", type=int, help="threads")
    made.add_argument("--source-key-regex", help="refused: a checkpoint is converted whole")
    made.add_argument("--dry-run-plan", action="store_true", help="say what would be written, write nothing")
    made.add_argument("--no-progress", action="store_true", help="no progress on stderr")
    accept(made, "--task-group-bytes", "--progress-interval-seconds", because="a job is a file, and there is no Ray")
    return made


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.source_key_regex is not None:
        return refuse("--source-key-regex: a part of a checkpoint is no checkpoint.", "Convert it whole.")
    args.chunk_size = args.max_file_bytes or args.chunk_size
    quiet = option("--progress", "none" if args.no_progress else None)
    return convert(args, *option("--dry-run", args.dry_run_plan), *quiet, threads=args.concurrency)


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
