"""The architectures that glmconv knows. A new one is one file here and one line in `SPECS`."""

from __future__ import annotations

from collections.abc import Mapping

from glmconv.archs import glm4, glm4_moe, glm4_moe_lite, glm4v_moe, glm5_next, glm_moe_dsa
from glmconv.archs.model import Model, TensorSpec, bind, field_of, text_of
from glmconv.archs.spec import ArchSpec, Preset, Role
from glmconv.errors import UnsupportedError, UsageError

MODULES = (glm4_moe, glm_moe_dsa, glm4_moe_lite, glm4, glm4v_moe, glm5_next)
SPECS: dict[str, ArchSpec] = {spec.model_type: spec for spec in (module.SPEC for module in MODULES)}
SIZE_FIELDS = ("hidden_size", "num_hidden_layers", "n_routed_experts", "max_position_embeddings", "intermediate_size", "vocab_size")

__all__ = [
    "SPECS",
    "ArchSpec",
    "Model",
    "Preset",
    "Role",
    "TensorSpec",
    "bind",
    "field_of",
    "preset_named",
    "preset_of",
    "presets",
    "spec_for",
    "text_of",
]


def spec_for(config: Mapping[str, object], file: object = "config.json") -> ArchSpec:
    """The spec of a config's `model_type`. UnsupportedError names it and lists what is known."""
    model_type = config.get("model_type")
    if isinstance(model_type, str) and model_type in SPECS:
        return SPECS[model_type]
    raise UnsupportedError(f"model_type {model_type!r} is not known.", file=file, hint=f"Known: {', '.join(SPECS)}; see `glmconv models`.")


def presets() -> list[tuple[ArchSpec, Preset]]:
    return [(spec, preset) for spec in SPECS.values() for preset in spec.presets]


def preset_named(name: str) -> tuple[ArchSpec, Preset]:
    """By preset name, the trainers' name or Hub id, case-insensitively; with or without a hyphen behind GLM, as folders are called."""
    for spec, preset in presets():
        if _plain(name) in {_plain(text) for text in (preset.name, preset.called, preset.hub, preset.hub.rpartition("/")[2]) if text}:
            return spec, preset
    raise UsageError(f"no preset is called {name!r}.", hint=f"Presets: {', '.join(p.name for _, p in presets())}.")


def _plain(name: str) -> str:
    return name.lower().replace("glm-", "glm", 1)


def preset_of(config: Mapping[str, object]) -> Preset | None:
    """The released model whose sizes this config has; the first of several releases that share them."""
    for spec, preset in presets():
        if config.get("model_type") == spec.model_type:
            ours, theirs = text_of(spec, config), text_of(spec, preset.config)
            if all(ours.get(field) == theirs.get(field) for field in SIZE_FIELDS):
                return preset
    return None
