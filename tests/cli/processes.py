"""The command line as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GLMCONV = (sys.executable, "-m", "glmconv")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def called(*arguments: object, program: tuple[str, ...] = GLMCONV[1:], **how: object) -> subprocess.CompletedProcess[str]:
    """`glmconv` to its end, with what it said."""
    command = [sys.executable, *program, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, **{"capture_output": True, "text": True, "timeout": 120, **how})  # type: ignore[call-overload,no-any-return]


def alone(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A shell script in a mount namespace of its own: what it mounts is gone with it. $GLMCONV is the command."""
    command = ["unshare", "--mount", "sh", "-eu", "-c", script, "sh", *map(str, arguments)]
    environment = {**ENVIRONMENT, "GLMCONV": " ".join(GLMCONV)}
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)


def may_mount() -> bool:
    """Whether this user may mount a tmpfs in a namespace of its own."""
    try:
        return alone("mount -t tmpfs -o size=64k tmpfs /mnt").returncode == 0
    except OSError:
        return False


def records(there: Path) -> list[Path]:
    """One for each file that a run has finished."""
    return list(there.glob(".glmconv/*.journal/*.json"))


def when(child: subprocess.Popen[str], come: Callable[[], bool]) -> None:
    """Return as soon as something has come about, which must be before the child ends."""
    while not come():
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(0.002)
            out, err = child.communicate()
            raise AssertionError(f"it ended with {child.returncode} before: {out}{err}")
