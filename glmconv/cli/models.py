"""`glmconv models`."""

from __future__ import annotations

import click

from glmconv.cli.options import output_of, output_options
from glmconv.cli.output import human, table


@click.group("models", invoke_without_command=True)
@click.pass_context
def command(ctx: click.Context) -> None:
    """List the presets, or show an architecture's table."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_presets)


@command.command("list")
@output_options
@click.pass_context
def list_presets(ctx: click.Context) -> None:
    """Every preset: tensors, parameters, size in bfloat16."""
    from glmconv.archs import bind, presets

    rows, values = [], []
    for spec, preset in presets():
        model = bind(spec, preset.config, aliases=preset.aliases)
        tensors = model.tensors.values()
        parameters = sum(t.elements for t in tensors if not t.alias)
        size = sum(t.elements * (4 if t.dtype == "float32" else 2) for t in tensors)
        mtp = sum(t.mtp for t in tensors)
        values.append({"preset": preset.name, "hub": preset.hub, "model_type": spec.model_type, "tensors": len(tensors), "mtp_tensors": mtp,
                       "parameters": parameters, "bytes": size})  # fmt: skip
        rows.append((preset.name, preset.hub, spec.model_type, f"{len(tensors):,}", f"{mtp:,}", f"{parameters / 1e9:.1f} B", human(size)))
    out = output_of(ctx)
    if out.json:
        out.json_data(values)
    else:
        out.data(table(rows, ("preset", "hub", "architecture", "tensors", "MTP", "parameters", "bf16")))


@command.command("show")
@click.argument("arch")
@output_options
@click.pass_context
def show(ctx: click.Context, arch: str) -> None:
    """The table of ARCH (a model_type, or a preset for its numbers): each family of tensors, its shape, its place in Megatron and GGUF."""
    from glmconv.archs.table import spec_table, table_values

    out = output_of(ctx)
    if out.json:
        out.json_data(table_values(arch))
    else:
        out.data(spec_table(arch, table))
