"""slime's and miles' tools/convert_hf_to_int4_direct.py: 4 bits in compressed-tensors' pack-quantized, rounded to nearest."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentTypeError

from dropin import Parser, finish, note, run, workers

# The peers' own default: routed experts only
IGNORED = ("re:.*lm_head.*", "re:.*norm.*", "re:.*embed.*", "re:.*self_attn.*", "re:.*shared_experts.*",
           r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", r"re:.*mlp\.gate\.*")  # fmt: skip
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def truth(text: str) -> bool:
    """true or false, as they are written; Python's bool("False") is True."""
    if text.lower() not in TRUTH:
        raise ArgumentTypeError(f"{text!r} is neither true nor false")
    return TRUTH[text.lower()]


def parser() -> Parser:
    made = Parser("slime's and miles' tools/convert_hf_to_int4_direct.py", "Quantize a release's routed experts to 4 bits.")
    made.add_argument("--model-dir", required=True, help="folder or Hub id of the release")
    made.add_argument("--save-dir", required=True, help="folder to write")
    made.add_argument("--group-size", type=int, default=32, help="columns under one scale: 32, 64 or 128")
    made.add_argument("--is-symmetric", type=truth, nargs="?", const=True, metavar="true|false", help="also alone; default: true")
    made.add_argument("--ignore-rules", nargs="+", default=list(IGNORED), help="tensors to leave as they are: a name's beginning, or re:PATTERN")
    made.add_argument("--max-workers", type=int, help="threads")
    return made


def pattern(rule: str) -> str:
    """A rule as the regular expression that glmconv looks for in names: the peers match from the name's beginning."""
    return f"^(?:{rule.removeprefix('re:')})" if rule.startswith("re:") else f"^{re.escape(rule)}"


def main(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    if args.is_symmetric is None:
        note("note: --is-symmetric is not given: symmetric is taken (miles' default; a slime script of this name had asymmetric)")
    form = "asym" if args.is_symmetric is False else "sym"
    keep = [word for rule in args.ignore_rules for word in ("--keep", pattern(rule))]
    return run("convert", args.model_dir, args.save_dir, "--to", f"int4:g{args.group_size}:{form}", *keep, *workers(args.max_workers))


if __name__ == "__main__":
    finish(lambda: main(sys.argv[1:]))
