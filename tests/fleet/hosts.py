"""Several hosts on one machine: network namespaces joined by virtual cables. Needs root and Debian's iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

NETWORK = "10.231.77"


def ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=True, timeout=30)
    return done.stdout


@dataclass(frozen=True)
class Host:
    """A namespace with an address of its own. Its processes are all that run inside."""

    name: str
    address: str

    def start(self, command: list[str], environment: dict[str, str], folder: str) -> subprocess.Popen[str]:
        inside = ["ip", "netns", "exec", self.name, *command]
        return subprocess.Popen(inside, env=environment, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def signal(self, signum: signal.Signals) -> None:
        """To every process of the host at once: as if its power failed (SIGKILL), or it were paused by its hypervisor (SIGSTOP)."""
        for pid in ip("netns", "pids", self.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signum)


@contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts on one cable; gone afterwards, with all that runs on them."""
    pair = tuple(Host(f"glmconv-{os.getpid()}-{letter}", f"{NETWORK}.{number}") for number, letter in enumerate("ab", 1))
    cable = [f"gc{os.getpid() % 10**8}{letter}" for letter in "ab"]
    try:
        for host in pair:
            ip("netns", "add", host.name)
        ip("link", "add", cable[0], "type", "veth", "peer", "name", cable[1])
        for host, end in zip(pair, cable, strict=True):
            ip("link", "set", end, "netns", host.name)
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", end)
            ip("-n", host.name, "link", "set", end, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield pair[0], pair[1]
    finally:
        for host in pair:
            with contextlib.suppress(subprocess.CalledProcessError):
                host.signal(signal.SIGKILL)
                ip("netns", "delete", host.name)


@cache
def may_have_hosts() -> bool:
    """Whether this user may make network namespaces here and run something in them."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with two_hosts() as (_, second):
            return subprocess.run(["ip", "netns", "exec", second.name, "true"], timeout=30, check=False).returncode == 0
    except (subprocess.SubprocessError, OSError):
        return False
