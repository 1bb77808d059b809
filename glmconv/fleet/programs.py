"""The one place that starts other programs: rsync, and a shell on another machine. Always a list of arguments, never a line for a shell of ours."""

from __future__ import annotations

import shlex
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass

from glmconv.errors import CapacityError, Interrupted, UsageError
from glmconv.fleet.hosts import Machine

POLL_SECONDS = 0.2
REMOTE_SHELL = "ssh -o BatchMode=yes -o ConnectTimeout=20"  # asks for no password: there is nobody to answer
RSYNC = ("rsync", "--times", "--perms", "--partial", "--from0", "--files-from=-", "--protect-args")


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it said."""

    code: int
    out: str
    err: str

    @property
    def reason(self) -> str:
        """The last line of what it complained of."""
        lines = [line for line in self.err.splitlines() if line.strip()]
        return lines[-1] if lines else f"exit code {self.code}"


def run(command: Sequence[str], text: str, stop: threading.Event | None) -> Ended:
    """Run a program to its end, `text` on its stdin. CapacityError if it is not installed; `stop`, once set, ends it (Interrupted)."""
    try:
        child = subprocess.Popen(
            list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace"
        )
    except FileNotFoundError as error:
        raise CapacityError(f"{command[0]} is not installed.", hint=f"Install it: apt-get install {command[0]}, or your system's package.") from error
    except OSError as error:
        raise CapacityError(f"{command[0]} cannot be started: {error.strerror}.") from error
    given: str | None = text
    while True:
        try:
            out, err = child.communicate(given, timeout=POLL_SECONDS)
            return Ended(child.returncode, out, err)
        except subprocess.TimeoutExpired:
            given = None  # it is being written already
            if stop is not None and stop.is_set():
                child.terminate()
                child.communicate()
                raise Interrupted(int(getattr(stop, "signum", 2))) from None


def words_of(remote_shell: str) -> list[str]:
    """`ssh -p 2222` as a list. UsageError if its quotes do not end, or if it is empty."""
    try:
        words = shlex.split(remote_shell)
    except ValueError as error:
        raise UsageError(f"--rsh {remote_shell!r}: {error}.") from error
    if not words:
        raise UsageError("--rsh is empty.")
    return words


def on(machine: Machine, script: str, *, remote_shell: str, text: str = "", stop: threading.Event | None = None) -> Ended:
    """Run a few lines of POSIX shell on a machine; what is put into `script` must be quoted."""
    if machine.local:
        return run(["sh", "-c", script], text, stop)
    return run([*words_of(remote_shell), machine.name, script], text, stop)


def rsync(
    base: str, names: Sequence[str], machine: Machine, folder: str, *, remote_shell: str, again: bool = False, stop: threading.Event | None = None
) -> Ended:
    """Copy files of `base` by their names into a machine's `folder`, which must be there. `again` copies what looks the same by size and time too."""
    target = folder if machine.local else f"{machine.for_rsync}:{folder}"
    words = [*RSYNC, *(["--ignore-times"] if again else []), "--rsh", shlex.join(words_of(remote_shell)), "--", f"{base}/", f"{target}/"]
    return run(words, "\0".join(names) + "\0", stop)
