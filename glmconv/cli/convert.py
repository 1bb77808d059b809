"""`glmconv convert`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from glmconv.cli.options import output_of, output_options, run_options
from glmconv.cli.output import Output, human
from glmconv.cli.plan import show_plan

if TYPE_CHECKING:
    from glmconv.engine.run import Outcome

EPILOG = """\b
Examples:
  glmconv convert zai-org/GLM-4.5 /models/glm45 --to torch_dist
  glmconv convert /models/glm45 /models/glm45-hf --to hf
  glmconv convert /models/glm45 /models/glm45-fp8 --to fp8
  glmconv convert SRC --to torch_dist=DIR --to fp8:ue8m0=DIR2
  glmconv convert /models/glm45 GLM-4.5-Q4_K_M.gguf --to gguf:Q4_K_M --imatrix imatrix.gguf --split-max-size 48GB
  glmconv convert /models/glm45 'GLM-{preset}-{type}.gguf' --to gguf:Q8_0 --to gguf:Q4_K_M
  torchrun --nnodes 2 --nproc-per-node 8 ... -m glmconv convert SRC DST --to torch_dist
"""


@click.command("convert", epilog=EPILOG)
@click.argument("src")
@click.argument("dst", required=False, type=click.Path(path_type=Path))
@click.option("--to", multiple=True, metavar="TARGET[=DIR]", help="What to write; several may be given, each with its folder.")
@run_options
@click.option("--verify", "check", type=click.Choice(["none", "sample", "full"]), default="sample", show_default=True, help="Read back and compare.")
@click.option("-n", "--dry-run", is_flag=True, help="Plan only: say what would be written, write nothing.")
@output_options
@click.pass_context
def command(ctx: click.Context, /, src: str, dst: Path | None, to: tuple[str, ...], check: str, dry_run: bool, **chosen: object) -> int:
    """Convert the checkpoint SRC (a folder or a Hub id) into DST.

    \b
    Targets:
      hf                                        Hugging Face safetensors, unquantized
      torch_dist                                Megatron-Core's distributed checkpoint
      fp8[:ue8m0|:cuda-compat|:channel|:tensor] FP8 E4M3: 128x128 blocks (:64x64 for others), rows or tensors
      mxfp8                                     FP8 in groups of 32 under powers of two
      awq[:g128|:g64|:g32|:auto]                4 bits, AutoAWQ's gemm layout
      int4[:g128|:g64|:g32|:auto][:sym|:asym]   4 bits, compressed-tensors' pack-quantized
      gguf:Q4_K_M (or any file type)            llama.cpp's file: DST or =FILE ends in .gguf

    The same command again, after any interruption, goes on where it stopped and gives the same bytes.
    """
    from glmconv.cli.sessions import downloaded, stoppable
    from glmconv.convert import convert, options_of
    from glmconv.engine.queue import this_rank
    from glmconv.targets import parse_targets

    out = output_of(ctx)
    options = options_of(chosen)
    if dry_run:
        return show_plan(ctx, src, dst, to, options, 1)
    targets = parse_targets(to, dst)
    downloaded(src, *(str(base) for base in [chosen.get("mtp_from"), chosen.get("lora")] if base))
    with stoppable() as stop, out.bar("convert") as (started, progress):
        done = convert(src, targets, options=options, started=started, progress=progress, stop=stop, log=out.detail)
    out.detail(f"{done.workers} workers, {done.tensors:,} tensors of {src}")
    for note in done.notes:
        out.note(f"note: {note}")
    if this_rank() != 0:
        return 0  # rank 0 speaks for all
    readable = [written(made) for target, made in zip(done.targets, done.outcomes, strict=True) if target.readable and not options.mtp_only]
    verified = _verify(out, src, readable, check, done.workers, chosen)
    if out.json:
        out.json_data(_summary(done, verified))
    else:
        _print(out, src, done, verified)
    return 0


def _verify(out: Output, src: str, paths: list[Path], check: str, workers: int, chosen: dict[str, object]) -> dict[str, object]:
    """Read the outputs back. VerificationError if a bit differs."""
    from glmconv.check.read_back import read_back
    from glmconv.cli.sessions import stoppable

    if check == "none" or not paths:
        return {"verify": "none"}
    with stoppable() as stop, out.bar("verify") as (started, progress):
        origin, base, tower, lora = (str(chosen[name]) if chosen.get(name) else None for name in ("origin", "mtp_from", "mmproj", "lora"))
        counts = read_back(
            src, paths, sample=check == "sample", mtp=chosen.get("mtp") != "drop", origin=origin, workers=workers,
            dialect=str(chosen.get("source_dialect")), mtp_from=base, mmproj=tower, lora=lora,
            strict=not chosen.get("not_strict"), started=started, progress=progress, stop=stop,
        )  # fmt: skip
    return {"verify": check, "verified": counts}


def _summary(done: object, verified: dict[str, object]) -> dict[str, object]:
    from glmconv.convert import Converted

    assert isinstance(done, Converted)
    targets = [
        {
            "to": o.target.plan.to,
            "path": str(written(o)),
            "plan_id": o.target.plan.id,
            "bytes": o.target.plan.size,
            "files_written": o.files_written,
            "files_kept": o.files_kept,
            "bytes_written": o.bytes_written,
            "already_done": o.already_done,
            "manifest": str(o.manifest),
            "moved_aside": str(o.moved_aside) if o.moved_aside else None,
        }
        for o in done.outcomes
    ]
    return {"source": dict(done.source), "tensors": done.tensors, "dropped": done.dropped, "targets": targets, "notes": done.notes, **verified}


def written(outcome: Outcome) -> Path:
    """What a loader is given: the folder, or the file, of several the first."""
    return (*outcome.target.outside, outcome.target.root)[0]


def _print(out: Output, src: str, done: object, verified: dict[str, object]) -> None:
    from glmconv.convert import Converted

    assert isinstance(done, Converted)
    for outcome in done.outcomes:
        plan = outcome.target.plan
        if outcome.moved_aside:
            out.data(f"what was there is now {outcome.moved_aside}")
        if outcome.already_done:
            out.data(f"{written(outcome)}: already done ({plan.to}, {human(plan.size)}); nothing was written")
            continue
        kept = f", {outcome.files_kept} of them kept from before" if outcome.files_kept else ""
        files = len(plan.files) + len(plan.marks)
        count = f"{files} {'file' if files == 1 else 'files'}{kept}"
        out.data(f"{written(outcome)}: {plan.to}, {done.tensors:,} tensors, {count}, {human(plan.size)}")
    if done.dropped:
        out.data(f"{done.dropped:,} MTP tensors left out (--mtp drop)")
    counts = verified.get("verified")
    if isinstance(counts, dict) and counts["tensors"]:
        exact = counts["tensors"] - counts["quantized"]
        lost = f"{counts['quantized']:,} are quantized with a relative RMSE of at most {counts['rmse']:.4g}, " if counts["quantized"] else ""
        out.data(f"read back: {lost}{exact:,} tensors are bit-identical")
    first = done.outcomes[0]
    if first.target.outside:
        ran = "llama-mtmd-cli -m MODEL.gguf --mmproj" if first.target.plan.to.startswith("gguf:mmproj") else "llama-cli -m"
        out.note(f"next: glmconv verify {src} {written(first)} --exact   or   {ran} {written(first)}")
        return
    other = "hf" if first.target.plan.to == "torch_dist" else "torch_dist"
    out.note(f"next: glmconv verify {src} {first.target.root}   or   glmconv convert {first.target.root} DST --to {other}")
