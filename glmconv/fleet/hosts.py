"""Lists of machines, as launchers have them: one a line, the first column its name, `#` begins a comment, `slots=8` and the like are passed over."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from glmconv.errors import UsageError, printable

LARGEST = 1 << 20
NAME = re.compile(r"(?:(?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]{0,63})@)?(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]{0,252}|\[?[0-9A-Fa-f:]{2,45}\]?)")
LOCAL = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Machine:
    """A machine by the name that ssh is given; `user` may be empty."""

    host: str
    user: str = ""

    @property
    def local(self) -> bool:
        """Whether it is this one, reached without ssh."""
        return self.host in LOCAL and not self.user

    @property
    def name(self) -> str:
        return f"{self.user}@{self.host}" if self.user else self.host

    @property
    def for_rsync(self) -> str:
        """As rsync wants it before a colon: an IPv6 address in brackets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.user}@{host}" if self.user else host


def machine(text: str, place: object = None) -> Machine:
    """UsageError for what is no name of a machine: it goes into commands, so nothing that could be an option or shell syntax is one."""
    found = NAME.fullmatch(text)
    if found is None:
        raise UsageError(f"{printable(text, 100)!r} is no name of a machine.", file=place)
    return Machine(found["host"].strip("[]"), found["user"] or "")


def read_hostfile(path: Path) -> list[Machine]:
    """The machines, each once, in their order. UsageError if there is none, or a line that is none."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot be read: {error.strerror}.", file=path) from error
    except UnicodeDecodeError as error:
        raise UsageError("is not UTF-8.", file=path) from error
    if len(content) > LARGEST:
        raise UsageError(f"is larger than {LARGEST:,} bytes.", file=path)
    columns = [line.partition("#")[0].split() for line in lines]
    found = list(dict.fromkeys(machine(words[0], path) for words in columns if words))
    if not found:
        raise UsageError("names no machine.", file=path)
    return found
