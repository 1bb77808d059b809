"""`glmconv verify`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import imatrix_option, output_of, output_options, reading_options
from glmconv.cli.output import Output, human, say
from glmconv.errors import ExitCode, UsageError, printable

if TYPE_CHECKING:
    from glmconv.check.verify import ManifestCheck
    from glmconv.cli.sessions import Stop
    from glmconv.convert import Options

SHOWN = 20
EPILOG = """\b
Examples:
  glmconv verify zai-org/GLM-4.5 /models/glm45_torch_dist     # the same weights?
  glmconv verify /models/glm45_torch_dist                     # every byte as its manifest says?
  glmconv verify /models/glm45 /models/glm45_fp8              # quantized: errors within their bounds?
  glmconv verify /models/glm45 /models/glm45_fp8 --exact      # quantized again from the source: every byte?
"""


@click.command("verify", epilog=EPILOG)
@click.argument("a")
@click.argument("b", required=False)
@click.option("-j", "--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads that read.")
@click.option("--origin", metavar="DIR|ID", help="The Hugging Face release of a torch_dist checkpoint.")
@click.option("--mtp", type=click.Choice(["keep", "drop"]), default="keep", show_default=True, help="drop: leave the MTP layers of both out.")
@reading_options[0]
@reading_options[1]
@reading_options[2]
@reading_options[3]
@click.option("--max-rmse", type=click.FloatRange(min=0, min_open=True), help="Bound on a quantized tensor's relative RMSE; default: its codec's.")
@click.option("--exact", is_flag=True, help="Convert A again without writing and compare every byte with B, an output of glmconv.")
@imatrix_option
@output_options
@click.pass_context
def command(
    ctx: click.Context, a: str, b: str | None, workers: int, origin: str | None, mtp: str, source_dialect: str, mtp_from: str | None,
    mmproj: str | None, lora: str | None, max_rmse: float | None, exact: bool, imatrix: str | None,
) -> int:  # fmt: skip
    """Compare checkpoints A and B bit by bit, whatever their formats; or A alone with its own manifest, every byte.

    Exit 1 if anything differs: a bit, a tensor that only one has, a shape, a dtype. Give the source first: what B holds quantized is
    held against a bound on its error, everything else must be equal.
    """
    from glmconv.check.verify import verify_output, verify_same
    from glmconv.cli.sessions import downloaded, stoppable
    from glmconv.convert import Options

    out = output_of(ctx)
    if exact and b is None:
        raise UsageError("--exact needs the source too: glmconv verify SRC OUT --exact.")
    if imatrix is not None and not exact:
        raise UsageError("--imatrix goes with --exact: it is what B was made with.")
    downloaded(a, b)
    with stoppable() as stop, out.bar("verify") as (started, progress):
        if b is None or exact:
            options = Options(origin=origin, mtp=mtp != "drop", source_dialect=source_dialect, mtp_from=mtp_from, mmproj=mmproj, lora=lora)
            check = (
                _exact(options, a, b, workers, started, progress, stop, imatrix)
                if b
                else verify_output(a, workers=workers, started=started, progress=progress, stop=stop)
            )
            counts = f"{check.files:,} files, {check.tensors:,} tensors, {human(check.bytes)}"
            lines = [": ".join(filter(None, (d.file, d.tensor, d.what))) for d in check.damages]
            good = "as its manifest says" if b is None else "byte for byte what its source gives"
            return _answer(out, {**asdict(check), "same": check.same}, check.same, f"{check.root}: {good} ({counts})", lines)
        result = verify_same(
            a, b, workers=workers, origin=origin, mtp=mtp != "drop", started=started, progress=progress, stop=stop, max_rmse=max_rmse,
            dialect=source_dialect, mtp_from=mtp_from, mmproj=mmproj, lora=lora,
        )  # fmt: skip
    value = {"same": result.same, "tensors": result.tensors, "elements": result.elements, "bytes": result.bytes, "aliases": result.aliases,
             "apart": result.apart,
             "different": len(result.differences), "worst": [asdict(d) for d in result.worst],
             "quantized": [{**asdict(loss), "sqnr": loss.sqnr} for loss in result.losses]}  # fmt: skip
    lines = [f"{d.tensor}: {d.what}" + (f", by up to {d.worst:g}" if d.elements else "") for d in result.worst]
    counts = f"{result.tensors:,} tensors, {result.elements:,} elements, {human(result.bytes)}"
    if result.apart:
        out.note(f"note: the {result.apart:,} tensors of the vision tower were not compared: they lie in an mmproj file (--mmproj)")
    if not result.losses:
        return _answer(out, value, result.same, f"the same weights: {counts} bit-identical", lines)
    worst = max(result.losses, key=lambda loss: loss.rmse)
    lost = f"{len(result.losses):,} tensors quantized, relative RMSE at most {worst.rmse:.4g} ({worst.sqnr:.1f} dB, {worst.tensor})"
    return _answer(out, value, result.same, f"the same weights but for quantization: {counts}; {lost}; all others bit-identical", lines)


def _exact(
    options: Options, src: str, output: str, workers: int, started: Callable[[int], None], progress: Callable[[int], None], stop: Stop,
    imatrix: str | None,
) -> ManifestCheck:  # fmt: skip
    from glmconv.check.exact import verify_exact
    from glmconv.convert import plan_again

    with options.open(src) as source:
        return verify_exact(
            source, output, lambda manifest: plan_again(source, manifest.to, manifest.options, imatrix=imatrix), workers=workers, started=started,
            progress=progress, stop=stop,
        )  # fmt: skip


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
