"""From a command to an exit code: signals become a clean stop, errors one line on stderr, defects of ours a traceback in a log file."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from glmconv.cli.output import say
from glmconv.errors import ExitCode, GlmconvError, Interrupted


class Stop(threading.Event):
    """Set by SIGINT or SIGTERM; remembers which."""

    signum = signal.SIGINT


@contextmanager
def stoppable() -> Iterator[Stop]:
    """A Stop that the two signals set. A second one within the run ends the process at once, as if killed: the next run goes on all the same."""
    stop = Stop()

    def handle(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(128 + signum)
        stop.signum = signal.Signals(signum)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except Interrupted:
        raise Interrupted(stop.signum) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def downloaded(*names: str | None) -> None:
    """Fetch what is only on the Hub before signals are ours: a download must end at the first Ctrl-C, and it resumes by itself."""
    from glmconv.checkpoint import resolve

    for name in names:
        if name is not None and not os.path.isfile(name):
            resolve(name)


def exit_code(problem: BaseException, *, debug: bool) -> int:
    """Say what went wrong and give its exit code."""
    if isinstance(problem, GlmconvError):
        if debug:
            traceback.print_exception(problem)
        say(f"error: {problem.line}")
        return int(problem.code)
    if isinstance(problem, KeyboardInterrupt):
        say("error: interrupted. Run the same command again to go on.")
        return int(ExitCode.INTERRUPTED)
    if debug:
        traceback.print_exception(problem)
        return int(ExitCode.BUG)
    say(f"error: a defect of glmconv: {type(problem).__name__}. The traceback is in {_log(problem)}; please report it.")
    return int(ExitCode.BUG)


def _log(problem: BaseException) -> str:
    try:
        fd, path = tempfile.mkstemp(prefix="glmconv-", suffix=".log")
        with os.fdopen(fd, "w") as file:
            file.write(f"glmconv {' '.join(sys.argv[1:])}\n")
            traceback.print_exception(problem, file=file)
    except OSError:
        return "no file (it could not be written; use --debug)"
    return path
