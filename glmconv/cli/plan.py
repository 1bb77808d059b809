"""`glmconv plan`."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import RUN_OPTIONS, output_of, output_options, run_options, spelled
from glmconv.cli.output import Output, human, table
from glmconv.errors import UsageError

if TYPE_CHECKING:
    from glmconv.convert import Options

MOST_RANKS = 1_000_000
EPILOG = """\b
Examples:
  glmconv plan zai-org/GLM-4.5 --to torch_dist --nodes 2 --ranks-per-node 8
  glmconv plan SRC --to torch_dist --json
"""


@click.command("plan", epilog=EPILOG)
@click.argument("src")
@click.argument("dst", required=False, type=click.Path(path_type=Path))
@click.option("--to", multiple=True, metavar="TARGET[=DIR]", help="What would be written; several may be given.")
@click.option("--nodes", type=click.IntRange(1, 100_000), default=1, show_default=True, help="Balance over this many nodes.")
@click.option("--ranks-per-node", type=click.IntRange(1, 1024), default=1, show_default=True, help="Ranks on each node.")
@run_options
@output_options
@click.pass_context
def command(ctx: click.Context, /, src: str, dst: Path | None, to: tuple[str, ...], nodes: int, ranks_per_node: int, **chosen: object) -> int:
    """Say what converting SRC would read, write and need. Nothing is written."""
    from glmconv.convert import options_of

    if nodes * ranks_per_node > MOST_RANKS:
        raise UsageError(f"{nodes * ranks_per_node:,} ranks are more than {MOST_RANKS:,}.")
    return show_plan(ctx, src, dst, to, options_of(chosen), nodes * ranks_per_node)


def show_plan(ctx: click.Context, src: str, dst: Path | None, to: tuple[str, ...], options: Options, ranks: int) -> int:
    from glmconv.convert import plan

    out = output_of(ctx)
    summary = plan(src, to, dst, options=options, ranks=ranks)
    if out.json:
        out.json_data(summary)
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
