"""Scenes that a run may find on a disk, what must hold in every state that a crash leaves of them, and the walk through such states."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glmconv.engine import journal
from glmconv.engine.journal import BESIDE, MANIFEST, STATE, Layout, final_path
from glmconv.engine.manifest import load_manifest
from glmconv.engine.plan import Plan, sha256
from glmconv.engine.run import Target, run
from glmconv.errors import SourceError
from tests.engine.aftermath import OUTCOMES
from tests.engine.made import CHUNK, MadeSource, expected, file_plan, made_plan, sectioned_plan
from tests.engine.simulated import PowerLoss, SimulatedDisk

SIM = Path("/sim")
FILE = SIM / "made.gguf.glmconv"
KILLED = "killed"
AGAIN = 0.5  # how often a recovery is crashed too
RECOVERIES = 3
SOAK = os.environ.get("GLMCONV_SOAK") == "1"
SEED = int(os.environ.get("GLMCONV_SEED", random.randrange(1 << 32)))

Run = Callable[["Scene", SimulatedDisk], None]


@dataclass(frozen=True)
class Scene:
    """What is asked for, and what the disk holds before."""

    name: str
    targets: tuple[Target, ...]
    source: MadeSource
    before: SimulatedDisk
    damaged: bool = False  # files under final names may be wrong until the run ends
    old: Mapping[Path, bytes] = field(default_factory=dict)  # a finished output that must survive, there or in OUT.bak-1
    workers: int = 1
    overwrite: bool = False

    def run(self, disk: SimulatedDisk) -> None:
        run(self.targets, self.source, workers=self.workers, chunk_size=CHUNK, disk=disk, overwrite=self.overwrite)


def say(line: str) -> None:
    """A figure for whoever runs pytest with -s or -rP."""
    sys.stdout.write(f"{line}\n")


def written_in(root: Path, truth: Mapping[str, bytes]) -> dict[Path, bytes]:
    return {final_path(root, name): content for name, content in truth.items()}


def finished(targets: Sequence[Target], source: MadeSource) -> SimulatedDisk:
    """A disk on which a run without faults has finished, all of it durable."""
    disk = SimulatedDisk()
    run(targets, source, workers=1, chunk_size=CHUNK, disk=disk)
    return disk.after_power_loss(random.Random(0), "everything lost")


_truths: dict[str, dict[str, bytes]] = {}


def truth_of(plan: Plan, source: MadeSource) -> dict[str, bytes]:
    """Each file of the finished output: contents put together without the engine, and the manifest of a run without faults, checked by hand."""
    if plan.id not in _truths:
        truth = dict(expected(plan, source))
        root = FILE if plan.files[0].name.startswith(BESIDE) else SIM / "truth"
        disk = finished([Target(plan, root)], source)
        manifest = load_manifest(disk, root)
        assert {name: (file.size, file.sha256) for name, file in manifest.files.items()} == {name: (len(c), sha256(c)) for name, c in truth.items()}
        assert manifest.plan_id == plan.id
        for name, tensor in manifest.tensors.items():
            size = next(p.payload for f in plan.files for p in f.pieces if p.name == name)
            assert sha256(truth[tensor.file][tensor.offset : tensor.offset + size]) == tensor.sha256, name
        content = disk.content(root / MANIFEST)
        assert content is not None
        _truths[plan.id] = truth | {MANIFEST: content}
    return _truths[plan.id]


# -- scenes --------------------------------------------------------------------------------------------------------------------------------


def one_target() -> Scene:
    return Scene("one target", (Target(made_plan(), SIM / "out"),), MadeSource(), SimulatedDisk())


def new_folders() -> Scene:
    return Scene("new folders", (Target(made_plan(files=1), SIM / "far" / "away" / "out"),), MadeSource(), SimulatedDisk())


def two_targets() -> Scene:
    targets = (Target(made_plan("first", files=2), SIM / "one"), Target(made_plan("second", files=1), SIM / "two"))
    return Scene("two targets", targets, MadeSource(), SimulatedDisk())


def two_workers() -> Scene:
    return Scene("two workers", (Target(made_plan(files=4), SIM / "out"),), MadeSource(), SimulatedDisk(), workers=2)


def damaged() -> Scene:
    """A run was stopped before its marks; since then a finished file lost a bit, another its end, a record a bit."""
    target, source = Target(made_plan(files=4), SIM / "out"), MadeSource()
    disk = finished([target], source)
    for name in (MANIFEST, *(mark.name for mark in target.plan.marks)):
        disk.unlink(target.root / name)
    layout = Layout(target.root, target.plan.id)
    disk.damage(target.root / "shard-00001", flip)
    disk.damage(target.root / "folder/part", lambda data: data.__delitem__(slice(1000, None)))
    disk.damage(layout.record("shard-00002"), flip)
    for folder in (target.root, layout.staging):
        disk.sync_folder(folder)
    return Scene("damaged", (target,), source, disk.after_kill(), damaged=True)


def overwrite() -> Scene:
    old, source = made_plan("old", files=1), MadeSource()
    disk = finished([Target(old, SIM / "out")], source)
    survives = written_in(SIM / "out", truth_of(old, source))
    return Scene("overwrite", (Target(made_plan("new", files=2), SIM / "out"),), source, disk, old=survives, overwrite=True)


def beside() -> Scene:
    """An output that is two files, their state in a folder beside them."""
    return Scene("beside", (Target(file_plan(), FILE),), MadeSource(), SimulatedDisk())


def overwrite_beside() -> Scene:
    old, source = file_plan("old"), MadeSource()
    disk = finished([Target(old, FILE)], source)
    survives = written_in(FILE, truth_of(old, source))
    return Scene("overwrite beside", (Target(file_plan("new"), FILE),), source, disk, old=survives, overwrite=True)


def sections() -> Scene:
    """A large file is written in sections."""
    return Scene("sections", (Target(sectioned_plan(), FILE),), MadeSource(), SimulatedDisk())


def damaged_sections() -> Scene:
    """A run was stopped with some sections done; since then one of them lost a bit, and one its record."""
    target, source = Target(sectioned_plan(), FILE), MadeSource()
    disk = SimulatedDisk()
    source.flaw = "e"
    with contextlib.suppress(SourceError):
        run([target], source, workers=1, chunk_size=CHUNK, disk=disk)
    source.flaw = ""
    layout, file = Layout(target.root, target.plan.id), target.plan.files[1]
    assert len(disk.listing(layout.journal)) >= 3
    disk.damage(layout.shared(file.name), lambda data: flip_at(data, file.sections[1].start + 5))
    disk.unlink(layout.record(file.sections[2].name))
    disk.sync_folder(layout.journal)
    return Scene("damaged sections", (target,), source, disk.after_kill(), workers=2, damaged=True)


def damaged_whole() -> Scene:
    """A file of sections was finished, and damaged before the manifest was written."""
    target, source = Target(sectioned_plan(), FILE), MadeSource()
    disk = finished([target], source)
    disk.unlink(target.root / MANIFEST)
    disk.damage(final_path(target.root, target.plan.files[1].name), flip)
    disk.sync_folder(target.root)
    return Scene("damaged whole", (target,), source, disk.after_kill(), damaged=True)


def lost_whole() -> Scene:
    """A file of sections was finished, and removed by its user."""
    target, source = Target(sectioned_plan(), FILE), MadeSource()
    disk = finished([target], source)
    disk.unlink(final_path(target.root, target.plan.files[1].name))
    disk.unlink(target.root / MANIFEST)
    for folder in (target.root, SIM):
        disk.sync_folder(folder)
    return Scene("lost whole", (target,), source, disk.after_kill(), damaged=True)


SCENES: tuple[Callable[[], Scene], ...] = (
    one_target, new_folders, two_targets, damaged, overwrite, two_workers, beside, overwrite_beside, sections, damaged_sections,
    damaged_whole, lost_whole,
)  # fmt: skip


def flip(data: bytearray) -> None:
    flip_at(data, len(data) // 2)


def flip_at(data: bytearray, at: int) -> None:
    data[at] ^= 4


# -- what must hold ------------------------------------------------------------------------------------------------------------------------


def flaws(scene: Scene, disk: SimulatedDisk) -> Iterator[str]:
    """What is wrong in a state that a crash has left: a mark or the manifest without what it vouches for, wrong bytes under a final name."""
    old = scene.old
    if old:
        if all(disk.content(path) == content for path, content in old.items()):
            return  # still in its place: nothing of ours can be there
        for name in {path.relative_to(SIM).parts[0] for path in old}:  # a folder, or a file beside it: each is moved by itself
            part = {path: content for path, content in old.items() if path.relative_to(SIM).parts[0] == name}
            whole = all(disk.content(path) == content for path, content in part.items())
            if not whole and any(disk.content(backup(path)) != content for path, content in part.items()):
                yield f"the old {name} is whole neither in its place nor in {name}.bak-1"
    for target in scene.targets:
        yield from target_flaws(target, truth_of(target.plan, scene.source), disk, old, damaged=scene.damaged)


def backup(path: Path) -> Path:
    """Where a file of an output is after it was moved aside: in its folder, or beside it under a name of its own."""
    top, *rest = path.relative_to(SIM).parts
    return Path(SIM / f"{top}.bak-1", *rest)


def target_flaws(target: Target, truth: Mapping[str, bytes], disk: SimulatedDisk, old: Mapping[Path, bytes], *, damaged: bool) -> Iterator[str]:
    layout = Layout(target.root, target.plan.id)
    missing = []  # what a mark cannot vouch for
    for file in target.plan.files:
        content = disk.content(layout.final(file.name))
        if content == truth[file.name]:
            continue
        missing.append(file.name)
        if content is not None and content != old.get(layout.final(file.name)) and not damaged:
            yield f"{file.name} has its final name and wrong bytes"
        if not damaged and disk.content(layout.record(file.name)) is not None:
            yield f"{file.name} has a record and is not there"
    for file in target.plan.files:
        there = disk.content(layout.final(file.name))
        if file.last and missing and file.name not in missing and there is not None and not damaged:
            yield f"{file.name} is there without {', '.join(missing)}"
    for name in [mark.name for mark in target.plan.marks] + [MANIFEST]:
        content = disk.content(target.root / name)
        if content is not None and missing:
            yield f"{name} is there without {', '.join(missing)}"
        if content != truth[name]:
            missing.append(name)
            if content is not None:
                yield f"{name} has wrong bytes"


def shortcomings(scene: Scene, disk: SimulatedDisk) -> Iterator[str]:
    """What is wrong or missing in outputs that should be finished."""
    for target in scene.targets:
        truth = truth_of(target.plan, scene.source)
        for name, content in truth.items():
            path = final_path(target.root, name)
            found = disk.content(path)
            if found != content:
                yield f"{path} is {'missing' if found is None else 'wrong'}"
        names = {name.split("/")[0] for name in truth if not name.startswith(BESIDE)} | {STATE}
        strange = set(disk.listing(target.root)) - names
        if strange:
            yield f"{target.root} also holds {strange}"
    for path, content in scene.old.items():
        if disk.content(backup(path)) != content:
            yield f"{backup(path)} is not the old output"


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Twice as many states a second: each document is parsed once (what the parser refuses has its own tests), garbage is collected rarely."""
    parse, threshold, parsed = journal.parse, gc.get_threshold(), dict[bytes, object]()

    def parse_once(data: bytes, *, file: object, **limits: int) -> object:
        if data not in parsed:
            parsed[data] = parse(data, file=file, **limits)
        return parsed[data]

    journal.parse = parse_once
    gc.freeze()
    gc.set_threshold(100_000)
    try:
        yield
    finally:
        journal.parse = parse
        gc.set_threshold(*threshold)
        gc.unfreeze()


# -- the walk ------------------------------------------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """Goes through crash states of one scene and keeps what it found."""

    scene: Scene
    rng: random.Random
    run: Run = Scene.run
    enough: int = 5
    states: int = 0
    reruns: int = 0
    bad: list[str] = field(default_factory=list)

    def through(self, states: int) -> Walk:
        """At least `states` crash states (fewer once enough is bad), each operation of the run crashed in turn."""
        total = self.operations()
        while not self.done(states):
            for at in self.rng.sample(range(total), total):
                if self.done(states):
                    break
                self.crash_at(at)
        return self

    def done(self, states: int) -> bool:
        return self.states >= states or len(self.bad) >= self.enough

    def operations(self) -> int:
        """How many changing operations a run without faults makes; its own result is checked too."""
        disk = self.scene.before.after_kill()
        self.run(self.scene, disk)
        self.judge_finished(disk, "no crash at all")
        return disk.changes

    def crash_at(self, at: int) -> None:
        """Crash there once; look at several states that may come of it."""
        disk = self.scene.before.after_kill()
        if not self.crashes(disk, at, story := f"{self.scene.name}: crash at {at}"):
            return
        after = disk.kinds[-1] if disk.kinds else "start"
        for outcome in (*self.rng.sample(OUTCOMES, 3), KILLED):
            self.recover(disk, outcome, f"{story} after {after}, {outcome}")

    def crashes(self, disk: SimulatedDisk, at: int, story: str) -> bool:
        """Run until the crash. False if the run finished before."""
        disk.crash_at = at
        try:
            self.run(self.scene, disk)
        except PowerLoss:
            return True
        except BaseException as error:
            if not disk.dead:
                self.report(story, f"{type(error).__name__}: {error}")
            return disk.dead
        if disk.dead:
            self.report(story, "success was claimed although the power was gone")
            return True
        self.judge_finished(disk, story)
        return False

    def recover(self, crashed: SimulatedDisk, outcome: str, story: str) -> None:
        """Judge the state; crash its recovery up to three times, judging each; then let one finish and judge that."""
        disk = self.next_state(crashed, outcome, story)
        for _ in range(RECOVERIES):
            if self.rng.random() >= AGAIN:
                break
            at = self.rng.randrange(120)
            story = f"{story}; again at {at}"
            if not self.crashes(disk, at, story):
                return
            outcome = self.rng.choice((*OUTCOMES, KILLED))
            story = f"{story}, {outcome}"
            disk = self.next_state(disk, outcome, story)
        self.finish(disk, story)

    def next_state(self, crashed: SimulatedDisk, outcome: str, story: str) -> SimulatedDisk:
        self.states += 1
        disk = crashed.after_kill() if outcome == KILLED else crashed.after_power_loss(self.rng, outcome)
        for flaw in flaws(self.scene, disk):
            self.report(story, flaw)
        return disk

    def finish(self, disk: SimulatedDisk, story: str) -> None:
        self.reruns += 1
        disk.crash_at = None
        try:
            self.run(self.scene, disk)
        except Exception as error:
            self.report(story, f"the rerun failed, {type(error).__name__}: {error}")
        else:
            self.judge_finished(disk, story)

    def judge_finished(self, disk: SimulatedDisk, story: str) -> None:
        for flaw in shortcomings(self.scene, disk):
            self.report(story, f"success, but {flaw}")
        for flaw in shortcomings(self.scene, disk.after_power_loss(self.rng, "everything lost")):
            self.report(story, f"success, power lost, and {flaw}")

    def report(self, story: str, flaw: str) -> None:
        self.bad.append(f"{story}: {flaw}")
