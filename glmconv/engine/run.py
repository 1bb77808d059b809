"""Thin run (to be replaced)."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.engine.commit import Destination
from glmconv.engine.files import Disk
from glmconv.engine.jobs import Buffer, Job
from glmconv.engine.journal import load_record
from glmconv.engine.manifest import manifest_of
from glmconv.engine.plan import RowSource, by_source
from glmconv.engine.preflight import Target, is_finished
from glmconv.engine.queue import JobQueue, LocalQueue


@dataclass(frozen=True)
class Outcome:
    target: Target
    files_written: int
    files_kept: int
    bytes_written: int
    already_done: bool
    manifest: Path
    moved_aside: Path | None = None


def run(targets: Sequence[Target], source: RowSource, *, workers: int = 2, chunk_size: int = 4 << 20, disk: Disk | None = None,
        queue: JobQueue | None = None, resume: bool = True, resume_check: str = "full", overwrite: bool = False, stop: threading.Event | None = None,
        progress: Callable[[int], None] | None = None, source_root: Path | None = None, log: Callable[[str], None] | None = None) -> list[Outcome]:
    disk = disk or Disk()
    outcomes = []
    for target in targets:
        if is_finished(target, disk):
            outcomes.append(Outcome(target, 0, len(target.plan.files), 0, True, target.root / "glmconv_manifest.json"))
            continue
        to = Destination(disk, target.root, target.plan, secrets.token_hex(8), lambda s: None)
        to.claim()
        buffer = Buffer(chunk_size)
        for n in by_source(target.plan.files, source):
            job = Job(n, to, target.plan.files[n])
            if not job.is_done(buffer, lambda: None):
                job.write(source, buffer, progress or (lambda n: None), lambda: None)
        for mark in target.plan.marks:
            to.put(mark.name, mark.content, ours=lambda: True)
        records = [load_record(disk, to.layout, f) for f in target.plan.files]
        to.put("glmconv_manifest.json", manifest_of(target.plan, records), ours=lambda: True)
        to.sweep()
        outcomes.append(Outcome(target, len(target.plan.files), 0, target.plan.size, False, target.root / "glmconv_manifest.json"))
    return outcomes
