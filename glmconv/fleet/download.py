"""Fetching a release from the Hub into a folder. A mark is written last: which commit, which files, how large. Only the mark says that it is done."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from glmconv.engine.commit import write_all
from glmconv.engine.files import Disk
from glmconv.engine.journal import STATE, is_count, read_whole, sealed, unsealed
from glmconv.engine.preflight import gigabytes, has_size
from glmconv.errors import CapacityError, DestinationError, OutputError, SourceError
from glmconv.fleet.pipeline import Download

FORMAT = "glmconv download 1"
LIMIT = 16 << 20
WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "*.md", "LICENSE", "*.safetensors")


def mark_of(folder: Path) -> Path:
    return folder / STATE / "download.json"


def downloaded(asked: Download, folder: Path) -> bool:
    """Whether the folder's mark is of this repository and revision, and each file that it lists has its size."""
    path = mark_of(folder)
    try:
        document = unsealed(read_whole(Disk(), path, LIMIT), file=path, limit=LIMIT)
        files = document.get("files")
        if document.get("format") != FORMAT or not isinstance(files, dict):
            return False
        if document.get("hub") != asked.hub or (asked.revision and asked.revision not in (document.get("revision"), document.get("sha"))):
            return False
        return bool(files) and all(is_count(size) and os.lstat(folder / name).st_size == size for name, size in files.items())
    except (SourceError, OSError):
        return False


def fetch(asked: Download, folder: Path) -> int:
    """Download, going on where an earlier call stopped; returns the bytes that are there then.

    SourceError if the Hub does not give it, CapacityError if it does not fit, OutputError if the folder cannot be written.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        found = HfApi().model_info(asked.hub, revision=asked.revision or None, files_metadata=True)
        sizes = {entry.rfilename: entry.size or 0 for entry in found.siblings or ()}
        refuse_full(folder, sum(size for name, size in sizes.items() if not has_size(folder / name, size, Disk())))
        snapshot_download(asked.hub, revision=found.sha, local_dir=folder, allow_patterns=list(WANTED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError) as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise SourceError(f"could not be downloaded from the Hub: {reason}", file=asked.hub) from None
    except OSError as problem:
        raise OutputError(f"cannot be written: {problem.strerror or problem}.", file=folder, hint="What is there is kept; run it again.") from problem
    there = {name: size for name, size in sizes.items() if (folder / name).is_file()}
    wrong = next((name for name, size in there.items() if not has_size(folder / name, size, Disk())), None)
    if wrong is not None or not there:
        raise OutputError("is not as large as the Hub says.", file=folder / (wrong or ""), hint="Remove it and run the same command again.")
    write_mark(folder, {"format": FORMAT, "hub": asked.hub, "revision": asked.revision, "sha": found.sha or "", "files": there})
    return sum(there.values())


def refuse_full(folder: Path, size: int) -> None:
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise DestinationError("is not a folder.", file=place, hint="Choose another place.")
    free = Disk().free(place)
    if size > free:
        raise CapacityError(
            f"{gigabytes(size)} are needed and {gigabytes(free)} are free.", file=place, hint="Free the space or choose another disk."
        )


def write_mark(folder: Path, document: Mapping[str, object]) -> None:
    """The mark, whole or not at all: written beside its name, made durable, renamed."""
    disk, path = Disk(), mark_of(folder)
    with contextlib.suppress(FileExistsError):
        disk.mkdir(path.parent)
    staged = path.with_name(f"{path.name}.{secrets.token_hex(8)}.part")
    fd = disk.create(staged)
    try:
        write_all(disk, fd, sealed(document), 0)
        disk.sync(fd)
    finally:
        disk.close(fd)
    disk.rename(staged, path)
    disk.sync_folder(path.parent)
