"""What every drop-in does: say which glmconv command its own command line means, and run that. Ranks behind the first are silent.

The glmconv of the clone that this file lies in is the one that is used, whatever PYTHONPATH and the environment hold; it need not be installed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import glmconv
import glmconv.cli

__all__ = ["Parser", "accept", "finish", "glmconv", "note", "option", "refuse", "run", "workers"]

MOST_WORKERS = 256


class Parser(argparse.ArgumentParser):
    """A parser whose help says where the script comes from. No flag may be shortened: Megatron's own begin alike."""

    def __init__(self, whose: str, does: str, **how: object) -> None:
        description = f"{does}\n\nDrop-in for {whose}: the same command line, run by glmconv, without a GPU and without Megatron."
        super().__init__(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **how)  # type: ignore[arg-type]


class Unneeded(argparse.Action):
    """An option without effect, which says so."""

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        note(f"note: {option_string} is {self.help}")


def accept(parser: argparse.ArgumentParser, *names: str, nargs: int | None = None, because: str) -> None:
    """Options that are taken and not needed; each that is given is named on stderr with the reason. Spellings of one are joined by blanks."""
    for name in names:
        parser.add_argument(*name.split(), action=Unneeded, nargs=nargs, help=f"not needed: {because}")


def note(text: str) -> None:
    """A line on stderr, from the first rank only."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        print(text, file=sys.stderr, flush=True)


def run(verb: str, *words: object) -> int:
    """`glmconv VERB WORDS...`: its exit code."""
    line = [verb, *map(str, words)]
    note(f"= glmconv {shlex.join(line)}")
    return glmconv.cli.execute(line)


def option(name: str, value: object) -> Sequence[object]:
    """`--name value`, or nothing if there is no value."""
    return () if value is None or value is False else (name,) if value is True else (name, value)


def workers(number: int | None) -> Sequence[object]:
    """`--workers N`, as many as glmconv takes at most."""
    return option("--workers", None if number is None else max(1, min(number, MOST_WORKERS)))


def finish(main: Callable[[], int]) -> None:
    """Exit with the code of `main`; what is wrong is one line."""
    try:
        code = main()
    except glmconv.GlmconvError as problem:
        print(f"error: {problem.line}", file=sys.stderr)
        code = int(problem.code)
    sys.exit(code)


def refuse(what: str, instead: str) -> int:
    """Say that something is not done here, and what to do; the exit code of what is not supported."""
    print(f"error: {what} {instead}", file=sys.stderr)
    return 6
