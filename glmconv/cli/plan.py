"""`glmconv plan`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import RUN_OPTIONS, Bytes, output_of, output_options, run_options, spelled
from glmconv.cli.output import Output, human, table
from glmconv.errors import UsageError

if TYPE_CHECKING:
    from glmconv.convert import Options

MOST_RANKS = 1_000_000
EPILOG = """\b
Examples:
  glmconv plan zai-org/GLM-4.5 --to torch_dist --nodes 2 --ranks-per-node 8
  glmconv plan SRC --to torch_dist --nodes 4 --disk-rate 10GB --network-rate 3GB
  glmconv plan SRC --to torch_dist --json
  glmconv plan SRC --to awq --serve-tp 4 --gpu-memory 48GB
  glmconv plan --model glm4.6-355B-A32B --gpu-memory 80GB
"""


@click.command("plan", epilog=EPILOG)
@click.argument("src", required=False)
@click.argument("dst", required=False, type=click.Path(path_type=Path))
@click.option("--to", multiple=True, metavar="TARGET[=DIR]", help="What would be written; several may be given.")
@click.option("--nodes", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Balance over this many nodes.")
@click.option("--ranks-per-node", type=click.IntRange(1, 1024), default=1, show_default=True, help="Ranks on each node.")
@click.option("--disk-rate", type=Bytes(), help="Bytes a second of the storage that all nodes share: says how long it will take.")
@click.option("--network-rate", type=Bytes(), help="Bytes a second of one node's link to it, each way.")
@click.option("--gpu-memory", type=Bytes(), help="Memory of one GPU: says what of the model fits, by target and parallel size.")
@click.option("--model", metavar="PRESET", help="Instead of SRC, with --gpu-memory: a released model, by its published config.")
@run_options
@output_options
@click.pass_context
def command(
    ctx: click.Context, /, src: str | None, dst: Path | None, to: tuple[str, ...], nodes: int, ranks_per_node: int, disk_rate: int | None,
    network_rate: int | None, gpu_memory: int | None, model: str | None, **chosen: object,
) -> int:  # fmt: skip
    """Say what converting SRC would read, write and need, how long it takes and which GPUs it fits. Nothing is written."""
    from glmconv.cli.fitting import plan_model
    from glmconv.convert import options_of

    if (src is None) == (model is None):
        raise UsageError("give a checkpoint, or --model PRESET.", hint="`glmconv models` lists the presets.")
    if model is not None:
        return plan_model(output_of(ctx), model, to, options_of(chosen), gpu_memory)
    assert src is not None
    if nodes * ranks_per_node > MOST_RANKS:
        raise UsageError(f"{nodes * ranks_per_node:,} ranks are more than {MOST_RANKS:,}.")
    fleet = Fleet(nodes, ranks_per_node, disk_rate, network_rate, gpu_memory)
    return show_plan(ctx, src, dst, to, options_of(chosen), nodes * ranks_per_node, fleet)


@dataclass(frozen=True)
class Fleet:
    """The machines that a plan is for: nodes and ranks, rates in bytes a second, a GPU's memory in bytes."""

    nodes: int = 1
    ranks_per_node: int = 1
    disk_rate: int | None = None
    network_rate: int | None = None
    gpu_memory: int | None = None


def show_plan(
    ctx: click.Context, src: str, dst: Path | None, to: tuple[str, ...], options: Options, ranks: int, fleet: Fleet | None = None
) -> int:  # fmt: skip
    from glmconv.cli.fitting import show_serving, show_time
    from glmconv.convert import plan
    from glmconv.fleet.serving import serving_plan
    from glmconv.fleet.times import expected_time

    out, fleet = output_of(ctx), fleet or Fleet()
    serving = serving_plan(src, fleet.gpu_memory, to, options=options) if fleet.gpu_memory else None
    if serving and not to and dst is None:  # nothing is to be converted: what of it could be served is the question
        if out.json:
            out.json_data({"serving": asdict(serving)})
        else:
            show_serving(out, serving)
        return 0
    summary = plan(src, to, dst, options=options, ranks=ranks)
    time = expected_time(summary, fleet.ranks_per_node, disk_rate=fleet.disk_rate, network_rate=fleet.network_rate)
    if out.json:
        out.json_data({**asdict(summary), "time": asdict(time) if time else None, "serving": asdict(serving) if serving else None})
        return 0
    rows = [(str(t["to"]), str(t["path"] or "-"), f"{t['files']:,}", human(int(str(t["bytes"]))), f"{t['tensor_count']:,}") for t in summary.targets]
    out.data(table(rows, ("to", "path", "files", "bytes", "tensors")))
    for target in summary.targets:
        if isinstance(target["tensors"], list):
            show_types(out, str(target["to"]), target["tensors"], float(str(target["bits_per_weight"])))
    moved = f"read {human(summary.bytes_read)}, write {human(summary.bytes_written)} in {summary.jobs:,} jobs"
    out.data(f"{moved}; disk needed {human(summary.disk_needed)}, peak memory {human(summary.peak_memory)} a rank")
    if len(summary.ranks) > 1:
        loads = [rank["bytes"] for rank in summary.ranks]
        mean = sum(loads) / len(loads)
        out.data(
            f"{len(loads)} ranks: {human(min(loads))} to {human(max(loads))} each, the fullest {max(loads) / mean * 100 - 100:.1f} % above the mean"
        )
    show_time(out, time)
    if serving:
        show_serving(out, serving)
    for note in summary.notes:
        out.note(f"note: {note}")
    words = [src, *([str(dst)] if dst else [] if all("=" in text for text in to) else ["DST"]), *spelled(ctx, RUN_OPTIONS)]
    out.note(f"next: glmconv convert {shlex.join(words)}")
    return 0


def show_types(out: Output, to: str, tensors: Sequence[Mapping[str, object]], bits: float) -> None:
    """The types of a GGUF target's tensors: how many of each, how many bytes, why; with -v each tensor's."""
    groups: dict[tuple[str, str], list[int]] = {}
    for tensor in tensors:
        groups.setdefault((str(tensor["type"]), str(tensor["why"])), []).append(int(str(tensor["bytes"])))
    largest_first = sorted(groups.items(), key=lambda item: (-sum(item[1]), item[0]))
    out.data(f"{to}: {bits:.2f} bits per weight")
    out.data(table([(kind, f"{len(sizes):,}", human(sum(sizes)), why) for (kind, why), sizes in largest_first], ("type", "tensors", "bytes", "why")))
    if out.verbose:
        rows = [(str(t["name"]), str(t["type"]), str(t["shape"]), human(int(str(t["bytes"]))), str(t["why"])) for t in tensors]
        out.data(table(rows, ("tensor", "type", "shape", "bytes", "why")))
