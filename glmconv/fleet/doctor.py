"""What an installation, its machines and its shared folders are like, and what of it stands in the way."""

from __future__ import annotations

import os
import platform
import resource
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

from glmconv.engine.manifest import tool_version
from glmconv.engine.ranks import meeting
from glmconv.fleet.gathering import Gathering
from glmconv.fleet.probe import LATE_SECONDS, NEEDED, ProbeDisk, Seen, probe

PACKAGES = ("torch", "numpy", "numba", "safetensors", "huggingface_hub", "click", "pyyaml", "tqdm")
LIMITS = {"open_files": resource.RLIMIT_NOFILE, "file_size": resource.RLIMIT_FSIZE, "memory": resource.RLIMIT_AS, "processes": resource.RLIMIT_NPROC}
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
MOST_SKEW = 2.0  # seconds
LATE = 1.0  # seconds
FEW_FILES = 1024


@dataclass(frozen=True)
class Folder:
    """One probed folder: what each rank saw there."""

    path: str
    filesystem: str
    ranks: list[Seen]


@dataclass(frozen=True)
class Diagnosis:
    """What was found. `problems` keep glmconv from what it promises; `warnings` are worth a look."""

    environment: Mapping[str, object]
    ranks: list[dict[str, object]]
    folders: list[Folder]
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def doctor(folders: Sequence[str | Path] = (), *, patience: float = LATE_SECONDS, timeout: float = 120) -> Diagnosis:
    """Look at the environment, the machines' clocks and each folder, from every rank of the job; only rank 0's answer has all of it.

    In each folder one small folder is made, and removed again. `patience` is for how long, in seconds, to wait for what another rank has made.
    """
    ranks = Gathering.of_job(f"doctor/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", timeout + patience)
    token = ranks.shared("token", secrets.token_hex(8))
    clock = ranks.clock()
    own: dict[str, object] = {"rank": ranks.rank, "host": platform.node(), "clock_ahead_ms": round(clock * 1000), **machine()}
    heard = ranks.heard("machine", own)
    disk = ProbeDisk()
    seen = [
        Folder(str(folder), filesystem(Path(folder)), probe(Path(folder).absolute(), ranks, number, token, disk, patience))
        for number, folder in enumerate(folders)
    ]
    ranks.leave()
    found = environment()
    problems = [line for folder in seen for line in troubles(folder)]
    return Diagnosis(found, heard, seen, problems, [*worries(found, heard), *(line for folder in seen for line in lateness(folder))])


def environment() -> dict[str, object]:
    """What this process runs in. Values of tokens and proxies are never in it, only whether there are any."""
    there = {name: value for name in PACKAGES if (value := version(name))}
    limits = {name: limit if (limit := resource.getrlimit(number)[0]) != resource.RLIM_INFINITY else None for name, number in LIMITS.items()}
    return {
        "glmconv": tool_version(), "python": platform.python_version(), "system": f"{platform.system()} {platform.release()}", "packages": there,
        "limits": limits, "hub_token": hub_token(), "hub_offline": os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"),
        "proxies": [name for name in PROXIES if os.environ.get(name)], "launched_by": launcher(),
    }  # fmt: skip


def machine() -> dict[str, object]:
    """Cores and memory that this process may use, in bytes; None where the system does not say."""
    return {"cores": len(os.sched_getaffinity(0)), "memory": memory("MemTotal"), "memory_available": memory("MemAvailable"), "memory_limit": cgroup()}


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def memory(name: str) -> int | None:
    for line in small_file("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def cgroup() -> int | None:
    text = small_file("/sys/fs/cgroup/memory.max").strip()
    return int(text) if text.isdigit() else None


def small_file(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 20)
    except OSError:
        return ""


def hub_token() -> str | None:
    """Where a Hub token is, if there is one: in the environment or in a file. Not the token."""
    if any(os.environ.get(name) for name in TOKENS):
        return "environment"
    home = Path(os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface")
    place = Path(os.environ.get("HF_TOKEN_PATH") or home / "token")
    try:
        return "file" if place.stat().st_size else None
    except OSError:
        return None


def launcher() -> str:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "srun" if meeting() is not None and "RANK" not in os.environ else "ranks" if meeting() is not None else "alone"


def filesystem(folder: Path) -> str:
    """The type of the filesystem that the folder lies on, as /proc says; empty if it does not."""
    best, found = -1, ""
    place = os.path.realpath(folder)
    for line in small_file("/proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        mount = before.split()[4].encode().decode("unicode_escape", "replace") if len(before.split()) > 4 else ""
        inside = mount == "/" or place == mount or place.startswith(mount + "/")
        if inside and len(mount) >= best:
            best, found = len(mount), after.split(" ")[0]
    return found


def troubles(folder: Folder) -> Iterator[str]:
    """What keeps outputs in this folder from being safe."""
    for seen in folder.ranks:
        where = f"{folder.path}: rank {seen.rank} on {seen.host}"
        for name in ("mkdir", *NEEDED):
            if seen.works.get(name, "" if "create" not in seen.works or seen.works["create"] else "was not tried"):
                yield f"{where}: {name.replace('_', ' of the ')} failed: {seen.works[name]}"
        if seen.late is None:
            yield f"{where} does not see what other ranks have made: is it the same folder on every machine?"
    for name, call in (("create", "O_EXCL"), ("link", "link")):
        makers = [seen for seen in folder.ranks if name in seen.won]
        works = all(not seen.works.get(name, "was not tried") for seen in folder.ranks)
        if len(folder.ranks) > 1 and works and len(makers) != 1:
            yield f"{folder.path}: {len(makers)} ranks made one name by {call}, it must be one: is it the same folder on every machine?"


def lateness(folder: Folder) -> Iterator[str]:
    late = max((seen.late for seen in folder.ranks if seen.late is not None), default=0.0)
    if late >= LATE:
        yield f"{folder.path}: what one machine makes is seen {late:.1f} s later by another; ranks wait for that"
    without = [name for name in ("link", "rename_noreplace") if any(seen.works.get(name) for seen in folder.ranks)]
    if "link" in without:
        guard = "renames that overwrite nothing are used" if "rename_noreplace" not in without else "two jobs at once are not guarded there"
        yield f"{folder.path}: has no hard links: {guard}"


def worries(found: Mapping[str, object], ranks: Sequence[Mapping[str, object]]) -> Iterator[str]:
    skews = [int(str(rank.get("clock_ahead_ms", 0))) / 1000 for rank in ranks]
    if skews and max(skews) - min(skews) > MOST_SKEW:
        yield f"the machines' clocks differ by {max(skews) - min(skews):.1f} s: nothing here rests on them, but logs will confuse"
    proxies = found["proxies"]
    if isinstance(proxies, list) and proxies and len(ranks) > 1:
        yield f"{', '.join(map(str, proxies))} set: unset them for torchrun's rendezvous; downloads may need them"
    limits = found["limits"]
    files = limits.get("open_files") if isinstance(limits, Mapping) else None
    if isinstance(files, int) and files < FEW_FILES:
        yield f"only {files} files may be open: `ulimit -n 4096` is safer"
    if isinstance(limits, Mapping) and limits.get("file_size") is not None:
        yield "files may not grow beyond a limit (`ulimit -f`)"


def as_plain(found: Diagnosis) -> dict[str, object]:
    """For JSON."""
    return {"ok": not found.problems, **asdict(found)}
