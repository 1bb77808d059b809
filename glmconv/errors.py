"""What can go wrong, one class per exit code. Raised where the fact is known, caught once, in `cli`."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """The process's exit codes; `docs/cli.md` says what each means to a script."""

    OK = 0
    DIFFERENT = 1
    USAGE = 2
    CAPACITY = 3
    DESTINATION = 4
    SOURCE = 5
    UNSUPPORTED = 6
    OUTPUT = 7
    VERIFICATION = 8
    BUG = 70
    INTERRUPTED = 130
    TERMINATED = 143


def printable(text: str, limit: int = 300) -> str:
    """`text` with control and format characters escaped and its length bounded: names come from hostile files."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


class GlmconvError(Exception):
    """One clear line: `FILE[: TENSOR | @OFFSET]: what is wrong. What to do.`"""

    code = ExitCode.BUG

    def __init__(self, what: str, *, file: object = None, tensor: str | None = None, offset: int | None = None, hint: str = "") -> None:
        place = [printable(str(file), 4096)] if file is not None else []
        if tensor is not None:
            place.append(printable(tensor))
        if offset is not None:
            place.append(f"@{offset}")
        self.located = bool(place)  # whether it says where; a codec's does not, and who called it adds that
        self.line = ": ".join([*place, printable(what, 2000)]) + (f" {printable(hint, 1000)}" if hint else "")
        super().__init__(self.line)


class UsageError(GlmconvError):
    """The command line asks for something that does not exist or contradicts itself."""

    code = ExitCode.USAGE


class CapacityError(GlmconvError):
    """Not possible here: disk, memory or parallel layout. Found before anything is written."""

    code = ExitCode.CAPACITY


class DestinationError(GlmconvError):
    """The destination belongs to another job, is not empty, is inside the source or the reverse, or cannot be written."""

    code = ExitCode.DESTINATION


class SourceError(GlmconvError):
    """The source is corrupt, incomplete or hostile, or it changed while it was read."""

    code = ExitCode.SOURCE


class UnsupportedError(GlmconvError):
    """An architecture, format or variant that glmconv does not know."""

    code = ExitCode.UNSUPPORTED


class OutputError(GlmconvError):
    """The output failed on the way (disk full, I/O error); what is done is kept and the same command resumes."""

    code = ExitCode.OUTPUT


class VerificationError(GlmconvError):
    """Written, but reading it back did not give the source's tensors."""

    code = ExitCode.VERIFICATION


class Interrupted(GlmconvError):
    """SIGINT or SIGTERM; state is saved and the same command resumes."""

    def __init__(self, signum: int) -> None:
        self.code = ExitCode(128 + signum)
        super().__init__("interrupted; finished files are kept.", hint="Run the same command again to go on.")
