"""Writes the scripts beside it from the architectures' tables: `make docs`. The tests fail when a script is older than the tables."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from glmconv.archs import bind, presets, spec_for
from glmconv.formats.megatron_flags import megatron_flags

FOLDER = Path(__file__).parent


def script(title: str, config: Mapping[str, object]) -> str:
    """A shell script that defines MODEL_ARGS for a model with this config.json."""
    lines = []
    for line in megatron_flags(config, bind(spec_for(config), config)):
        flag, _, value = line.partition(" ")
        lines.append(f'    {flag} "{value}"' if "*" in value else f"    {line}")  # the shell would look for files
    head = f"# {title} as arguments of a Megatron run. Written by scripts/models/write.py: change glmconv/archs and run `make docs`."
    return "\n".join([head, "MODEL_ARGS=(", *lines, ")", ""])


def scripts() -> dict[str, str]:
    """File name -> content, for every preset that slime's Megatron has. Source: slime's scripts/models for the names and the flags."""
    return {
        f"{preset.called or preset.name}.sh": script(preset.hub, preset.config)
        for spec, preset in presets()
        if "slime" in spec.dialects
    }  # fmt: skip


if __name__ == "__main__":
    for name, text in scripts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
