"""What a checkpoint is and what it holds, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from glmconv.archs import preset_of
from glmconv.checkpoint import Checkpoint, open_checkpoint
from glmconv.formats.coded import label_of


@dataclass(frozen=True)
class Inspection:
    """Facts of an opened checkpoint; `missing`, `unexpected` and `wrong` name the tensors that do not fit the config."""

    path: str
    format: str
    model_type: str
    preset: str | None
    layers: int
    experts: int
    mtp_layers: int
    tensors: int
    mtp_tensors: int
    aliases: int
    parameters: int
    bytes: int
    stored_bytes: int
    quantization: dict[str, int]
    dtypes: dict[str, int]
    sizes: dict[str, int]
    files: int
    missing: list[str]
    unexpected: list[str]
    wrong: list[list[str]]
    apart: int  # tensors of a vision tower, in a file that was not given
    notes: list[str]

    @property
    def complete(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong)


def inspect(
    path: str | Path, *, origin: str | Path | None = None, dialect: str = "auto", mmproj: str | Path | None = None
) -> tuple[Inspection, Checkpoint]:
    """Inspect a checkpoint of any format. Tensors that are missing, unknown or wrong are listed, not raised; a broken file is still a SourceError."""
    source = open_checkpoint(path, origin=origin, strict=False, dialect=dialect, mmproj=mmproj)
    opened, model = source.opened, source.arch
    dtypes: Counter[str] = Counter(tensor.dtype.name for _, tensor in source)
    quantization = Counter(label for _, tensor in source if (label := label_of(tensor.reader)))
    preset = preset_of(source.config)
    files = opened.fingerprint.get("files")
    found = Inspection(
        path=str(opened.path),
        format=opened.format,
        model_type=model.spec.model_type,
        preset=preset.name if preset else None,
        layers=model.sizes["layers"],
        experts=model.sizes.get("experts", 0),
        mtp_layers=len({model.tensors[name].index["mtp"] for name in source.tensors if model.tensors[name].mtp}),
        tensors=len(source),
        mtp_tensors=sum(model.tensors[name].mtp for name in source.tensors),
        aliases=sum(bool(model.tensors[name].alias) for name in source.tensors),
        parameters=sum(model.tensors[name].elements for name in source.tensors if not model.tensors[name].alias),
        bytes=sum(tensor.nbytes for _, tensor in source),
        stored_bytes=opened.stored_bytes,
        quantization=dict(sorted(quantization.items())),
        dtypes=dict(sorted(dtypes.items())),
        sizes=dict(model.sizes),
        files=len(files) if isinstance(files, Mapping) else 0,
        missing=list(opened.missing),
        unexpected=list(opened.unexpected),
        wrong=[list(pair) for pair in opened.wrong],
        apart=len(opened.apart),
        notes=list(opened.notes),
    )
    return found, source
