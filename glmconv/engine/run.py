"""Carries plans out: claims each destination, shares the jobs out, finishes when every file is durable. Any rank may die at any moment."""

from __future__ import annotations

import contextlib
import errno
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glmconv.engine.commit import FULL, Destination
from glmconv.engine.files import Disk
from glmconv.engine.jobs import Job, Work
from glmconv.engine.journal import MANIFEST, Record, claimed_by, load_record
from glmconv.engine.manifest import manifest_of
from glmconv.engine.plan import RowSource, Stretch, by_source, sha256
from glmconv.engine.preflight import State, Target, is_finished, preflight, present, resolved, state_of
from glmconv.engine.queue import JobQueue, StoreQueue, open_queue
from glmconv.engine.sections import SectionJob, SharedFile
from glmconv.engine.stream import Buffer
from glmconv.errors import DestinationError, Interrupted, OutputError, SourceError

STALL_SECONDS = 60.0
POLL_SECONDS = 0.2
SAMPLED = 16  # with a sampled resume check one file in so many is read again; of the others the size is compared
REFUSED = {errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}


@dataclass(frozen=True)
class Outcome:
    """What this process did for one target; other ranks may have written the rest.

    `nonfinite` are the canonical tensors in which it passed NaN or Inf on, with the first row of each.
    """

    target: Target
    files_written: int
    files_kept: int
    bytes_written: int
    already_done: bool
    manifest: Path
    moved_aside: Path | None = None
    nonfinite: Mapping[str, int] = field(default_factory=dict)


@dataclass
class Place:
    """A target while it is worked on."""

    target: Target
    to: Destination
    done: bool
    moved_aside: Path | None = None
    shared: list[SharedFile] = field(default_factory=list)
    written: dict[str, int] = field(default_factory=dict)  # bytes of each file
    kept: set[str] = field(default_factory=set)  # files that were there, or parts of them
    nonfinite: dict[str, int] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome:
        size, root, kept = sum(self.written.values()), self.target.root, len(self.kept - self.written.keys())
        return Outcome(self.target, len(self.written), kept, size, self.done, root / MANIFEST, self.moved_aside, self.nonfinite)

    def works(self) -> Iterator[Work]:
        """A job for each file, or for each section of one."""
        for file in self.target.plan.files:
            if not file.sections:
                yield Job(self.to, file)
                continue
            shared = SharedFile(self.to, file)
            self.shared.append(shared)
            yield from (SectionJob(shared, section, number) for number, section in enumerate(file.sections))


def run(
    targets: Sequence[Target],
    source: RowSource,
    *,
    workers: int = 2,
    chunk_size: int = 4 << 20,
    disk: Disk | None = None,
    queue: JobQueue | None = None,
    resume: bool = True,
    resume_check: str = "full",
    overwrite: bool = False,
    stop: threading.Event | None = None,
    progress: Callable[[int], None] | None = None,
    source_root: Path | None = None,
    log: Callable[[str], None] | None = None,
    stall: float = STALL_SECONDS,
) -> list[Outcome]:
    """Write every target, or what is still missing of it. Returns only when each manifest is durable.

    Under torchrun or SLURM the ranks share one queue. `stop`, once set, ends the run within one chunk (Interrupted); what is finished is kept.
    Raises DestinationError, CapacityError (before anything is written), SourceError, OutputError.
    """
    disk = disk or Disk()
    run_id = secrets.token_hex(8)
    targets = [resolved(target) for target in targets]
    try:
        preflight(targets, source_root=source_root, disk=disk, resume=resume, overwrite=overwrite)
        places = [Place(t, Destination(disk, t.root, t.plan, run_id, log or _silent), is_finished(t, disk)) for t in targets]
    except OSError as error:
        raise unlooked(error, targets) from error
    for place in places:
        if place.done:
            make_durable(disk, place.target.root)
    if all(place.done for place in places):
        return [place.outcome for place in places]
    ids = [target.plan.id for target in targets]
    jobs, owners = ordered_jobs(places, source)
    if queue is None:
        queue = open_queue(ids, len(jobs), name="\n".join(str(target.root) for target in targets))
    crew = Crew(places, jobs, owners, source, queue, workers, chunk_size, resume_check == "full", stop, progress or _silent_count, stall)
    try:
        with crew.explained():
            crew.claim(resume=resume, overwrite=overwrite)
            crew.claimed = True
            crew.work()
            crew.settle()
            crew.finish()
    finally:
        crew.sweep()
    return [place.outcome for place in places]


def _silent(line: str) -> None:
    pass


def _silent_count(count: int) -> None:
    pass


def ordered_jobs(places: Sequence[Place], source: RowSource) -> tuple[list[Work], list[Place]]:
    """The jobs of all targets in the order in which their input lies, so that targets share what the page cache holds; and whose each is."""
    found = [(work, place) for place in places for work in place.works()]
    parts: list[Stretch] = [work.part for work, _ in found]
    order = by_source(parts, source)
    return [found[number][0] for number in order], [found[number][1] for number in order]


@dataclass
class Crew:
    """The workers of one process and what they share."""

    places: Sequence[Place]
    jobs: Sequence[Work]
    owners: Sequence[Place]
    source: RowSource
    queue: JobQueue
    workers: int
    chunk_size: int
    full_check: bool
    stop: threading.Event | None
    progress: Callable[[int], None]
    stall: float
    claimed: bool = False
    failed: list[BaseException] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def store(self) -> StoreQueue | None:
        return self.queue if isinstance(self.queue, StoreQueue) else None

    @property
    def leads(self) -> bool:
        """Whether this rank is the first to finish; alone, it always is."""
        return self.store is None or self.store.rank == 0

    def check(self) -> None:
        """Raise if the run is to end: by a signal, or because another worker failed."""
        if self.stop is not None and self.stop.is_set():
            raise Interrupted(int(getattr(self.stop, "signum", 2)))
        if self.failed:
            raise Interrupted(2)

    def claim(self, *, resume: bool, overwrite: bool) -> None:
        """Move aside what `overwrite` allows, then claim each destination."""
        for place in self.places:
            if place.done:
                continue
            disk, target = place.to.disk, place.target
            if overwrite and state_of(target, disk, resume=resume, overwrite=True) is State.FOREIGN:
                if self.leads:
                    place.moved_aside = aside(disk, target)
                else:
                    self.wait(lambda disk=disk, target=target: _claimed(disk, target))  # type: ignore[misc]
            place.to.claim()

    def wait(self, ready: Callable[[], bool]) -> bool:
        """Wait for what another rank is to do, as long as some rank shows signs of life; False when none does any more."""
        pulse, since = -1, time.monotonic()
        while not ready():
            self.check()
            now = self.store.pulse() if self.store else 0
            if now != pulse:
                pulse, since = now, time.monotonic()
            elif time.monotonic() - since > self.stall:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def work(self) -> None:
        """Take jobs until the queue is empty. The first error of any worker ends all, and is the one raised."""
        count = min(self.workers, len(self.jobs))
        if count <= 1:
            self.serve()
            return
        threads = [threading.Thread(target=self.guarded, name=f"worker-{n}") for n in range(count)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as problem:  # a Ctrl-C that nobody made a `stop`, or no thread to be had: the others must not go on
            with self.lock:
                self.failed.append(problem)
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self.failed:
            raise self.failed[0]

    def guarded(self) -> None:
        try:
            self.serve()
        except BaseException as problem:  # noqa: BLE001 - raised again by the thread that waits for this one
            with self.lock:
                self.failed.append(problem)

    def serve(self) -> None:
        """One worker: one buffer, job after job."""
        buffer = Buffer(self.chunk_size)
        while (number := self.queue.next()) is not None:
            self.do(number, buffer)

    def do(self, number: int, buffer: Buffer) -> None:
        """One job: kept if it is done, else written."""
        self.check()
        job, place = self.jobs[number], self.owners[number]
        hashed = self.full_check or number % SAMPLED == 0
        if place.done or job.is_done(buffer, self.beat, hashed=hashed):
            self.progress(job.part.size)
            with self.lock:
                place.kept.add(job.file.name)
        else:
            job.write(self.source, buffer, self.progress, self.beat, place.nonfinite)
            with self.lock:
                place.written[job.file.name] = place.written.get(job.file.name, 0) + job.part.size
        if self.store:
            self.store.report(number)

    def beat(self) -> None:
        self.check()
        if self.store:
            self.store.beat()

    def settle(self) -> None:
        """Make sure that every job is done, by whichever rank: wait for those at work, take over from those that are gone.

        A record is not enough: it may be an earlier run's, of a file that was damaged since and that another rank is about to mend.
        """
        store = self.store
        if store is None:
            return
        buffer = Buffer(self.chunk_size)
        while missing := [n for n in range(len(self.jobs)) if not store.reported(n)]:
            if not self.wait(lambda missing=missing: store.reported(*missing)):  # type: ignore[misc]
                for number in missing:
                    self.do(number, buffer)

    def recorded(self, number: int) -> bool:
        job = self.jobs[number]
        try:
            return self.owners[number].done or load_record(job.destination.disk, job.destination.layout, job.part) is not None
        except (SourceError, OSError):
            return False

    def finish(self) -> None:
        """Marks, then the manifest. Rank 0 does it; another does if rank 0 does not."""
        for place in self.places:
            if place.done:
                continue
            if not self.leads and self.wait(lambda place=place: is_finished(place.target, place.to.disk)):  # type: ignore[misc]
                make_durable(place.to.disk, place.target.root)
                continue
            self.check()
            for shared in sorted(place.shared, key=lambda shared: shared.file.last):
                if not shared.is_named:
                    self.see(place.to, shared.file.sections)
                shared.finish(Buffer(self.chunk_size), self.beat)
            self.see(place.to, place.to.plan.files)
            finish_place(place.to)
        if self.store:
            self.store.leave(self.stall, POLL_SECONDS, self.stop or threading.Event())

    def see(self, to: Destination, parts: Sequence[Stretch]) -> None:
        """Wait until each part's record can be seen here: what another node has made may be seen late."""
        if self.store:
            self.wait(lambda: all_recorded(to, parts))

    def sweep(self) -> None:
        for place in self.places:
            place.to.sweep()

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """The disk's errors in the words of the user."""
        try:
            yield
        except OSError as error:
            raise self.explanation(error) from error

    def explanation(self, error: OSError) -> Exception:
        roots = ", ".join(str(place.target.root) for place in self.places if not place.done)
        done = sum(self.recorded(n) for n in range(len(self.jobs)))
        noun = "parts" if any(place.shared for place in self.places) else "files"
        state = f"{done} of {len(self.jobs)} {noun} are done"
        if error.errno in FULL:
            left = sum(job.part.size for n, job in enumerate(self.jobs) if not self.recorded(n))
            needed = f"{left:,} bytes more are needed; {state}"
            return OutputError(f"is full: {needed}.", file=roots, hint="Free the space and run the same command again.")
        place = error.filename or roots
        if error.errno in REFUSED and not self.claimed and not any(place.moved_aside for place in self.places):
            return DestinationError(f"cannot be written: {error.strerror}.", file=place, hint="Check the permissions or choose another folder.")
        return OutputError(f"failed: {error.strerror or error}; {state}.", file=place, hint="Check the disk, then run the same command again.")


def all_recorded(to: Destination, parts: Sequence[Stretch]) -> bool:
    """Whether each part's record can be seen; one that is damaged counts, for waiting would not mend it."""
    with contextlib.suppress(SourceError):
        return all(load_record(to.disk, to.layout, part) is not None for part in parts)
    return True


def finish_place(to: Destination) -> None:
    """Small files and marks in the plan's order, each durable before the next, then the manifest. Doing it again changes nothing."""
    records = []
    for file in to.plan.files:
        record = load_record(to.disk, to.layout, file)
        if record is None:
            raise OutputError("has no record of being finished.", file=to.layout.final(file.name), hint="Run the same command again.")
        records.append(record)
    for mark in to.plan.marks:
        digest = sha256(mark.content)
        to.put(mark.name, mark.content, ours=lambda name=mark.name: to.has_record(name))  # type: ignore[misc]
        to.publish(Record(to.plan.id, mark.name, len(mark.content), digest, {}))
    content = manifest_of(to.plan, records)
    to.put(MANIFEST, content, ours=lambda: to.has_record(MANIFEST))
    to.publish(Record(to.plan.id, MANIFEST, len(content), sha256(content), {}))  # tells ours, damaged, from a stranger's


def make_durable(disk: Disk, root: Path) -> None:
    """A manifest that is there may have been linked by a run that was killed before it synced the folder: exit 0 promises more than that."""
    try:
        disk.sync_folder(root)
    except OSError as error:
        raise OutputError(f"cannot be made durable: {error.strerror}.", file=root, hint="Check the disk, then run the same command again.") from error


def unlooked(error: OSError, targets: Sequence[Target]) -> Exception:
    """A destination could not even be looked at."""
    place = error.filename or ", ".join(str(target.root) for target in targets)
    if error.errno in REFUSED:
        return DestinationError(f"cannot be looked at: {error.strerror}.", file=place, hint="Check the permissions or choose another folder.")
    return OutputError(f"cannot be looked at: {error.strerror or error}.", file=place, hint="Check the disk, then run the same command again.")


def aside(disk: Disk, target: Target) -> Path:
    """Move a destination aside, its folder first: a manifest must not stay where what it vouches for is gone. What the user named is returned."""
    disk.sync_folder(target.root.parent)  # a killed run may have moved the folder, and not made that durable
    moved = [move_aside(disk, path) for path in (target.root, *target.outside) if present(path, disk)]
    return moved[-1]


def move_aside(disk: Disk, root: Path) -> Path:
    """Rename a destination to the first free `NAME.bak-N`; nothing is deleted."""
    for number in range(1, 10_000):
        other = root.with_name(f"{root.name}.bak-{number}")
        try:
            disk.status(other)
        except FileNotFoundError:
            disk.rename(root, other)
            disk.sync_folder(root.parent)
            return other
    raise DestinationError("has 9,999 backups already.", file=root, hint="Remove some of them.")


def _claimed(disk: Disk, target: Target) -> bool:
    try:
        return claimed_by(disk, target.root) == target.plan.id
    except (SourceError, OSError):
        return False
