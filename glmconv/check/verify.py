"""One output against its own manifest, every byte; or two checkpoints against each other (`compare`)."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from glmconv.check.compare import Comparison, Difference, compare
from glmconv.checkpoint import open_checkpoint, resolve, unfinished
from glmconv.dtypes import BY_NAME
from glmconv.engine.files import Disk
from glmconv.engine.journal import BESIDE, final_path, folder_of_file
from glmconv.engine.manifest import Manifest, load_manifest
from glmconv.errors import Interrupted, SourceError
from glmconv.formats import FORMATS
from glmconv.formats.gguf_split import whole_name

BLOCK = 4 << 20
MANIFEST = "glmconv_manifest.json"
WEIGHTS = (".safetensors", ".distcp", ".gguf")


@dataclass
class Damage:
    """What is not as the manifest says: a file, perhaps a tensor in it, and in what way."""

    file: str
    what: str
    tensor: str = ""


@dataclass
class ManifestCheck:
    """The result of `verify OUT`."""

    root: Path
    files: int = 0
    tensors: int = 0
    bytes: int = 0
    damages: list[Damage] = field(default_factory=list)

    @property
    def same(self) -> bool:
        return not self.damages


def verify_output(
    path: str | Path, *, workers: int = 2, progress: Callable[[int], None] | None = None, started: Callable[[int], None] | None = None,
    stop: threading.Event | None = None, disk: Disk | None = None,
) -> ManifestCheck:  # fmt: skip
    """Read every byte of an output and hold it against its manifest. SourceError if `path` has no manifest."""
    disk = disk or Disk()
    root = output_root(path)
    try:
        manifest = load_manifest(disk, root)
    except FileNotFoundError:
        unfinished(root)
        raise SourceError(
            "has no manifest: glmconv did not write it.", file=root, hint="Compare two checkpoints instead: glmconv verify A B."
        ) from None
    except SourceError as problem:
        return ManifestCheck(root, damages=[Damage(MANIFEST, problem.line)])
    except OSError as problem:  # a link, a pipe, a folder in its place
        return ManifestCheck(root, damages=[Damage(MANIFEST, f"cannot be read: {problem.strerror}")])
    result = ManifestCheck(root, len(manifest.files), len(manifest.tensors), sum(file.size for file in manifest.files.values()))
    if started:
        started(result.bytes)
    with ThreadPoolExecutor(workers) as pool:
        for damages in pool.map(lambda name: _check_file(disk, root, manifest, name, progress, stop), manifest.files):
            result.damages += damages
    result.damages += [Damage(name, "is not in the manifest") for name in _strangers(disk, root, manifest)]
    return result


def output_root(path: str | Path) -> Path:
    """The folder of an output, by its path: of one that is a file the folder beside it. SourceError if there is none."""
    file = Path(path)
    for name in dict.fromkeys((file.name, whole_name(file.name))):  # of one of several files it has the name of them all
        beside = folder_of_file(file.with_name(name)) if name else file
        if os.path.isfile(path) and os.path.isdir(beside):
            return beside
    return manifest_root(resolve(path))


def manifest_root(path: Path) -> Path:
    """The folder that holds the manifest: of a torch_dist checkpoint the one above its iteration."""
    if (path / MANIFEST).exists():
        return path
    form = next((form for form in FORMATS.values() if form.detect(path)), None)
    return form.manifest_at(path) if form else path


def _check_file(
    disk: Disk, root: Path, manifest: Manifest, name: str, progress: Callable[[int], None] | None, stop: threading.Event | None
) -> list[Damage]:
    wanted = manifest.files[name]
    try:
        fd = disk.open(final_path(root, name))
    except OSError as problem:
        return [Damage(name, "is missing" if isinstance(problem, FileNotFoundError) else f"cannot be read: {problem.strerror}")]
    try:
        size = disk.status_of(fd).size
        if size != wanted.size:
            return [Damage(name, f"has {size:,} bytes, the manifest says {wanted.size:,}")]
        if _digest(disk, fd, 0, size, progress, stop) == wanted.sha256:
            return []
        return _damaged_tensors(disk, fd, manifest, name) or [Damage(name, "differs from its sha256, outside its tensors")]
    except OSError as problem:
        return [Damage(name, f"cannot be read: {problem.strerror}")]
    finally:
        disk.close(fd)


def _digest(disk: Disk, fd: int, begin: int, size: int, progress: Callable[[int], None] | None = None, stop: threading.Event | None = None) -> str:
    state, buffer = hashlib.sha256(), bytearray(BLOCK)
    at = begin
    while at < begin + size:
        if stop is not None and stop.is_set():
            raise Interrupted(2)
        got = disk.read_into(fd, memoryview(buffer)[: min(BLOCK, begin + size - at)], at)
        if got <= 0:
            break
        state.update(memoryview(buffer)[:got])
        at += got
        if progress:
            progress(got)
    return state.hexdigest()


def _damaged_tensors(disk: Disk, fd: int, manifest: Manifest, name: str) -> list[Damage]:
    damages = []
    for tensor, entry in manifest.tensors.items():
        if entry.file == name:
            size = BY_NAME[entry.dtype].itemsize * math.prod(entry.shape)
            if _digest(disk, fd, entry.offset, size) != entry.sha256:
                damages.append(Damage(name, "differs from its sha256", tensor))
    return damages


def _strangers(disk: Disk, root: Path, manifest: Manifest) -> list[str]:
    """Weight files in the output's folders that the manifest does not know: a loader's glob would read them."""
    if any(name.startswith(BESIDE) for name in manifest.files):
        return []  # the files beside an output that is a file are others'
    folders = {name.rpartition("/")[0] for name in manifest.files} | {""}
    found = []
    for folder in sorted(folders):
        for name in disk.names(root / folder) if (root / folder).is_dir() else []:
            full = f"{folder}/{name}" if folder else name
            if name.endswith(WEIGHTS) and full not in manifest.files:
                found.append(full)
    return found


def verify_same(
    a: str | Path, b: str | Path, *, workers: int = 2, every: int = 1, progress: Callable[[int], None] | None = None,
    started: Callable[[int], None] | None = None, stop: threading.Event | None = None, origin: str | None = None, mtp: bool = True,
    max_rmse: float | None = None, dialect: str = "auto", mtp_from: str | None = None, mmproj: str | None = None, lora: str | None = None,
    strict: bool = True,
) -> Comparison:  # fmt: skip
    """Compare two checkpoints of any formats bit by bit. Tensors that either lacks against its own config are differences, not errors.

    What `b` holds quantized, and `a` not or otherwise, is held against a bound on its relative RMSE instead; `max_rmse` sets that for all.

    `mtp` False leaves the MTP layers of both out: what a conversion with `--mtp drop` is compared by. `dialect`, `mtp_from` and `lora` are how `a` is
    read; `mmproj` is the vision tower's file of whichever is GGUF. Without it the tower is not compared, and `apart` says how many tensors that are.
    `strict` False compares what is there: what both lack, and what is unknown, is no difference then.
    """
    towers = [mmproj if str(path).lower().endswith(".gguf") else None for path in (a, b)]
    with (
        open_checkpoint(a, origin=origin, mtp=mtp, strict=False, dialect=dialect, mtp_from=mtp_from, mmproj=towers[0], lora=lora) as left,
        open_checkpoint(b, origin=origin, mtp=mtp, strict=False, mmproj=towers[1]) as right,
    ):
        if started:
            started(sum(tensor.nbytes for _, tensor in list(left)[::every]))
        result = compare(left, right, workers=workers, progress=progress, stop=stop, every=every, max_rmse=max_rmse)
        for side in (left, right) if strict else ():
            opened = side.opened
            named = {difference.tensor for difference in result.differences}
            gone = [(name, "is missing") for name in opened.missing] + [(name, "is unknown to the architecture") for name in opened.unexpected]
            for name, what in [*gone, *opened.wrong]:
                if name not in named:
                    result.differences.append(Difference(name, f"{what} (in {opened.path})"))
        return result


def verify(a: str | Path, b: str | Path | None = None, *, workers: int = 2) -> ManifestCheck | Comparison:
    """Are `a` and `b` the same weights; or, with `b` None, is `a` what its manifest says? The result's `same` is the answer."""
    return verify_output(a, workers=workers) if b is None else verify_same(a, b, workers=workers)
