"""An mmproj file read: what it says of the tower, and the canonical tensors that its own are parts of."""

from __future__ import annotations

from collections.abc import Callable

from glmconv.archs import Model
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.format import RowReader
from glmconv.formats.gguf_config import shortest
from glmconv.formats.gguf_header import GgufHeader
from glmconv.formats.gguf_mmproj import FIELDS, MMPROJ, PROJECTORS, RUNNABLE, mmproj_tensors
from glmconv.formats.gguf_rows import Framed
from glmconv.formats.gguf_tensors import GGUFTensor, Transform
from glmconv.formats.gguf_types import Array, Kind

MODELS = {projector: model_type for model_type, projector in PROJECTORS.items()}
AGAIN = "Is this the mmproj file of this model?"


def model_type_of(header: GgufHeader, file: object) -> str:
    """The architecture whose tower this is. SourceError if it is no mmproj file, UnsupportedError for another model's."""
    said = [_text(header, key) for key in ("general.architecture", "general.type", "clip.projector_type")]
    if said[:2] != ["clip", MMPROJ]:
        raise SourceError("is no mmproj file.", file=file, hint="Pass the file with the vision tower.")
    if said[2] not in MODELS:
        raise UnsupportedError(f"has a tower of the kind {said[2][:60]!r}; known are {', '.join(MODELS)}.", file=file)
    return MODELS[said[2]]


def vision_config(header: GgufHeader, file: object) -> dict[str, object]:
    """config.json's vision_config, as far as the file says it: all that decides shapes, and what llama.cpp runs the tower by."""
    model_type = model_type_of(header, file)
    found: dict[str, object] = {"model_type": f"{model_type}_vision"}
    found |= {field: _number(header, key, file) for key, field in FIELDS.items()}
    found |= {field: number for number, field in RUNNABLE.values()}
    found["out_hidden_size"] = _number(header, "projection_dim", file)
    found["hidden_act"] = "gelu" if "clip.use_gelu" in header.kv else "silu"
    found["rms_norm_eps"] = _real(header, "clip.vision.attention.layer_norm_epsilon", file)
    found["attention_bias"] = "v.blk.0.attn_qkv.bias" in header.tensors
    if model_type == "glm5_next":
        found["swiglu_limit"] = _real(header, "clip.vision.swiglu_clamp", file)
        up = header.tensors.get("mm.up.weight")
        found["projection_intermediate_size"] = up.ne[-1] if up else 0
    return found


def image_settings_of(header: GgufHeader, file: object) -> dict[str, object]:
    """The fields of preprocessor_config.json that the file says."""
    found: dict[str, object] = {}
    for field in ("image_mean", "image_std"):
        said = header.kv.get(f"clip.vision.{field}")
        if said is None or not isinstance(said.value, Array) or said.value.kind is not Kind.F32:
            raise SourceError(f"does not say clip.vision.{field}.", file=file)
        found[field] = [shortest(value) for value in said.value.values if isinstance(value, float)]
    token = (_number(header, "patch_size", file) * RUNNABLE["merge"][0]) ** 2
    for least in ("min", "max"):
        if f"clip.vision.image_{least}_pixels" in header.kv:
            found[f"{least}_image_tokens"] = _number(header, f"image_{least}_pixels", file) // token
    return found


def vision_readers(model: Model, header: GgufHeader, rows: Callable[[str, tuple[int, ...]], RowReader], file: object) -> dict[str, RowReader]:
    """Canonical tensor of the tower -> its reader. SourceError for a tensor that is missing, wrong or unknown.

    `rows(name, shape)` reads the file's tensor `name` as rows of the model's dtype in this shape, which has as many elements as it.
    """
    parts: dict[str, list[GGUFTensor]] = {}
    for tensor in mmproj_tensors(model):
        there = header.tensors.get(tensor.name)
        if there is None:
            raise SourceError("is missing.", file=file, tensor=tensor.name, hint=AGAIN)
        if there.ne != tensor.ne:
            raise SourceError(f"is {list(there.ne)}, {list(tensor.ne)} is needed.", file=file, tensor=tensor.name, hint=AGAIN)
        parts.setdefault(tensor.runs[0].tensor, []).append(tensor)
    unknown = header.tensors.keys() - {tensor.name for made in parts.values() for tensor in made}
    if unknown:
        raise SourceError("is no tensor of this model's tower.", file=file, tensor=min(unknown), hint=AGAIN)
    found: dict[str, RowReader] = {}
    for canonical, made in parts.items():
        readers = tuple(rows(tensor.name, tensor.ne[::-1]) for tensor in made)
        found[canonical] = Framed(readers) if made[0].transform is Transform.FRAME else readers[0]
    return found


def _text(header: GgufHeader, key: str) -> str:
    said = header.kv.get(key)
    return said.value if said is not None and isinstance(said.value, str) else ""


def _number(header: GgufHeader, key: str, file: object) -> int:
    said = header.kv.get(f"clip.vision.{key}")
    if said is None or said.kind is not Kind.U32 or not isinstance(said.value, int):
        raise SourceError(f"does not say clip.vision.{key}.", file=file)
    return said.value


def _real(header: GgufHeader, key: str, file: object) -> float:
    said = header.kv.get(key)
    if said is None or said.kind is not Kind.F32 or not isinstance(said.value, float):
        raise SourceError(f"does not say {key}.", file=file)
    return shortest(said.value)
