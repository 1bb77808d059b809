"""`glmconv doctor`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import output_of, output_options
from glmconv.cli.output import Output, human, say, table
from glmconv.errors import ExitCode, printable

if TYPE_CHECKING:
    from glmconv.fleet.doctor import Diagnosis

EPILOG = """\b
Examples:
  glmconv doctor
  glmconv doctor /shared/models
  torchrun --nnodes 2 --nproc-per-node 8 ... -m glmconv doctor /shared/models
"""


@click.command("doctor", epilog=EPILOG)
@click.argument("folders", nargs=-1)
@click.option("--patience", type=click.FloatRange(0, 3600), default=75, show_default=True, help="Seconds to wait for what another rank has made.")
@output_options
@click.pass_context
def command(ctx: click.Context, folders: tuple[str, ...], patience: float) -> int:
    """Look at this installation, and at what each of FOLDERS does when files are made, linked, renamed and synced there.

    Under torchrun or srun every rank looks, and rank 0 says what each saw. In each folder one small folder is made and removed again. Exit 3 if
    something that glmconv rests on does not work.
    """
    from glmconv.engine.queue import this_rank
    from glmconv.fleet.doctor import as_plain, doctor

    out = output_of(ctx)
    found = doctor(folders, patience=patience)
    if this_rank() != 0:
        return 0  # rank 0 speaks for all
    if out.json:
        out.json_data(as_plain(found))
    else:
        show(out, found)
    for line in found.problems:
        say(f"error: {printable(line, 500)}")
    for line in found.warnings:
        out.note(f"warning: {printable(line, 500)}")
    return int(ExitCode.CAPACITY if found.problems else ExitCode.OK)


def show(out: Output, found: Diagnosis) -> None:
    said, packages, limits = found.environment, found.environment["packages"], found.environment["limits"]
    names = ", ".join(f"{name} {value}" for name, value in packages.items()) if isinstance(packages, Mapping) else ""
    bounds = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in limits.items() if value) if isinstance(limits, Mapping) else ""
    rows = [(name, str(said[name])) for name in ("glmconv", "python", "system")]
    rows += [("packages", names), ("limits", bounds), ("Hub token", str(said["hub_token"] or "none")), ("Hub offline", str(said["hub_offline"]))]
    proxies = said["proxies"]
    rows += [("proxies", ", ".join(map(str, proxies)) if isinstance(proxies, list) and proxies else "none"), ("launched", str(said["launched_by"]))]
    out.data(table(rows))
    machines = [
        (str(rank["rank"]), printable(str(rank["host"])), str(rank["cores"]), size(rank["memory"]), size(rank["memory_available"]),
         f"{rank['clock_ahead_ms']} ms")
        for rank in found.ranks
    ]  # fmt: skip
    out.data("\n" + table(machines, ("rank", "host", "cores", "memory", "available", "clock ahead")))
    for folder in found.folders:
        out.data(f"\n{printable(folder.path)} ({folder.filesystem or 'filesystem unknown'})")
        looks = [
            (str(seen.rank), human(seen.free), f"{seen.fsync_ms:.1f} ms", "never" if seen.late is None else f"{seen.late:.2f} s",
             "; ".join(f"{name}: {what}" for name, what in seen.works.items() if what) or "all works")
            for seen in folder.ranks
        ]  # fmt: skip
        out.data(table(looks, ("rank", "free", "fsync", "sees others after", "create, link, rename, fsync")))


def size(count: object) -> str:
    return human(count) if isinstance(count, int) else "-"
