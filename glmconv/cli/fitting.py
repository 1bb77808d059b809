"""What `glmconv plan` says of GPUs and of time."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from glmconv.cli.output import Output, human, table
from glmconv.errors import UsageError

if TYPE_CHECKING:
    from glmconv.convert import Options
    from glmconv.fleet.serving import ServingPlan
    from glmconv.fleet.times import Expected


def plan_model(out: Output, model: str, to: tuple[str, ...], options: Options, gpu_memory: int | None) -> int:
    """`plan --model PRESET`: a release by its published config, without any weights."""
    from glmconv.fleet.serving import preset_serving_plan

    if gpu_memory is None:
        raise UsageError("--model says what fits into GPUs.", hint="Pass --gpu-memory 80GB too, or a checkpoint as SRC.")
    found = preset_serving_plan(model, gpu_memory, to, options=options)
    if out.json:
        out.json_data({"serving": asdict(found)})
    else:
        show_serving(out, found)
    return 0


def show_serving(out: Output, found: ServingPlan) -> None:
    """A line for each target and size."""
    rows = []
    for fit in found.fits:
        room = ("-", "-", f"no: {fit.problem}") if fit.problem else (human(fit.left), f"{fit.tokens:,}", "yes")
        rows.append((fit.target, str(fit.tp), str(fit.ep), str(fit.gpus), human(fit.weights), *room))
    out.data(f"{found.model} on GPUs of {human(found.gpu_memory)}" + (f", context up to {found.context:,} tokens" if found.context else ""))
    out.data(table(rows, ("target", "TP", "EP", "GPUs", "weights/GPU", "left/GPU", "tokens", "fits")))
    for note in found.notes:
        out.note(f"note: {note}")


def show_time(out: Output, found: Expected | None) -> None:
    from glmconv.fleet.times import in_words

    if found is not None:
        parts = [
            f"{name} {in_words(seconds)}" for name, seconds in (("storage", found.storage), ("a node's link", found.link)) if seconds is not None
        ]
        out.data(f"expected time: {in_words(found.seconds)} at the least ({', '.join(parts)})")
