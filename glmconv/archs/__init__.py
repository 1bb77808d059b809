"""The architectures that glmconv knows. A new one is one file here and one line in `SPECS`."""

from __future__ import annotations

from collections.abc import Mapping

from glmconv.archs import glm4_moe
from glmconv.archs.model import Model, TensorSpec, bind
from glmconv.archs.spec import ArchSpec, Preset, Role
from glmconv.errors import UnsupportedError, UsageError

SPECS = {spec.model_type: spec for spec in (glm4_moe.SPEC,)}
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "n_routed_experts", "max_position_embeddings", "intermediate_size", "vocab_size")

__all__ = ["SPECS", "ArchSpec", "Model", "Preset", "Role", "TensorSpec", "bind", "preset_named", "preset_of", "presets", "spec_for"]


def spec_for(config: Mapping[str, object], file: object = "config.json") -> ArchSpec:
    """The spec of a config's `model_type`. UnsupportedError names it and lists what is known."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in SPECS:
        return SPECS[model_type]
    raise UnsupportedError(f"model_type {model_type!r} is not known.", file=file, hint=f"Known: {', '.join(SPECS)}; see `glmconv models`.")


def presets() -> list[tuple[ArchSpec, Preset]]:
    return [(spec, preset) for spec in SPECS.values() for preset in spec.presets]


def preset_named(name: str) -> tuple[ArchSpec, Preset]:
    """By preset name or Hub id, case-insensitively."""
    for spec, preset in presets():
        if name.lower() in (preset.name.lower(), preset.hub.lower(), preset.hub.lower().rpartition("/")[2]):
            return spec, preset
    raise UsageError(f"no preset is called {name!r}.", hint=f"Presets: {', '.join(p.name for _, p in presets())}.")


def preset_of(config: Mapping[str, object]) -> Preset | None:
    """The released model whose sizes this config has; the first of several releases that share them."""
    for spec, preset in presets():
        same = all(config.get(field) == preset.config.get(field) for field in SIZE_FIELDS)
        if same and config.get("model_type") == spec.model_type:
            return preset
    return None
