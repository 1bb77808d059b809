"""A released model as files that have headers and no weights: right sizes, sparse, a few megabytes on the disk."""

from __future__ import annotations

import json
from pathlib import Path

from glmconv.archs import bind, preset_named
from glmconv.dtypes import BY_NAME
from glmconv.formats.safetensors_header import write_header


def headers_only(preset_name: str, folder: Path) -> None:
    """One sparse safetensors file with every tensor of the release, and its config.json."""
    spec, preset = preset_named(preset_name)
    model = bind(spec, preset.config, aliases=preset.aliases)
    entries = [(name, BY_NAME[tensor.dtype or "bfloat16"], tensor.shape) for name, tensor in model.tensors.items()]
    header = write_header(entries, {"format": "pt"})
    with (folder / "model.safetensors").open("xb") as out:
        out.write(header)
        out.truncate(len(header) + sum(tensor.elements * BY_NAME[tensor.dtype or "bfloat16"].itemsize for tensor in model.tensors.values()))
    (folder / "config.json").write_text(json.dumps(dict(preset.config)))
