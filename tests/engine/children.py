"""Runs in processes of their own, on a real disk: killed or stopped at an operation or at a moment.

One process imports the engine once and forks a child for each order that it reads, so that a kill costs milliseconds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy  # noqa: F401 (the engine imports it when it compares; here once, not in each child)

from glmconv.engine.files import Disk
from glmconv.engine.run import Target, run
from tests.engine.made import CHUNK, MadeSource, made_plan

PLAN = made_plan("child", files=4)
ROOT = Path(__file__).parent.parent.parent


class SignallingDisk(Disk):
    """The real disk; sends this process a signal before its changing operation number `at`."""

    def __init__(self, at: int, signum: int) -> None:
        self.left, self.signum = at, signum
        for kind in ("mkdir", "create", "open_shared", "allocate", "write", "sync", "close", "sync_folder", "link", "rename", "unlink"):
            setattr(self, kind, self._counted(getattr(self, kind)))

    def _counted(self, operation):  # type: ignore[no-untyped-def]
        def counted(*arguments: object) -> object:
            self.left -= 1
            if self.left == -1:
                os.kill(os.getpid(), self.signum)
            return operation(*arguments)

        return counted


def work(root: Path, disk: Disk | None = None, workers: int = 2) -> None:
    """One run to its end."""
    run([Target(PLAN, root)], MadeSource(), workers=workers, chunk_size=CHUNK, disk=disk or Disk())


def serve() -> None:
    """Read orders `<signal> <operation or -1> <seconds> <root>`; run each in a child; answer with how it ended, and with stops as they come."""
    for line in sys.stdin:
        signum, at, seconds, root = line.rstrip("\n").split(" ", 3)
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if float(seconds):
                    signal.setitimer(signal.ITIMER_REAL, float(seconds))  # nobody handles SIGALRM: it kills at once
                work(Path(root), SignallingDisk(int(at), int(signum)) if int(at) >= 0 else Disk())
                status = 0
            finally:
                os._exit(status)
        _, found = os.waitpid(pid, os.WUNTRACED)
        while os.WIFSTOPPED(found):
            answer("stopped")
            sys.stdin.readline()
            os.kill(pid, signal.SIGCONT)
            _, found = os.waitpid(pid, os.WUNTRACED)
        answer(f"killed {os.WTERMSIG(found)}" if os.WIFSIGNALED(found) else f"exit {os.WEXITSTATUS(found)}")


def answer(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@dataclass
class Nursery:
    """The forking process, seen from the test."""

    process: subprocess.Popen[str]

    @classmethod
    def open(cls) -> Nursery:
        command = [sys.executable, "-c", "from tests.engine.children import serve; serve()"]
        return cls(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.process.communicate()

    def ask(self, line: str) -> str:
        """Send one line, read one."""
        pipe_in, pipe_out = self.process.stdin, self.process.stdout
        assert pipe_in is not None
        assert pipe_out is not None
        pipe_in.write(line + "\n")
        pipe_in.flush()
        return pipe_out.readline().strip()

    def run(self, root: Path, *, signum: int = 0, at: int = -1, seconds: float = 0) -> str:
        """How a child's run ended: "exit 0", "killed 9", "stopped"."""
        return self.ask(f"{signum} {at} {seconds:.6f} {root}")

    def go_on(self) -> str:
        """Continue a stopped child; how it ended."""
        return self.ask("")
