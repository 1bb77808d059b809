"""Runs one command and watches it: wall clock, and the memory of the process itself from /proc (its children's is not added)."""

from __future__ import annotations

import contextlib
import resource
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLED_EVERY = 0.01  # seconds


@dataclass(frozen=True)
class Watched:
    """What one run took.

    cpu:            user and system seconds of all its threads and children
    peak_rss:       VmHWM in bytes, the kernel's own high-water mark, libraries and mapped files included; 0 where there is no /proc
    peak_anonymous: the largest sampled RssAnon in bytes: heap and buffers
    """

    seconds: float
    cpu: float
    peak_rss: int
    peak_anonymous: int
    stdout: str


def run(command: Sequence[str]) -> Watched:
    """Run `command` to its end. RuntimeError with its stderr if it fails.

    Not `ru_maxrss`: a child inherits its parent's high-water mark over fork and exec, so a small command would seem as large as the bench.
    """
    cpu_before, began = cpu_of_children(), time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        sampler = Sampler(process.pid)
        sampler.start()
        stdout, stderr = process.communicate()
        seconds = time.perf_counter() - began
        sampler.stop()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{stderr}")
    return Watched(seconds, cpu_of_children() - cpu_before, sampler.rss, sampler.anonymous, stdout)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Sampler:
    """Reads /proc/PID/status until stopped; what a process had is gone with it, so the last hundredth of a second may be missed."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.rss = self.anonymous = 0

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(SAMPLED_EVERY):
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if ":" in line)
                self.rss = max(self.rss, kilobytes(fields, "VmHWM"))
                self.anonymous = max(self.anonymous, kilobytes(fields, "RssAnon"))


def kilobytes(fields: dict[str, str], name: str) -> int:
    """A field of /proc/PID/status in bytes; 0 if it is not there, as for a process that has ended."""
    return int(fields.get(name, "0 kB").split()[0]) * 1024


def machine() -> str:
    """The machine in a line: cores, processor, memory."""
    import os
    import platform

    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        model = next(line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{os.cpu_count()} cores, {model}, {memory / 1e9:.0f} GB of memory, Python {platform.python_version()}"
