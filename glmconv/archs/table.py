"""A spec as the table that a person reads: one row per family of tensors, with counts for every preset."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from glmconv.archs import SPECS, bind, preset_named
from glmconv.archs.spec import ArchSpec, Frames, Part, Place, Preset, Row, Scope, Split
from glmconv.errors import UsageError


def place_text(place: Place | Mapping[str, Place] | None) -> str:
    """A place in words: `name`, `name[field of the record]`."""
    if place is None:
        return "-"
    if isinstance(place, str):
        return place
    if isinstance(place, Part):
        each = f" per {place.record.per}" if place.record.per else ""
        return f"{place.record.name}[{place.field} of {', '.join(place.record.fields)}{each}]"
    if isinstance(place, Frames):
        return " + ".join(place.into)
    if isinstance(place, Split):
        return " + ".join(place_text(inner) for inner in place.into.values())
    return " | ".join(f"{dialect}: {place_text(inner)}" for dialect, inner in place.items())


def found(arch: str) -> tuple[ArchSpec, tuple[Preset, ...]]:
    """An architecture by its model_type, or by one preset of it."""
    if arch in SPECS:
        return SPECS[arch], SPECS[arch].presets
    try:
        spec, preset = preset_named(arch)
    except UsageError:
        raise UsageError(f"no architecture or preset is called {arch!r}.", hint=f"Architectures: {', '.join(SPECS)}; see `glmconv models`.") from None
    return spec, (preset,)


def table_values(arch: str) -> dict[str, object]:
    """The table as plain values."""
    spec, presets = found(arch)
    rows = [
        {"scope": scope.title, "name": scope.name + row.name, "shape": [size.text for size in row.shape], "role": row.role.value,
         "dtype": row.dtype or "model", "megatron": place_text(row.megatron), "gguf": place_text(row.gguf), "alias": row.alias or None,
         "count": {preset.name: count(spec, preset, scope, row) for preset in presets}}
        for scope in spec.scopes for row in scope.rows
    ]  # fmt: skip
    return {"model_type": spec.model_type, "title": spec.title, "config": dict(spec.config), "rows": rows}


def count(spec: ArchSpec, preset: Preset, scope: Scope, row: Row) -> int:
    """How many tensors of this row a preset has."""
    model = bind(spec, preset.config, aliases=preset.aliases)
    if not row.when(model.sizes) or (row.alias and not preset.aliases):
        return 0
    return (len(model.layers[scope.layers]) if scope.layers else 1) * (model.sizes["experts"] if "{expert}" in row.name else 1)


def spec_table(arch: str, layout: Callable[[list[tuple[str, ...]], tuple[str, ...]], str]) -> str:
    """The table as text; `layout` pads its columns."""
    spec, presets = found(arch)
    lines = [f"{spec.model_type}: {spec.title}", ""]
    head = ("tensor", "shape", "role", "Megatron", "GGUF", *(preset.name for preset in presets))
    totals = [0] * len(presets)
    for scope in spec.scopes:
        lines.append(f"{scope.title}  ({scope.name or '-'} | {scope.megatron or '-'} | {scope.gguf or '-'})")
        rows = []
        for row in scope.rows:
            counts = [count(spec, preset, scope, row) for preset in presets]
            totals = [total + n for total, n in zip(totals, counts, strict=True)]
            shape = "[" + ", ".join(size.text for size in row.shape) + "]" + (f" {row.dtype}" if row.dtype else "")
            name = row.name + (f" = {row.alias}" if row.alias else "")
            rows.append((name, shape, row.role.value, place_text(row.megatron), place_text(row.gguf), *(f"{n:,}" for n in counts)))
        lines += [layout(rows, head), ""]
    lines.append("tensors: " + ", ".join(f"{preset.name} {total:,}" for preset, total in zip(presets, totals, strict=True)))
    return "\n".join(lines)
