"""`glmconv inspect`."""

from __future__ import annotations

from dataclasses import asdict

import click

from glmconv.cli.options import output_of, output_options, reading_options
from glmconv.cli.output import human, say, table
from glmconv.errors import ExitCode, printable

SHOWN = 20


@click.command("inspect")
@click.argument("path")
@click.option("--tensors", is_flag=True, help="List every tensor: name, dtype, shape, role.")
@click.option("--origin", metavar="DIR|ID", help="The Hugging Face release of a torch_dist checkpoint.")
@reading_options[0]
@reading_options[2]
@output_options
@click.pass_context
def command(ctx: click.Context, path: str, tensors: bool, origin: str | None, source_dialect: str, mmproj: str | None) -> int:
    """Say what the checkpoint PATH is and whether it is complete; exit 5 if tensors are missing, unknown or wrong."""
    from glmconv.check.inspect import inspect

    out = output_of(ctx)
    found, source = inspect(path, origin=origin, dialect=source_dialect, mmproj=mmproj)
    with source:
        listed = [(name, tensor.dtype.name, list(tensor.shape), source.arch.tensors[name].role.value) for name, tensor in source]
    if out.json:
        value = asdict(found)
        if tensors:
            value["tensor_list"] = [{"name": n, "dtype": d, "shape": s, "role": r} for n, d, s, r in listed]
        out.json_data(value)
    else:
        facts = [
            ("path", found.path), ("format", found.format), ("architecture", found.model_type), ("preset", found.preset or "none of the releases"),
            ("layers", f"{found.layers} + {found.mtp_layers} MTP"), ("experts", str(found.experts)),
            ("tensors", f"{found.tensors:,} ({found.mtp_tensors:,} of them MTP, {found.aliases} aliases)"),
            ("parameters", f"{found.parameters:,}"), ("bytes", f"{human(found.stored_bytes or found.bytes)} in {found.files:,} files"),
            ("quantized", ", ".join(f"{label}: {count:,}" for label, count in found.quantization.items()) or "no"),
            ("dtypes", ", ".join(f"{name} {count:,}" for name, count in found.dtypes.items())),
            ("missing", f"{len(found.missing):,}"), ("unexpected", f"{len(found.unexpected):,}"), ("wrong", f"{len(found.wrong):,}"),
        ]  # fmt: skip
        out.data(table([(name, printable(value)) for name, value in facts]))
        if tensors:
            out.data(table([(n, d, str(s), r) for n, d, s, r in listed]))
        for note in found.notes:
            out.note(f"note: {printable(note)}")
    if not found.complete:
        problems = [f"{n}: is missing" for n in found.missing] + [f"{n}: is unknown to {found.model_type}" for n in found.unexpected]
        problems += [f"{n}: {what}" for n, what in found.wrong]
        for line in problems[:SHOWN]:
            say(f"error: {printable(line)}")
        if len(problems) > SHOWN:
            say(f"error: and {len(problems) - SHOWN:,} more; --json lists all")
        return int(ExitCode.SOURCE)
    return 0
