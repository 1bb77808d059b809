"""Run plans: refuse or claim, let workers and ranks write the jobs, then marks and manifest. `reliability.md` says why in this order."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.engine.commit import FULL, Destination
from glmconv.engine.files import Disk
from glmconv.engine.jobs import Buffer, Job
from glmconv.engine.journal import load_record
from glmconv.engine.manifest import Manifest, load_manifest, manifest_of
from glmconv.engine.plan import OutputFile, RowSource, by_source
from glmconv.engine.preflight import State, Target, gigabytes, is_finished, missing_bytes, preflight, state_of
from glmconv.engine.queue import JobQueue, LocalQueue, StoreQueue, open_queue
from glmconv.errors import DestinationError, GlmconvError, Interrupted, OutputError, SourceError

__all__ = ["Manifest", "Outcome", "Target", "load_manifest", "load_record", "preflight", "run"]

CHUNK = 4 << 20
SAMPLE = 16  # with resume_check "sampled", one finished file in so many is hashed


@dataclass(frozen=True)
class Outcome:
    """What became of a target: `files_written` and `bytes_written` by this process, `files_kept` found complete by it."""

    target: Target
    files_written: int
    files_kept: int
    bytes_written: int
    already_done: bool
    manifest: Path
    moved_aside: Path | None


class Stopped(Exception):
    """A worker stops because the run was interrupted or another worker failed."""


class Tally:
    """What one target's workers did, and which of the jobs are known to be complete."""

    def __init__(self) -> None:
        self.files_written = self.files_kept = self.bytes_written = 0


class Crew:
    """The workers of one process and what they share. `settled` holds the jobs that this process wrote or found complete."""

    def __init__(
        self,
        jobs: Sequence[Job],
        source: RowSource,
        queue: JobQueue,
        stop: threading.Event,
        *,
        chunk_size: int,
        resume_check: str,
        progress: Callable[[int], None] | None,
    ) -> None:
        self.jobs, self.source, self.queue, self.stop = jobs, source, queue, stop
        self.chunk_size, self.resume_check, self._progress = chunk_size, resume_check, progress
        self.shared = queue if isinstance(queue, StoreQueue) else None
        self.settled: set[int] = set()
        self.tallies = {id(job.destination): Tally() for job in jobs}
        self.failure: tuple[Job | None, BaseException] | None = None
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._failed = threading.Event()

    def check(self) -> None:
        """Called for every chunk."""
        if self.stop.is_set() or self._failed.is_set():
            raise Stopped
        if self.shared:
            self.shared.beat()

    def work(self, workers: int, queue: JobQueue) -> None:
        """Let threads do the queue's jobs; returns when all have ended, whatever they ended by."""
        threads = [threading.Thread(target=self._work, args=(queue,), name=f"glmconv-{n}") for n in range(max(1, workers))]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:
            self._failed.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise

    def _work(self, queue: JobQueue) -> None:
        job: Job | None = None
        try:
            buffer = Buffer(self.chunk_size)
            while (number := queue.next()) is not None:
                self.check()
                with self._lock:
                    if number in self._taken:
                        continue
                    self._taken.add(number)
                job = self.jobs[number]
                self._do(job, buffer)
        except Stopped:
            return
        except BaseException as error:  # kept and raised by the main thread: no error of a worker is lost
            with self._lock:
                if self.failure is None:
                    self.failure = (job, error)
            self._failed.set()

    def _do(self, job: Job, buffer: Buffer) -> None:
        hashed = self.resume_check != "sampled" or job.number % SAMPLE == 0
        tally = self.tallies[id(job.destination)]
        if job.is_done(buffer, self.check, hashed=hashed):
            self._count(job.file.size)
            with self._lock:
                tally.files_kept += 1
        else:
            job.write(self.source, buffer, self._count, self.check)
            with self._lock:
                tally.files_written += 1
                tally.bytes_written += job.file.size
        self.settle(job)
        if self.shared:
            self.shared.report(job.number)

    def settle(self, job: Job) -> None:
        """Need not be looked at any more."""
        with self._lock:
            self._taken.add(job.number)
            self.settled.add(job.number)

    def _count(self, size: int) -> None:
        if self._progress:
            with self._lock:
                self._progress(size)

    def unsettled(self) -> list[int]:
        """Jobs that neither this process nor, as far as it can tell, another one of this run has made complete."""
        others = self.shared.reported if self.shared else lambda number: False
        open_jobs = [job for job in self.jobs if job.number not in self.settled]
        return [job.number for job in open_jobs if not (others(job.number) and job.destination.has_record(job.file.name))]

    def pulse(self) -> int:
        return self.shared.pulse() if self.shared else 0

    def retake(self, numbers: Sequence[int]) -> LocalQueue:
        """A queue of these jobs, this rank's share of them first, so that ranks that take over do not do the same."""
        first = self.shared.rank * len(numbers) // self.shared.ranks if self.shared else 0
        with self._lock:
            self._taken.difference_update(numbers)
        return Listed([*numbers[first:], *numbers[:first]])


class Listed(LocalQueue):
    """A queue of certain jobs."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__(len(numbers))
        self._listed = numbers

    def next(self) -> int | None:
        place = super().next()
        return None if place is None else self._listed[place]


def run(
    targets: Sequence[Target],
    source: RowSource,
    *,
    workers: int = 2,
    chunk_size: int = CHUNK,
    disk: Disk | None = None,
    queue: JobQueue | None = None,
    resume: bool = True,
    resume_check: str = "full",
    overwrite: bool = False,
    stop: threading.Event | None = None,
    interrupted_by: Callable[[], int] | None = None,
    progress: Callable[[int], None] | None = None,
    source_root: Path | None = None,
    log: Callable[[str], None] | None = None,
    stall: float = 60.0,
    poll: float = 0.2,
) -> list[Outcome]:
    """Write the targets' plans from `source`. When it returns, every manifest is on the disk; whatever it raises, the same call goes on later.

    queue:     shares the jobs with other processes; None: torchrun's or SLURM's store if there is one, else this process alone
    resume_check: "full" hashes finished files before trusting them, "sampled" every 16th
    stop:      when set, the run ends within one chunk with Interrupted(interrupted_by())
    progress:  told of bytes written or found written; negative if a file must be written again; called by one thread at a time
    stall:     seconds without a sign of life after which another rank's jobs are taken over
    """
    disk, stop, log = disk or Disk(), stop or threading.Event(), log or (lambda text: None)
    targets = [Target(target.plan, Path(os.path.realpath(target.root))) for target in targets]
    destinations = [Destination(disk, target.root, target.plan, secrets.token_hex(8), log) for target in targets]
    jobs = merged(destinations, source)
    if queue is None:
        name = ",".join(str(target.root) for target in targets)
        queue = open_queue([target.plan.id for target in targets], len(jobs), name=name)
    crew = Crew(jobs, source, queue, stop, chunk_size=chunk_size, resume_check=resume_check, progress=progress)
    moved: list[Path | None] = []
    done: list[bool] = []
    try:
        with contextlib.suppress(Stopped):
            if crew.shared and crew.shared.rank:
                await_claims(targets, crew, stall, poll, disk)
            preflight_as(crew, targets, source_root, disk, resume=resume, overwrite=overwrite)
            for target, destination in zip(targets, destinations, strict=True):
                aside, finished = take(target, destination, resume=resume, overwrite=overwrite)
                moved.append(aside)
                done.append(finished)
            settle_finished(crew, destinations, done)
            crew.work(workers, queue)
            take_over(crew, workers, stall, poll)
            if crew.failure is None and not stop.is_set():
                for target, destination in zip(targets, destinations, strict=True):
                    finish(target, destination, crew, stall, poll)
    except OSError as error:
        crew.failure = crew.failure or (None, error)
    finally:
        for destination in destinations:
            destination.sweep()
        if crew.shared:
            with contextlib.suppress(OutputError):
                crew.shared.leave(stall if crew.failure is None else 0.0, poll, stop)
    if crew.failure is not None:
        raise explained(*crew.failure, targets, destinations) from crew.failure[1]
    if stop.is_set() and not all(is_finished(target, disk) for target in targets):
        raise Interrupted(interrupted_by() if interrupted_by else signal.SIGINT)
    return [outcome(*each, crew) for each in zip(targets, destinations, done, moved, strict=True)]


def merged(destinations: Sequence[Destination], source: RowSource) -> list[Job]:
    """The jobs of all targets in the order in which their input lies, so that what one reads is still cached for the next. The same on every rank."""
    files: list[tuple[Destination, OutputFile]] = [(to, file) for to in destinations for file in to.plan.files]
    order = by_source([file for _, file in files], source)
    return [Job(number, *files[place]) for number, place in enumerate(order)]


def preflight_as(crew: Crew, targets: Sequence[Target], source_root: Path | None, disk: Disk, *, resume: bool, overwrite: bool) -> None:
    """`preflight`; a rank that is not the first leaves the disk's space out, for the files that others are writing take some of it already."""
    if crew.shared and crew.shared.rank:
        for target in targets:
            state_of(target, disk, resume=True, overwrite=overwrite)
    else:
        preflight(targets, source_root=source_root, disk=disk, resume=resume, overwrite=overwrite)


def take(target: Target, destination: Destination, *, resume: bool, overwrite: bool) -> tuple[Path | None, bool]:
    """Make the destination ours: (where what was there has gone, whether it is finished already)."""
    disk, root = destination.disk, target.root
    state = state_of(target, disk, resume=resume, overwrite=overwrite)
    if state is State.DONE:
        disk.sync_folder(root)  # the manifest may have been linked by a run that did not live to sync it
        return None, True
    aside = move_aside(destination) if state is State.FOREIGN else None
    try:
        destination.claim()
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR):
            raise DestinationError(f"cannot be written: {error.strerror}.", file=root, hint="Choose another destination.") from error
        raise
    return aside, False


def move_aside(destination: Destination) -> Path:
    """Rename OUT to the first free OUT.bak-<n>; nothing is deleted."""
    root, disk = destination.layout.root, destination.disk
    for n in range(1, 10_000):
        aside = root.with_name(f"{root.name}.bak-{n}")
        if destination.exists(aside):
            continue
        try:
            disk.rename_noreplace(root, aside)
        except FileExistsError:
            continue
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                raise DestinationError(f"cannot be moved to {aside.name}: {error.strerror}.", file=root, hint="Choose another destination.") from error
            disk.rename(root, aside)
        disk.sync_folder(root.parent)
        return aside
    raise DestinationError("has too many .bak-<n> beside it.", file=root, hint="Remove some of them.")


def await_claims(targets: Sequence[Target], crew: Crew, stall: float, poll: float, disk: Disk) -> None:
    """Leave preflight, moving aside and claiming to the first rank; after `stall` seconds do them without it."""
    since = time.monotonic()
    while time.monotonic() - since < stall:
        with contextlib.suppress(DestinationError):
            if all(state_of(target, disk) in (State.BEGUN, State.DONE) for target in targets):
                return
        crew.check()
        crew.stop.wait(poll)


def settle_finished(crew: Crew, destinations: Sequence[Destination], done: Sequence[bool]) -> None:
    """Jobs of targets whose manifest is there need not be looked at. Their numbers stay, so that all ranks count alike."""
    finished = {id(to) for to, is_done in zip(destinations, done, strict=True) if is_done}
    for job in crew.jobs:
        if id(job.destination) in finished:
            crew.settle(job)


def take_over(crew: Crew, workers: int, stall: float, poll: float) -> None:
    """Wait for the jobs that others have taken, as long as something moves; then do them here."""
    last, since = (-1, -1), time.monotonic()
    while crew.failure is None and not crew.stop.is_set() and (missing := crew.unsettled()):
        if (len(missing), crew.pulse()) != last:
            last, since = (len(missing), crew.pulse()), time.monotonic()
        if crew.shared is None or time.monotonic() - since >= stall:
            crew.work(workers, crew.retake(missing))
            since = time.monotonic()
        else:
            crew.stop.wait(poll)


def finish(target: Target, destination: Destination, crew: Crew, stall: float, poll: float) -> None:
    """Marks in the plan's order, then the manifest, each durable before the next. The first rank does it, others if it does not."""
    if crew.shared and crew.shared.rank:
        since = time.monotonic()
        while time.monotonic() - since < stall and not is_finished(target, destination.disk):
            crew.check()
            crew.stop.wait(poll)
    if is_finished(target, destination.disk):
        destination.disk.sync_folder(target.root)
        return
    records = []
    for file in target.plan.files:
        record = load_record(destination.disk, destination.layout, file)
        if record is None:
            raise OutputError("has no journal record any more.", file=destination.layout.final(file.name), hint="Run the same command again.")
        records.append(record)
    vouched = vouched_for(destination)
    for mark in target.plan.marks:
        destination.put(mark.name, mark.content, ours=lambda name=mark.name: name in vouched)  # type: ignore[misc]
    destination.put(destination.layout.manifest.name, manifest_of(target.plan, records), ours=lambda: True)  # the fence has looked whose it is


def vouched_for(destination: Destination) -> set[str]:
    """Names that an earlier manifest of this plan says are ours."""
    with contextlib.suppress(FileNotFoundError, SourceError):
        manifest = load_manifest(destination.disk, destination.layout.root)
        return set(manifest.files) if manifest.plan_id == destination.plan.id else set()
    return set()


def explained(job: Job | None, error: BaseException, targets: Sequence[Target], destinations: Sequence[Destination]) -> BaseException:
    """The error as the user should read it; what is not the disk's is left as it is."""
    if not isinstance(error, OSError):
        return error
    number = destinations.index(job.destination) if job else 0
    target, destination = targets[number], destinations[number]
    place = destination.layout.final(job.file.name) if job else target.root
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
        try:
            destination.fence()
        except (GlmconvError, OSError) as lost:
            return lost if isinstance(lost, DestinationError) else OutputError("has vanished while it was written.", file=target.root)
    files = len(target.plan.files)
    done, missing, free = files, 0, 0
    with contextlib.suppress(OSError, GlmconvError):
        done = sum(destination.has_record(file.name) for file in target.plan.files)
        missing, free = missing_bytes(target, destination.disk), destination.disk.free(target.root)
    state = f"{done} of {files} files are done;"
    if error.errno in FULL:
        more = gigabytes(max(1, missing - free))
        return OutputError(f"is full: {more} more are needed. {state}", file=target.root, hint="free the space and run the same command again.")
    return OutputError(f"cannot be written: {error.strerror or error}. {state}", file=place, hint="run the same command again.")


def outcome(target: Target, destination: Destination, done: bool, aside: Path | None, crew: Crew) -> Outcome:
    tally = crew.tallies.get(id(destination), Tally())
    kept = len(target.plan.files) if done else tally.files_kept
    return Outcome(target, tally.files_written, kept, tally.bytes_written, done, destination.layout.manifest, aside)
