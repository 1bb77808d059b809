"""Every tested model, and its way to the ranks through a JSON file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.megatron.glm4 import Glm4
from tests.megatron.glm4_moe import Glm4Moe
from tests.megatron.glm4_moe_lite import Glm4MoeLite
from tests.megatron.glm_moe_dsa import GlmMoeDsa
from tests.megatron.release import Shape

ARCHITECTURES: dict[str, type[Shape]] = {kind.model_type: kind for kind in (Glm4, Glm4Moe, Glm4MoeLite, GlmMoeDsa)}


def packed(shape: Shape) -> dict[str, Any]:
    return {"model_type": shape.model_type} | asdict(shape)


def unpacked(fields: dict[str, Any]) -> Shape:
    return ARCHITECTURES[fields["model_type"]](**{name: value for name, value in fields.items() if name != "model_type"})
