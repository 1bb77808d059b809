"""MTP layers of one checkpoint on another that lost its own: fine-tunes saved by transformers have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from glmconv.archs import bind, field_of
from glmconv.errors import SourceError, UsageError
from glmconv.formats.format import Opened, RowReader


def with_field(config: Mapping[str, object], path: str, value: object) -> dict[str, object]:
    """A copy of the config with one field changed, by its dotted path."""
    step, _, rest = path.partition(".")
    inner = config.get(step)
    return {**config, step: with_field(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def grafted(opened: Opened, base: Opened) -> Opened:
    """`opened`, which was read without MTP layers, with those of `base`; copies of embedding and head are its own.

    UsageError if it has MTP layers, SourceError if `base` has none or is of another architecture, size or dtype.
    """
    spec, layers = opened.model.spec, base.model.sizes.get("mtp", 0)
    if opened.dropped:
        raise UsageError(
            f"{opened.path} has MTP layers of its own; --mtp-from would replace them.",
            hint="Leave --mtp-from out, or write a copy with --mtp drop first.",
        )
    if base.model.spec is not spec:
        raise SourceError(f"is {base.model.spec.model_type}, not {spec.model_type}: its MTP layers do not fit.", file=base.path)
    if not layers:
        raise SourceError("has no MTP layers.", file=base.path, hint="Name the release that the fine-tune came from with --mtp-from.")
    if field_of(opened.config, "num_hidden_layers") != field_of(base.config, "num_hidden_layers"):
        raise SourceError("has another number of layers: its MTP layers would have other names.", file=base.path)
    model = bind(spec, with_field(opened.config, spec.mtp_field, layers), aliases=base.model.aliases, without=_empty(base), file=opened.path)
    added: dict[str, RowReader] = {}
    for name, tensor in model.tensors.items():
        if not tensor.mtp or (tensor.alias and tensor.alias not in opened.tensors):
            continue
        reader = opened.tensors[tensor.alias] if tensor.alias else base.tensors[name]
        ours = next((other for other in opened.tensors.values()), reader)
        if tuple(reader.shape) != tensor.shape:
            raise SourceError(f"is {list(reader.shape)}, {opened.path} needs {list(tensor.shape)}.", file=base.path, tensor=name)
        if not tensor.dtype and not tensor.row.loose and reader.dtype != ours.dtype:
            raise SourceError(f"is {reader.dtype}, {opened.path} is {ours.dtype}.", file=base.path, tensor=name)
        added[name] = reader
    tensors = {name: found for name in model.tensors if (found := opened.tensors.get(name) or added.get(name)) is not None}
    note = f"{len(added):,} tensors of {layers} MTP layer{'s' if layers > 1 else ''} come from {base.path}"
    return replace(
        opened, model=model, tensors=tensors, folders=(*opened.folders, *base.folders), notes=(*opened.notes, note),
        read=(*opened.roots, *base.roots),
        fingerprint={**opened.fingerprint, "mtp_from": base.fingerprint}, stored_bytes=opened.stored_bytes,
    )  # fmt: skip


def _empty(base: Opened) -> tuple[str, ...]:
    """The optional sets of layers that the base has nothing of either."""
    return tuple(name for name in base.model.spec.optional if not base.model.layers[name])
