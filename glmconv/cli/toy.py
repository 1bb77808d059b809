"""`glmconv toy`."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import click

from glmconv.cli.options import Bytes, Ratio, output_of, output_options
from glmconv.cli.output import human

EPILOG = """\b
Examples:
  glmconv toy glm4.5-355B-A32B -o toy
  glmconv toy glm4.6-355B-A32B -o toy --layers 5 --experts 16 --scale 1/16 --seed 1
  glmconv toy glm4.5-355B-A32B -o wide --layers 2 --experts 160 --scale 1 --mtp drop     # true widths, 11 GB
"""


@click.command("toy", epilog=EPILOG)
@click.argument("preset")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The folder to write.")
@click.option("--layers", type=click.IntRange(1, 1024), default=5, show_default=True, help="Decoder layers, MTP not counted.")
@click.option("--experts", type=click.IntRange(2, 4096), default=16, show_default=True, help="Routed experts of each MoE layer.")
@click.option("--scale", type=Ratio(), default="1/16", show_default=True, help="Factor of every width.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, help="Another seed, other weights.")
@click.option("--mtp", type=click.Choice(["keep", "drop"]), default="keep", show_default=True, help="drop: no multi-token prediction layer.")
@click.option("--shard-size", "file_size", type=Bytes(), help="Bytes per file. Default: 5GB.")
@click.option("-j", "--workers", type=click.IntRange(1, 256), default=2, show_default=True, help="Threads that write files.")
@click.option("--overwrite", is_flag=True, help="Move what is there aside (DIR.bak-N).")
@output_options
@click.pass_context
def command(
    ctx: click.Context, preset: str, output: Path, layers: int, experts: int, scale: Fraction, seed: int, mtp: str, file_size: int | None,
    workers: int, overwrite: bool,
) -> int:  # fmt: skip
    """Make a small checkpoint of PRESET in Hugging Face layout: every kind of tensor, random weights, a working tokenizer."""
    from glmconv.cli.sessions import stoppable
    from glmconv.toy.build import ToyOptions, build

    out = output_of(ctx)
    options = ToyOptions(layers, experts, scale, seed, mtp == "keep", file_size)
    with stoppable() as stop, out.bar("toy") as (started, progress):
        outcome = build(preset, output, options, workers=workers, overwrite=overwrite, started=started, progress=progress, stop=stop)
    plan = outcome.target.plan
    tensors = sum(piece.digested for file in plan.files for piece in file.pieces)
    if out.json:
        out.json_data({"path": str(output), "preset": preset, "tensors": tensors, "bytes": plan.size, "files": len(plan.files) + len(plan.marks)})
    else:
        out.data(f"{output}: {tensors:,} tensors, {len(plan.files) + len(plan.marks)} files, {human(plan.size)}")
    if outcome.moved_aside:
        out.note(f"what was there is now {outcome.moved_aside}")
    out.note(f"next: glmconv convert {output} DST --to torch_dist")
    return 0
