"""Every tested model, the layouts that it is tested at, and its way to the ranks through a JSON file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from tests.megatron.glm4 import Glm4
from tests.megatron.glm4_moe import Glm4Moe
from tests.megatron.glm4_moe_lite import Glm4MoeLite
from tests.megatron.glm_moe_dsa import DIALECTS, GlmMoeDsa
from tests.megatron.release import TOKENS, Shape

ARCHITECTURES: dict[str, type[Shape]] = {kind.model_type: kind for kind in (Glm4, Glm4Moe, Glm4MoeLite, GlmMoeDsa)}

LIKE_355B = Glm4Moe(name="like-355B", layers=4, dense=3, qk_norm=True)
LIKE_AIR = Glm4Moe(name="like-Air", layers=2, dense=1, qk_norm=False, shared=2)
LIKE_FLASH = Glm4MoeLite(name="like-Flash", layers=4, dense=1)
LIKE_9B, LIKE_32B = Glm4(name="like-9B", layers=4, bias=True), Glm4(name="like-32B", layers=2, bias=False)
LIKE_GLM5 = {name: GlmMoeDsa(name=f"like-GLM-5.2-{name}", layers=4, dense=3, dialect=name, top_k=64, frequency=3) for name in DIALECTS}
LAYOUTS_OF: dict[Shape, tuple[str, ...]] = {
    LIKE_355B: ("tp1", "tp2", "pp2", "ep2", "tp2_ep2"),
    LIKE_AIR: ("tp1", "tp2"),
    LIKE_FLASH: ("tp1", "tp2", "pp2", "tp2_ep2"),
    LIKE_GLM5["slime"]: ("tp1", "tp2", "pp2"),
    LIKE_GLM5["mcore"]: ("tp1", "tp2"),
    LIKE_GLM5["bridge"]: ("tp1", "tp2"),
    LIKE_9B: ("tp1", "tp2", "pp2"),
    LIKE_32B: ("tp1",),
}
COMPARED = [(shape, layout) for shape, layouts in LAYOUTS_OF.items() for layout in layouts]

IN_FLOAT32: tuple[Shape, ...] = (
    Glm4Moe(name="three-dense-float32", layers=4, dense=3, qk_norm=True, dtype="float32"),
    Glm4Moe(name="one-dense-float32", layers=2, dense=1, qk_norm=False, dtype="float32"),
    Glm4MoeLite(name="Flash-float32", layers=3, dense=1, dtype="float32"),
    GlmMoeDsa(name="GLM-5-all-keys-float32", layers=3, dense=1, dialect="slime", top_k=TOKENS, dtype="float32"),
    *(
        GlmMoeDsa(
            name=f"GLM-5.2-{name}-float32", layers=4, dense=1, dialect=name, top_k=5, frequency=3, even_query_norm=name != "bridge", dtype="float32"
        )
        for name in DIALECTS
    ),
    Glm4(name="9B-float32", layers=3, bias=True, dtype="float32"),
    Glm4(name="32B-float32", layers=3, bias=False, dtype="float32"),
)
UNEVEN = GlmMoeDsa(name="uneven-query-norm-float32", layers=2, dense=1, dialect="mcore", top_k=5, dtype="float32")
SHAPES = {shape.name: shape for shape in (*LAYOUTS_OF, *IN_FLOAT32, UNEVEN)}


def packed(shape: Shape) -> dict[str, Any]:
    return {"model_type": shape.model_type} | asdict(shape)


def unpacked(fields: dict[str, Any]) -> Shape:
    return ARCHITECTURES[fields["model_type"]](**{name: value for name, value in fields.items() if name != "model_type"})
