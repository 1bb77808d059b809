"""A conversion done again without writing: every tensor of an output against what its source gives, byte for byte."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from glmconv.check.verify import Damage, ManifestCheck, verify_output
from glmconv.checkpoint import Checkpoint
from glmconv.engine.files import Disk
from glmconv.engine.jobs import fill_part
from glmconv.engine.manifest import Manifest, load_manifest
from glmconv.engine.plan import Plan, Stretch, parts_of
from glmconv.engine.stream import Buffer, Stream
from glmconv.errors import Interrupted, SourceError

CHUNK = 4 << 20


class Nowhere(Disk):
    """A disk that takes everything and keeps nothing: the stream in front of it has hashed it."""

    def write(self, fd: int, data: memoryview | bytes, offset: int) -> int:
        return len(data)


def verify_exact(
    source: Checkpoint, output: str | Path, plan_of: Callable[[Manifest], Plan], *, workers: int = 2,
    progress: Callable[[int], None] | None = None, started: Callable[[int], None] | None = None, stop: threading.Event | None = None,
) -> ManifestCheck:  # fmt: skip
    """Every byte of `output` as its manifest says, and every tensor as converting `source` gives it.

    `plan_of` plans the conversion that the manifest tells of. SourceError if there is no manifest, or if the plans differ.
    """
    result = verify_output(output, workers=workers, stop=stop)
    if not result.same:
        return result
    manifest = load_manifest(Disk(), result.root)
    plan = plan_of(manifest)
    if plan.id != manifest.plan_id:
        raise SourceError(
            "is not the output of this source with this version of glmconv: their plans differ.", file=result.root,
            hint="Compare the weights instead: glmconv verify SRC OUT.",
        )  # fmt: skip
    if started:
        started(plan.size)
    buffers: SimpleQueue[Buffer] = SimpleQueue()  # one for each worker
    for _ in range(workers):
        buffers.put(Buffer(CHUNK))

    def again(part: Stretch) -> list[Damage]:
        buffer = buffers.get()
        try:
            return _again(source, part, manifest, buffer, progress, stop)
        finally:
            buffers.put(buffer)

    with ThreadPoolExecutor(workers) as pool:
        for damages in pool.map(again, parts_of(plan.files)):
            result.damages += damages
    return result


def _again(
    source: Checkpoint, part: Stretch, manifest: Manifest, buffer: Buffer,
    progress: Callable[[int], None] | None, stop: threading.Event | None,
) -> list[Damage]:  # fmt: skip
    def wrote(size: int) -> None:
        if stop is not None and stop.is_set():
            raise Interrupted(2)
        if progress:
            progress(size)

    stream = Stream(Nowhere(), -1, buffer, wrote, part.start)
    tensors = fill_part(part, source, stream, buffer, {})
    digest, whole = stream.finish(), manifest.files.get(part.name)
    if whole is not None and digest == whole.sha256:
        return []
    name = part.name.partition("//")[0]
    wrong = [
        Damage(name, "is not what its source gives", tensor) for tensor, made in tensors.items() if made.sha256 != manifest.tensors[tensor].sha256
    ]
    return wrong if wrong or whole is None else [Damage(name, "is not what its source gives")]
