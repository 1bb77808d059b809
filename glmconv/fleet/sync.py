"""Copies of an output on other machines' disks: rsync does the copying, sha256 the checking, and the manifest comes last, as in any output."""

from __future__ import annotations

import re
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from glmconv.check.verify import output_root
from glmconv.engine.commit import hash_of
from glmconv.engine.files import Disk
from glmconv.engine.journal import BESIDE, MANIFEST, STATE
from glmconv.engine.manifest import Manifest, load_manifest
from glmconv.engine.preflight import refuse_source
from glmconv.errors import DestinationError, ExitCode, GlmconvError, Interrupted, OutputError, SourceError, UsageError, VerificationError, printable
from glmconv.fleet.hosts import Machine, machine
from glmconv.fleet.programs import REMOTE_SHELL, on, rsync

CLAIM = f"{STATE}/plan.json"
DIGEST = re.compile(r"([0-9a-f]{64})  (.+)")
COPIED, THERE = "copied", "was there already"


@dataclass(frozen=True)
class Package:
    """What is copied. `base` is the folder that all names are below; the claim goes first and the manifest last, so that neither says too much.

    `digests` are the sha256 of every name; `weights` the files that hold tensors, `rest` the others: those by which loaders see a checkpoint.
    """

    base: Path
    weights: tuple[str, ...]
    rest: tuple[str, ...]
    claim: str
    manifest: str
    digests: dict[str, str]
    size: int


@dataclass(frozen=True)
class Copy:
    """What became of one machine. `state`: copied, or was there already; else empty, and `problem` says why."""

    host: str
    state: str
    bytes: int
    problem: str = ""
    code: int = 0


def package(source: str | Path, folder: str) -> tuple[Package, str]:
    """(what is to be copied, the folder on the other side that its names are below). SourceError if `source` is no finished output of glmconv."""
    disk, root = Disk(), output_root(source)
    try:
        manifest = load_manifest(disk, root)
    except OSError as error:
        raise SourceError("has no manifest: only finished outputs of glmconv are copied.", file=root, hint="Convert first.") from error
    beside = any(name.startswith(BESIDE) for name in manifest.files)
    prefix = f"{root.name}/" if beside else ""
    if beside and Path(folder).name != root.name.removesuffix(".glmconv"):
        raise UsageError(f"{folder} must end in {root.name.removesuffix('.glmconv')}: the names of a GGUF output's files belong to it.")
    base = root.parent if beside else root
    digests = {name_in(name, prefix): file.sha256 for name, file in manifest.files.items()}
    weights = {name_in(tensor.file, prefix) for tensor in manifest.tensors.values()}
    own = {prefix + name: digest(disk, root / name) for name in (CLAIM, MANIFEST)}
    size = sum(file.size for file in manifest.files.values())
    rest = tuple(name for name in digests if name not in weights)
    made = Package(base, tuple(sorted(weights)), rest, prefix + CLAIM, prefix + MANIFEST, {**digests, **own}, size)
    present(made, manifest, root)
    return made, str(Path(folder).parent) if beside else folder


def name_in(name: str, prefix: str) -> str:
    """A manifest's name, as seen from the base."""
    return name.removeprefix(BESIDE) if name.startswith(BESIDE) else prefix + name


def present(made: Package, manifest: Manifest, root: Path) -> None:
    for name, file in manifest.files.items():
        path = root.parent / name.removeprefix(BESIDE) if name.startswith(BESIDE) else root / name
        if not path.is_file() or path.is_symlink() or path.stat().st_size != file.size:
            raise SourceError("is not as the manifest says.", file=path, hint=f"Run glmconv verify {root} first.")


def digest(disk: Disk, path: Path) -> str:
    try:
        fd = disk.open(path)
    except OSError as error:
        raise SourceError(f"cannot be read: {error.strerror}.", file=path, hint="Convert again, or copy it whole.") from error
    try:
        return hash_of(disk, fd, memoryview(bytearray(1 << 20)))
    finally:
        disk.close(fd)


def checked_folder(folder: str) -> str:
    """The folder on the other side. UsageError if it is relative, or could be anything but a path."""
    if not folder.startswith("/") or not folder.isprintable() or ".." in Path(folder).parts or Path(folder) == Path("/"):
        raise UsageError(f"{printable(folder)!r} is no absolute path of a folder.", hint="Write it as /local/models/GLM-4.5-FP8.")
    return folder.rstrip("/")


@dataclass(frozen=True)
class Courier:
    """Copies one package to one machine."""

    package: Package
    machine: Machine
    folder: str
    remote_shell: str
    stop: threading.Event | None = None

    def deliver(self) -> Copy:
        """Claim, weights, their check, the rest, its check, the manifest, its check. Raises what `sync` says."""
        if self.machine.local and self.package.manifest == MANIFEST:  # a file may lie beside its source
            refuse_source(Path(self.folder).resolve(), self.package.base, Disk())
        there = self.look()
        state = THERE if there.get(self.package.manifest) == self.package.digests[self.package.manifest] else COPIED
        if state == COPIED:
            self.send([self.package.claim])
        for names in (self.package.weights, self.package.rest, (self.package.manifest,)):
            if not names:
                continue
            if state == COPIED:
                self.send(names)
            self.hold(names)
            self.settle(names)
        return Copy(self.machine.name, state, self.package.size if state == COPIED else 0)

    def look(self) -> dict[str, str]:
        """Make the folder if need be; the digests of claim and manifest there. DestinationError if it holds anything that is not this output."""
        ours, state = self.package, STATE
        names = " ".join(map(shlex.quote, (ours.claim, ours.manifest)))
        within = ours.manifest.rpartition("/")[0] or "."
        beside = " ".join(shlex.quote(name) for name in (*ours.weights, *ours.rest)) if within != "." else ""
        files = f"; ls -d -- {beside}" if beside else ""
        inside = f"{{ ls -A -- {shlex.quote(within)} | grep -vxF {state}{files}; }} | head -n 1"
        enter = f"mkdir -p -- {shlex.quote(self.folder)} && cd -- {shlex.quote(self.folder)} || exit 1"
        script = f"{enter}; {{ {inside}; echo; sha256sum -- {names}; }} 2>&-; exit 0"
        ended = self.on(script)
        found = {match[2]: match[1] for match in map(DIGEST.fullmatch, ended.splitlines()) if match}
        anything = ended.splitlines()[0].strip() if ended.strip() else ""
        wanted = self.package.digests
        other = [name for name, digest in found.items() if wanted.get(name) != digest]
        if other or (anything and self.package.claim not in found):
            raise DestinationError(
                f"{self.folder} holds something else ({printable(other[0] if other else anything, 80)}).", file=self.machine.name,
                hint="Remove it or choose another folder.",
            )  # fmt: skip
        return found

    def send(self, names: Sequence[str], *, again: bool = False) -> None:
        ended = rsync(
            str(self.package.base), names, self.machine, self.folder, remote_shell=self.remote_shell, again=again, stop=self.stop,
        )  # fmt: skip
        if ended.code:
            raise OutputError(f"rsync failed: {printable(ended.reason)}.", file=self.machine.name, hint="Mend it and run the same command again.")

    def hold(self, names: Sequence[str]) -> None:
        """Hold files on the other side against their digests; what is wrong is copied once more. VerificationError if it is still wrong then."""
        wrong = self.wrong(names)
        if wrong:
            self.send(wrong, again=True)
            wrong = self.wrong(wrong)
        if wrong:
            raise VerificationError(f"{wrong[0]} differs after it was copied twice.", file=self.machine.name, hint="Is its disk or memory faulty?")

    def settle(self, names: Sequence[str]) -> None:
        """Make files durable over there, before the manifest vouches for them, and it itself."""
        self.on(f"cd -- {shlex.quote(self.folder)} && xargs -0 sync --", "\0".join(names) + "\0")

    def wrong(self, names: Sequence[str]) -> list[str]:
        """The names whose bytes over there are not these, read back from the disk as the machine sees it."""
        script = f"cd -- {shlex.quote(self.folder)} && xargs -0 sha256sum --"
        ended = self.on(script, "\0".join(names) + "\0", may_fail=True)
        found = {match[2]: match[1] for match in map(DIGEST.fullmatch, ended.splitlines()) if match}
        return [name for name in names if found.get(name) != self.package.digests[name]]

    def on(self, script: str, text: str = "", *, may_fail: bool = False) -> str:
        ended = on(self.machine, script, remote_shell=self.remote_shell, text=text, stop=self.stop)
        if ended.code == 255 or (ended.code and not may_fail):  # 255 is ssh's own
            raise OutputError(f"cannot be reached: {printable(ended.reason)}.", file=self.machine.name, hint="Try `ssh` to it by hand.")
        return ended.out


def sync(
    source: str | Path, folder: str, machines: Sequence[Machine | str], *, remote_shell: str = REMOTE_SHELL, at_once: int = 4,
    stop: threading.Event | None = None, log: Callable[[str], None] | None = None,
) -> list[Copy]:  # fmt: skip
    """Copy a finished output into `folder` of each machine, checked there by sha256; its manifest is there last, and only if all is right.

    A machine that fails does not keep the others from theirs: its `Copy` has the problem and its exit code. The same call again goes on.
    Raises SourceError, UsageError, CapacityError (no rsync) and Interrupted.
    """
    named = list(dict.fromkeys(machine(name) if isinstance(name, str) else name for name in machines))
    made, base = package(source, checked_folder(folder))

    def one(there: Machine) -> Copy:
        try:
            copy = Courier(made, there, base, remote_shell, stop).deliver()
        except (Interrupted, UsageError):
            raise
        except GlmconvError as problem:
            if stop is not None and stop.is_set():  # a Ctrl-C of the terminal's ends rsync too
                raise Interrupted(int(getattr(stop, "signum", 2))) from problem
            copy = Copy(there.name, "", 0, problem.line, int(problem.code))
        if log:
            log(f"{copy.host}: {copy.state or copy.problem}")
        return copy

    with ThreadPoolExecutor(max(1, min(at_once, len(named)))) as pool:
        return list(pool.map(one, named))


def failure(copies: Sequence[Copy]) -> Iterator[tuple[ExitCode, str]]:
    """The machines that have no copy: (exit code, what went wrong)."""
    yield from ((ExitCode(copy.code), copy.problem) for copy in copies if copy.problem)
