"""A pipeline's steps: what each would do, what is done already, and doing them. Done is what a manifest says, never that a folder is there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from glmconv.check.read_back import read_back
from glmconv.check.verify import verify_output
from glmconv.checkpoint import HUB_ID
from glmconv.convert import Converted, Options, convert, plan_targets, refuse_sources
from glmconv.engine.files import Disk
from glmconv.engine.journal import MANIFEST, folder_of_file
from glmconv.engine.preflight import State, Target, missing_bytes, resolved, state_of
from glmconv.engine.ranks import meeting, this_rank
from glmconv.errors import DestinationError, SourceError, UsageError, VerificationError
from glmconv.fleet.download import downloaded, fetch
from glmconv.fleet.pipeline import Pipeline, PipelineTarget, means
from glmconv.targets import GGUF

DONE, BEGUN, TO_DO, WAITS, IN_THE_WAY = "done", "begun", "to do", "waits for its source", "something else is there"
WORDS = {State.DONE: DONE, State.BEGUN: BEGUN, State.EMPTY: TO_DO, State.FOREIGN: TO_DO}


@dataclass(frozen=True)
class Reading:
    """Targets that are made in one reading of one source, and the options for all of them."""

    source: str
    targets: tuple[PipelineTarget, ...]

    @property
    def options(self) -> Mapping[str, object]:
        """Those of each target; where two have one, it is the same, or means nothing to the other."""
        return {name: value for target in self.targets for name, value in target.options.items()}


@dataclass(frozen=True)
class Step:
    """One step and its state. `bytes` of the output, `left` of them still to be written; None where the source is not there to tell."""

    step: str
    action: str
    source: str
    path: str
    state: str
    bytes: int | None = None
    left: int | None = None
    found: Mapping[str, object] = field(default_factory=dict)


def readings(pipeline: Pipeline, targets: Sequence[PipelineTarget]) -> list[Reading]:
    """The targets by the reading in which they are made; a target that another is made from comes first. UsageError for a circle."""
    left = list(targets)
    found: list[list[PipelineTarget]] = []
    while left:
        waiting = {str(target.path) for target in left}
        ready = [target for target in left if target.source not in waiting]
        if not ready:
            raise UsageError(f"the targets {', '.join(target.name for target in left)} are each other's source.")
        for target in ready:
            group = next((g for g in found if compatible(g, target)), None)
            if group is None:
                found.append([target])
            else:
                group.append(target)
        left = [target for target in left if target not in ready]
    return [Reading(group[0].source or pipeline.source, tuple(group)) for group in found]


def compatible(group: Sequence[PipelineTarget], target: PipelineTarget) -> bool:
    """Whether a target can be made in the same reading: of the same source, and no option of one means anything else to the other."""
    return all(
        other.source == target.source
        and all(
            other.options.get(name) == target.options.get(name)
            for name in {*other.options, *target.options}
            if means(name, other.kind) and means(name, target.kind)
        )
        for other in group
    )


def options_of(reading: Reading, run: Mapping[str, object]) -> Options:
    """The reading's options under those of the run (workers, memory, resuming), which change no byte."""
    return Options(**{**reading.options, **run})  # type: ignore[arg-type]


def survey(pipeline: Pipeline, only: tuple[str, ...] = (), run: Mapping[str, object] | None = None) -> list[Step]:
    """Every step with its state. Reads headers and manifests, writes nothing; raises as `convert` would for a source that is not in order."""
    steps = []
    if pipeline.download and (not only or "download" in only):
        state = DONE if downloaded(pipeline.download, Path(pipeline.source)) else TO_DO
        steps.append(Step("download", f"download {pipeline.download.hub}", pipeline.download.hub, pipeline.source, state))
    targets = wanted(pipeline, only)
    for reading in readings(pipeline, targets):
        steps += surveyed(pipeline, reading, run or {})
    if pipeline.verify and (not only or "verify" in only or targets):
        checked = targets or pipeline.targets
        steps += [Step("verify", f"verify {target.name}: {', '.join(pipeline.verify)}", "", str(target.path), TO_DO) for target in checked]
    return steps


def wanted(pipeline: Pipeline, only: tuple[str, ...]) -> tuple[PipelineTarget, ...]:
    """The targets to be made; none if only other steps are asked for."""
    named = pipeline.chosen(only)
    return () if only and not set(only) & {target.name for target in pipeline.targets} else named


def surveyed(pipeline: Pipeline, reading: Reading, run: Mapping[str, object]) -> Iterator[Step]:
    """The targets of one reading. A source that is still to be made or downloaded is no error, and is not fetched for this."""
    ours = {str(target.path) for target in pipeline.targets}
    pending = reading.source in ours and not (output_folder(Path(reading.source)) / MANIFEST).exists()
    downloads = reading.source == pipeline.source and pipeline.download is not None
    pending = pending or ((downloads or HUB_ID.match(reading.source) is not None) and not Path(reading.source).exists())
    if pending:
        yield from (Step(t.name, f"convert to {t.spec.to}", reading.source, str(t.path), WAITS) for t in reading.targets)
        return
    options = options_of(reading, run)
    with options.open(reading.source) as source:
        plans = plan_targets(source, [target.spec for target in reading.targets], options)
        for target, plan in zip(reading.targets, plans, strict=True):
            made = resolved(Target(plan, (target.spec.root or target.path).absolute()))
            refuse_sources(source, [made])
            try:
                state = state_of(made, Disk(), resume=options.resume, overwrite=options.overwrite)
                left = {State.DONE: 0, State.BEGUN: missing_bytes(made, Disk())}.get(state, plan.size)
                yield Step(target.name, f"convert to {plan.to}", reading.source, str(target.path), WORDS[state], plan.size, left)
            except DestinationError as problem:
                yield Step(
                    target.name, f"convert to {plan.to}", reading.source, str(target.path), IN_THE_WAY, plan.size, None, {"problem": problem.line}
                )


def output_folder(path: Path) -> Path:
    """Where an output's manifest lies."""
    return folder_of_file(path) if path.suffix.lower() == f".{GGUF}" else path


def download(pipeline: Pipeline) -> Step | None:
    """Fetch what the pipeline downloads, unless it is there. Ranks must not all do it: UsageError if there are several and it is not there."""
    if pipeline.download is None:
        return None
    target, words = Path(pipeline.source), f"download {pipeline.download.hub}"
    if downloaded(pipeline.download, target):
        return Step("download", words, pipeline.download.hub, pipeline.source, DONE, left=0)
    if meeting() is not None:
        raise UsageError(f"{pipeline.source} is not downloaded yet.", hint="Run the pipeline with --only download on one node first.")
    size = fetch(pipeline.download, target)
    return Step("download", words, pipeline.download.hub, pipeline.source, "downloaded", size, 0)


@dataclass(frozen=True)
class Watch:
    """How a run is followed and stopped: as `glmconv.convert` is."""

    started: Callable[[int], None] | None = None
    progress: Callable[[int], None] | None = None
    stop: threading.Event | None = None
    log: Callable[[str], None] | None = None


def run_pipeline(
    pipeline: Pipeline, *, only: tuple[str, ...] = (), run: Mapping[str, object] | None = None, watch: Watch | None = None
) -> tuple[list[Step], list[str]]:
    """Do the steps that are not done: (each step and what came of it, notes). The same call again, after any interruption, goes on.

    `only` names steps (targets, `download`, `verify`); `run` are fields of `glmconv.Options` that change no byte.
    Raises one of `glmconv.errors`; what is finished stays.
    """
    watch, targets, notes = watch or Watch(), wanted(pipeline, only), list[str]()
    steps = [step for step in [download(pipeline) if not only or "download" in only else None] if step]
    for reading in readings(pipeline, targets):
        done = convert(
            reading.source, [target.spec for target in reading.targets], options=options_of(reading, run or {}), started=watch.started,
            progress=watch.progress, stop=watch.stop, log=watch.log,
        )  # fmt: skip
        notes += done.notes
        steps += converted(reading, done)
    if this_rank() == 0 and (targets or not only or "verify" in only):
        steps += verified(pipeline, targets or finished(pipeline), run or {}, watch)
    return steps, list(dict.fromkeys(notes))


def converted(reading: Reading, done: Converted) -> Iterator[Step]:
    for target, outcome in zip(reading.targets, done.outcomes, strict=True):
        state = DONE if outcome.already_done else "converted"
        found = {"files_written": outcome.files_written, "files_kept": outcome.files_kept, "plan_id": outcome.target.plan.id}
        yield Step(target.name, f"convert to {outcome.target.plan.to}", reading.source, str(target.path), state, outcome.target.plan.size, 0, found)


def finished(pipeline: Pipeline) -> tuple[PipelineTarget, ...]:
    """The targets that are there to be verified. SourceError if none is."""
    found = tuple(target for target in pipeline.targets if (output_folder(target.path) / MANIFEST).exists())
    if not found and pipeline.targets:
        raise SourceError("there is nothing to verify: no target is finished.", hint="Run the pipeline first.")
    return found


def verified(pipeline: Pipeline, targets: Sequence[PipelineTarget], run: Mapping[str, object], watch: Watch) -> Iterator[Step]:
    """Check every output as the pipeline says; nothing remembers that it was done, so it is each time. VerificationError names the first fault."""
    for target in targets:
        for how in pipeline.verify:
            source = target.source or pipeline.source
            found = against_manifest(target, watch) if how == "manifest" else against_source(target, source, how, run, watch)
            if found is not None:
                yield Step("verify", f"verify {target.name}: {how}", source, str(target.path), "as it should be", found=found)


def against_manifest(target: PipelineTarget, watch: Watch) -> Mapping[str, object]:
    check = verify_output(target.path, started=watch.started, progress=watch.progress, stop=watch.stop)
    if not check.same:
        first = check.damages[0]
        raise VerificationError(f"{first.file}: {first.what}.", file=target.path, tensor=first.tensor or None, hint="Do not use this output.")
    return {"files": check.files, "tensors": check.tensors, "bytes": check.bytes}


def against_source(target: PipelineTarget, source: str, how: str, run: Mapping[str, object], watch: Watch) -> Mapping[str, object] | None:
    """Tensors read back and compared with the source; None for an output that glmconv cannot read."""
    if not target.spec.readable:
        return None
    options = Options(**target.options)  # type: ignore[arg-type]
    workers = run.get("workers")
    return read_back(
        source, [target.path], sample=how == "sample", mtp=options.mtp, origin=options.origin, workers=workers if isinstance(workers, int) else 2,
        dialect=options.source_dialect, mtp_from=options.mtp_from, mmproj=options.mmproj, lora=options.lora, started=watch.started,
        progress=watch.progress, stop=watch.stop,
    )  # fmt: skip
