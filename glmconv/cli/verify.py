"""`glmconv verify`."""

from __future__ import annotations

from dataclasses import asdict

import click

from glmconv.cli.options import output_of, output_options
from glmconv.cli.output import Output, human, say
from glmconv.errors import ExitCode, printable

SHOWN = 20
EPILOG = """\b
Examples:
  glmconv verify zai-org/GLM-4.5 /models/glm45_torch_dist     # the same weights?
  glmconv verify /models/glm45_torch_dist                     # every byte as its manifest says?
"""


@click.command("verify", epilog=EPILOG)
@click.argument("a")
@click.argument("b", required=False)
@click.option("-j", "--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads that read.")
@click.option("--origin", metavar="DIR|ID", help="The Hugging Face release of a torch_dist checkpoint.")
@click.option("--mtp", type=click.Choice(["keep", "drop"]), default="keep", show_default=True, help="drop: leave the MTP layers of both out.")
@output_options
@click.pass_context
def command(ctx: click.Context, a: str, b: str | None, workers: int, origin: str | None, mtp: str) -> int:
    """Compare checkpoints A and B bit by bit, whatever their formats; or A alone with its own manifest, every byte.

    Exit 1 if anything differs: a bit, a tensor that only one has, a shape, a dtype.
    """
    from glmconv.check.verify import verify_output, verify_same
    from glmconv.cli.sessions import stoppable

    out = output_of(ctx)
    with stoppable() as stop, out.bar("verify") as (started, progress):
        if b is None:
            check = verify_output(a, workers=workers, started=started, progress=progress, stop=stop)
            counts = f"{check.files:,} files, {check.tensors:,} tensors, {human(check.bytes)}"
            lines = [": ".join(filter(None, (d.file, d.tensor, d.what))) for d in check.damages]
            return _answer(out, {**asdict(check), "same": check.same}, check.same, f"{check.root}: as its manifest says ({counts})", lines)
        result = verify_same(a, b, workers=workers, origin=origin, mtp=mtp != "drop", started=started, progress=progress, stop=stop)
    value = {"same": result.same, "tensors": result.tensors, "elements": result.elements, "bytes": result.bytes, "aliases": result.aliases,
             "different": len(result.differences), "worst": [asdict(d) for d in result.worst]}  # fmt: skip
    lines = [f"{d.tensor}: {d.what}" + (f", by up to {d.worst:g}" if d.elements else "") for d in result.worst]
    counts = f"{result.tensors:,} tensors, {result.elements:,} elements, {human(result.bytes)}"
    return _answer(out, value, result.same, f"the same weights: {counts} bit-identical", lines)


def _answer(out: Output, value: dict[str, object], same: bool, good: str, lines: list[str]) -> int:
    if out.json:
        out.json_data(value)
    elif same:
        out.data(good)
    else:
        out.data(f"different: {len(lines):,} {'finding' if len(lines) == 1 else 'findings'}, the worst first")
        for line in lines[:SHOWN]:
            out.data(f"  {printable(line)}")
        if len(lines) > SHOWN:
            out.data(f"  and {len(lines) - SHOWN:,} more; --json lists all")
    if not same and out.json and not lines:
        say("error: nothing was compared")
    return int(ExitCode.OK if same else ExitCode.DIFFERENT)
