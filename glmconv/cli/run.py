"""`glmconv run`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import Bytes, output_of, output_options
from glmconv.cli.output import Output, human, table
from glmconv.errors import printable

if TYPE_CHECKING:
    from glmconv.fleet.steps import Step

EPILOG = """\b
Examples:
  glmconv run pipeline.yaml --dry-run
  glmconv run pipeline.yaml --set BASE_DIR=/data --only fp8
  torchrun --nnodes 2 --nproc-per-node 8 ... -m glmconv run pipeline.yaml
  glmconv run pipeline.yaml --emit-sbatch --nodes 4 --ranks-per-node 8 > job.sh; sbatch job.sh
\b
A pipeline:
  source: ${BASE_DIR}/GLM-4.5
  download: zai-org/GLM-4.5
  targets:
    torch_dist: ${BASE_DIR}/GLM-4.5_torch_dist
    fp8:
      path: ${BASE_DIR}/GLM-4.5-FP8
      options: {serve-tp: 8}
"""


@click.command("run", epilog=EPILOG)
@click.argument("pipeline", type=click.Path(path_type=Path))
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="A variable of the pipeline; goes before the environment.")
@click.option("--only", multiple=True, metavar="STEP", help="A target's name, download or verify; several may be given.")
@click.option("-n", "--dry-run", is_flag=True, help="Show the steps, what is done and what would be written; write nothing.")
@click.option("--emit-sbatch", is_flag=True, help="Print a batch script for SLURM that runs the pipeline; run nothing.")
@click.option("--nodes", type=click.IntRange(1, 100_000), default=1, show_default=True, help="--emit-sbatch: nodes.")
@click.option("--ranks-per-node", type=click.IntRange(1, 1024), default=1, show_default=True, help="--emit-sbatch: ranks on each.")
@click.option("-j", "--workers", type=click.IntRange(1, 256), help="Threads that write files. Default: the cores of this rank, at most 8.")
@click.option("--max-memory", type=Bytes(), help="Resident memory not to exceed.")
@click.option("--resume-check", type=click.Choice(["full", "sampled"]), default="full", show_default=True, help="How finished files are checked.")
@click.option("--overwrite", is_flag=True, help="Move what is in a target's place aside (NAME.bak-N). Deletes nothing.")
@output_options
@click.pass_context
def command(
    ctx: click.Context, /, pipeline: Path, settings: tuple[str, ...], only: tuple[str, ...], dry_run: bool, emit_sbatch: bool, nodes: int,
    ranks_per_node: int, **run: object,
) -> int:  # fmt: skip
    """Carry out PIPELINE, a YAML file: download, convert into every target, verify.

    Targets of one source are made in one reading. The same command again, after any interruption, goes on where it stopped: what a manifest says is
    done is left alone.
    """
    from glmconv.cli.pipelines import load_pipeline, settings_of
    from glmconv.cli.sessions import downloaded, stoppable
    from glmconv.engine.queue import this_rank
    from glmconv.fleet.steps import Watch, download, run_pipeline, survey

    out, given = output_of(ctx), settings_of(settings)
    found = load_pipeline(pipeline, given)
    found.chosen(only)
    if emit_sbatch:
        out.data(script(pipeline, given, only, nodes, ranks_per_node, run).rstrip("\n"))
        return 0
    if dry_run:
        show(out, survey(found, only, run))
        return 0
    if found.download and (not only or "download" in only):
        download(found)  # before signals are ours: it ends at the first Ctrl-C, and goes on by itself
    elif not found.download:
        downloaded(*found.sources_elsewhere())
    with stoppable() as stop, out.bar("run") as (started, progress):
        steps, notes = run_pipeline(found, only=only, run=run, watch=Watch(started, progress, stop, out.detail))
    for note in notes:
        out.note(f"note: {note}")
    if this_rank() == 0:
        show(out, steps)
    return 0


def script(pipeline: Path, settings: dict[str, str], only: Sequence[str], nodes: int, ranks: int, run: dict[str, object]) -> str:
    """The batch script; the options of this command line are in it."""
    from glmconv.fleet.sbatch import Batch, sbatch

    words = [sys.executable, "-m", "glmconv", "run", str(pipeline.absolute()), *(word for name in only for word in ("--only", name))]
    for name in ("workers", "max_memory"):
        words += [f"--{name.replace('_', '-')}", str(run[name])] if run[name] else []
    words += ["--resume-check", "sampled"] if run["resume_check"] == "sampled" else []
    words += ["--overwrite"] if run["overwrite"] else []
    return sbatch(pipeline, Batch(nodes, ranks, words, tuple(settings.items())))


def show(out: Output, steps: Sequence[Step]) -> None:
    if out.json:
        out.json_data({"steps": [asdict(step) for step in steps]})
        return
    rows = [(step.step, printable(step.action), printable(step.path, 200), step.state, size(step.bytes), size(step.left)) for step in steps]
    out.data(table(rows, ("step", "what", "where", "state", "bytes", "to write")))


def size(count: int | None) -> str:
    return "-" if count is None else human(count)
