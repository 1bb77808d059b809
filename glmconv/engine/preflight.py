"""What is refused before anything is written: a destination that is not ours, lies in the source, cannot be written, or is too small."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from glmconv.engine.files import Disk
from glmconv.engine.journal import BESIDE, STATE, Layout, checked_name, claimed_by, final_path
from glmconv.engine.manifest import load_manifest
from glmconv.engine.plan import Plan
from glmconv.errors import CapacityError, DestinationError, GlmconvError, SourceError, UsageError, printable

SLACK = 100  # one byte in so many is added for folders, records and the filesystem's own blocks


@dataclass(frozen=True)
class Target:
    """One output: what is to be written, and the folder for it (beside the files, if its files lie beside it)."""

    plan: Plan
    root: Path

    @property
    def path(self) -> Path:
        """What a user calls the output: the file, if it is one, else the folder."""
        return self.outside[0] if len(self.outside) == 1 else self.root

    @property
    def outside(self) -> list[Path]:
        """Files of the output that lie beside its folder."""
        return [final_path(self.root, file.name) for file in self.plan.files if file.name.startswith(BESIDE)]


class State(Enum):
    EMPTY = "nothing there yet"
    BEGUN = "claimed for this plan"
    DONE = "finished"
    FOREIGN = "something else is there"


def preflight(targets: Sequence[Target], *, source_root: Path | None, disk: Disk, resume: bool = True, overwrite: bool = False) -> int:
    """Bytes that are still to be written. Raises DestinationError, CapacityError or UsageError before anything is written."""
    targets = [resolved(target) for target in targets]
    refuse_overlaps(targets, disk)
    needed: dict[int, int] = defaultdict(int)
    places: dict[int, Path] = {}
    for target in targets:
        refuse_wrong_names(target)
        if source_root is not None:
            refuse_source(target.root, source_root, disk)
        state = state_of(target, disk, resume=resume, overwrite=overwrite)
        if state is not State.DONE:
            place = existing(target.root, disk)
            refuse_unwritable(place, target.root, disk)
            device = disk.status(place).device
            places.setdefault(device, place)
            needed[device] += missing_bytes(target, disk) if state is State.BEGUN else target.plan.size
    for device, size in needed.items():
        refuse_full(places[device], size, disk)
    return sum(needed.values())


def resolved(target: Target) -> Target:
    """The target with its folder's real path: destinations are often reached through links. One that leads nowhere is left, and refused."""
    if os.path.islink(target.root) and not os.path.isdir(target.root):
        return target
    return Target(target.plan, Path(os.path.realpath(target.root)))


def state_of(target: Target, disk: Disk, *, resume: bool = True, overwrite: bool = False) -> State:
    """What is in the destination. DestinationError if that is something else's and is not to be moved aside."""
    root, hint = target.root, "Choose another folder or pass --overwrite (it moves this one aside)."
    there = next((path for path in target.outside if present(path, disk)), None)
    if not present(root, disk):
        if there is not None and not overwrite:
            raise DestinationError("is there already.", file=there, hint="Choose another name or pass --overwrite (it moves the file aside).")
        return State.EMPTY if there is None else State.FOREIGN
    if not disk.status(root).folder:
        raise DestinationError("is not a folder.", file=root, hint="Choose another destination.")
    if is_finished(target, disk):
        return State.DONE
    names = [name for name in disk.names(root) if name != STATE]  # before the claim: an equal job makes its names after it
    try:
        owner = claimed_by(disk, root)
    except (SourceError, OSError):
        owner = "unknown"
    if owner == target.plan.id and (resume or not overwrite):
        if resume:
            return State.BEGUN
        raise DestinationError("holds the unfinished output of the same conversion.", file=root, hint="Resume it, or pass --overwrite.")
    if owner is None and not names and there is None:
        return State.EMPTY  # a claim that was never made leaves only empty folders
    if overwrite:
        return State.FOREIGN
    if owner is None:
        inside = printable(names[0], 80) if names else f"{there} is there already"
        raise DestinationError(f"is not empty ({inside}) and holds no output of this conversion.", file=root, hint=hint)
    raise DestinationError("holds the output of another conversion.", file=root, hint=hint)


def is_finished(target: Target, disk: Disk) -> bool:
    """Whether the plan's manifest is there and each file has its size. Their content is `verify`'s question."""
    try:
        manifest = load_manifest(disk, target.root)
        if manifest.plan_id != target.plan.id:
            return False
        return all(disk.status(final_path(target.root, name)).size == file.size for name, file in manifest.files.items())
    except (SourceError, OSError):
        return False


def refuse_wrong_names(target: Target) -> None:
    """A plan with two pieces or files of one name would lose one of them: that is a bug of the format that planned it."""
    names = [checked_name(name, target.root) for name in [f.name for f in target.plan.files] + [m.name for m in target.plan.marks]]
    pieces = [p.name for f in target.plan.files for p in f.pieces if p.digested]
    for kind, found in (("files", names), ("tensors", pieces)):
        if len(set(found)) != len(found):
            twice = next(name for name in found if found.count(name) > 1)
            raise GlmconvError(f"the plan has two {kind} of this name.", file=target.root, tensor=twice)


def refuse_overlaps(targets: Sequence[Target], disk: Disk) -> None:
    """Two destinations must not be one folder, nor one inside the other."""
    for number, target in enumerate(targets):
        for other in targets[:number]:
            first, second = target.root, other.root
            if first == second or identity(first, disk) in identities(second, disk) or identity(second, disk) in identities(first, disk):
                raise UsageError(
                    f"and {second} are one folder, or one lies inside the other.", file=first, hint="Give each target a folder of its own."
                )
            if first in second.parents or second in first.parents:
                raise UsageError(f"and {second} lie inside each other.", file=first, hint="Give each target a folder of its own.")


def refuse_source(root: Path, source_root: Path, disk: Disk) -> None:
    """Neither folder may be the other or lie in it, by whatever path: links are resolved, bind mounts show in device and inode."""
    source = Path(source_root).resolve()
    if root == source or source in root.parents or identity(source, disk) in identities(root, disk):
        raise DestinationError("lies inside the source.", file=root, hint="Choose a folder outside of it.")
    if root in source.parents or identity(root, disk) in identities(source, disk):
        raise DestinationError("contains the source.", file=root, hint="Choose another folder.")


Identity = tuple[int, int]


def identity(path: Path, disk: Disk) -> Identity | None:
    try:
        found = disk.status(path)
    except OSError:
        return None
    return found.device, found.inode


def identities(path: Path, disk: Disk) -> set[Identity]:
    """Of the path and of each of its parents, as far as they exist."""
    return {found for found in (identity(folder, disk) for folder in (path, *path.parents)) if found is not None}


def refuse_unwritable(place: Path, root: Path, disk: Disk) -> None:
    if not disk.status(place).folder:
        raise DestinationError(f"cannot be made: {place} is not a folder.", file=root, hint="Choose another destination.")
    if not disk.writable(place):
        raise DestinationError(f"cannot be written: {place} is read-only for you.", file=root, hint="Choose another destination.")


def refuse_full(place: Path, size: int, disk: Disk) -> None:
    needed, free = size + size // SLACK, disk.free(place)
    if needed > free:
        raise CapacityError(
            f"{gigabytes(needed)} are needed and {gigabytes(free)} are free: {gigabytes(needed - free)} are missing.",
            file=place,
            hint="Free the space or choose another disk.",
        )


def missing_bytes(target: Target, disk: Disk) -> int:
    """Bytes of the files that the journal does not list, or that are not as large as they should be."""
    layout = Layout(target.root, target.plan.id)
    small = sum(len(m.content) for m in target.plan.marks if not has_size(layout.final(m.name), len(m.content), disk))
    missing = (f for f in target.plan.files if not (present(layout.record(f.name), disk) and has_size(layout.final(f.name), f.size, disk)))
    return small + sum(f.size for f in missing if not (f.sections and has_size(layout.shared(f.name), f.size, disk)))  # those are reserved whole


def has_size(path: Path, size: int, disk: Disk) -> bool:
    try:
        return disk.status(path).size == size
    except OSError:
        return False


def present(path: Path, disk: Disk) -> bool:
    try:
        disk.status(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise DestinationError(f"cannot be looked at: {error.strerror}.", file=path, hint="Choose another destination.") from error
    return True


def existing(path: Path, disk: Disk) -> Path:
    """The path itself or its nearest parent that is there."""
    return next((folder for folder in (path, *path.parents) if present(folder, disk)), path)


def gigabytes(size: int) -> str:
    """For people: 41.2 GB, 3.1 MB, 512 bytes."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{rounded_up(size, unit):.1f} {name}"
    return f"{size} bytes"


def rounded_up(size: int, unit: int) -> float:
    """Rounded up to a tenth: a missing amount must not look smaller than it is."""
    return -(-size * 10 // unit) / 10
