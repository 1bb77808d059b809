"""The models whose GGUF files are held against llama.cpp's own: every architecture, tiny, the same bytes on any machine.

Nothing here asks a random generator: its stream may change with a version of numpy or torch. Weights are cut from the output of SHAKE-256, and
made of it by whole numbers and exactly rounded float32.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glmconv import convert
from glmconv.archs import Role, TensorSpec, bind, preset_named, text_of
from glmconv.toy.small import Shrinking, small_config
from glmconv.toy.tokenizer import side_files

TABLE = 1_048_573  # a prime, so that no two rows of a tensor begin at the same place
BYTES = 8  # that each weight is made of
SCALES = {Role.NORM: (1.0, 0.1), Role.BIAS: (0.0, 0.05), Role.EMBEDDING: (0.0, 0.5)}  # mean and deviation
OTHERS = (0.0, 0.05)
SMALL = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 32, "vocab_size": 640}
GROUPED = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
LATENT = {
    **SMALL, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 256, "kv_lora_rank": 256, "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32, "qk_head_dim": 96, "v_head_dim": 64,
}  # fmt: skip
INDEXED = {**LATENT, "index_n_heads": 2}
QUANTIZED = (
    "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL",
    "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE",
)  # fmt: skip
ALL = ("F32", "F16", "BF16", *QUANTIZED)
SOME = ("BF16", "Q8_0", "Q4_K_M", "Q2_K", "IQ4_NL", "MXFP4_MOE")
LONG = ("Q4_0", "Q4_K_S", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS")
WIDE = ("Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "IQ4_XS", "TQ1_0", "MXFP4_MOE")
CODEBOOKS = ("IQ3_M", "IQ3_S", "Q1_0", "Q2_0")
AIDED_CODEBOOKS = (*CODEBOOKS[:2], "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "Q2_K_S")
CARD = """---
license: mit
language: [en, zh]
pipeline_tag: text-generation
base_model: zai-org/GLM-4.5-Base
---
# A model for tests
"""
LONG_CARD = """---
license: other
license_name: glm
license_link: https://example.org/licence
language:
- en
- no
tags: [chat, agent]
pipeline_tag: text-generation
base_model: [zai-org/GLM-4.5-Air-Base, foo/bar-7B-v2]
datasets: [x/y, "https://huggingface.co/datasets/a/b"]
model_creator: Somebody
---
"""


@dataclass(frozen=True)
class Fixture:
    """A preset made small: `widths` are fields of its language model's config, `types` the file types that it is written in.

    importance: the file types that are written with an importance matrix
    old: the matrix is in the form of before 2025-07
    unseen: it lacks some weights beside those of the MTP layers
    described: its card, tokenizer and way of sampling say more than those of the others
    mtp: False drops the MTP layers on the way to GGUF, though the source has them
    fp8: the source is quantized, by this target of glmconv
    """

    preset: str
    layers: int
    widths: Mapping[str, object] = field(hash=False)
    types: tuple[str, ...] = ALL
    importance: tuple[str, ...] = QUANTIZED
    old: bool = False
    unseen: bool = True
    described: bool = False
    experts: int = 16
    mtp: bool = True
    fp8: str = ""


FIXTURES = {
    "glm4_moe": Fixture("glm4.5-355B-A32B", 3, GROUPED),
    # long enough that an eighth of the layers is one
    "glm4_moe-long": Fixture("glm4.5-355B-A32B", 8, GROUPED, LONG, LONG),
    # experts' rows of whole super-blocks; no QK-norm
    "glm4_moe-wide": Fixture("glm4.5-106B-A12B", 2, {**GROUPED, "moe_intermediate_size": 256}, WIDE, ("Q4_K_M", "Q3_K_M", "IQ4_XS")),
    # rows that only blocks of 32 divide; MTP in a file of its own, without embedding and head
    "glm4_moe-apart": Fixture("glm4.6-355B-A32B", 3, {**GROUPED, "hidden_size": 288}, importance=("Q4_0",)),
    "glm4_moe-dropped": Fixture("glm4.5-355B-A32B", 8, GROUPED, ("Q4_K_M", "Q3_K_M", "Q2_K"), ("Q2_K_S", "Q4_K_M"), unseen=False, mtp=False),
    # experts' rows of whole super-blocks, every tensor measured
    "glm4_moe-codebooks": Fixture(
        "glm4.5-106B-A12B", 2, {**GROUPED, "moe_intermediate_size": 256}, CODEBOOKS, AIDED_CODEBOOKS, unseen=False, experts=4, mtp=False
    ),
    "glm4_moe-eight": Fixture("glm4.5-355B-A32B", 4, GROUPED, QUANTIZED, (), experts=8),
    # rows that no block divides
    "glm4v_moe": Fixture("glm4.5v-108B-A12B", 3, {**GROUPED, "hidden_size": 272, "num_attention_heads": 4}),
    "glm4_moe_lite": Fixture("glm4.7-flash-30B-A3B", 4, LATENT, old=True),
    "glm4_moe_lite-dropped": Fixture("glm4.7-flash-30B-A3B", 3, LATENT, SOME, ("Q2_K_S",), unseen=False, mtp=False),
    "glm_moe_dsa": Fixture("glm5-744B-A40B", 5, INDEXED),
    "glm_moe_dsa-shared": Fixture("glm5.2-744B-A40B", 7, INDEXED, SOME, ("Q4_K_M",), old=True),
    "glm_moe_dsa-fp8": Fixture("glm5-744B-A40B", 4, INDEXED, SOME, ("Q4_K_M",), fp8="fp8"),
    "glm4_moe-v2.1-35B-described": Fixture("glm4.5-355B-A32B", 2, GROUPED, ("Q8_0",), (), described=True),
    "glm4_moe-channel": Fixture("glm4.5-355B-A32B", 4, GROUPED, SOME, (), fp8="fp8:channel"),
    "glm4": Fixture("glm4-9B-0414", 4, GROUPED, old=True),
    # a sixteenth of the layers is one
    "glm4-long": Fixture("glm4-9B-0414", 16, {**GROUPED, "intermediate_size": 256}, LONG, LONG),
    "glm4-codebooks": Fixture("glm4-9B-0414", 2, GROUPED, CODEBOOKS, AIDED_CODEBOOKS, unseen=False, old=True),
    "glm4-odd": Fixture("glm4-32B-0414", 3, {**GROUPED, "hidden_size": 320, "num_attention_heads": 4}, SOME, ("Q4_K_M", "Q2_K_S"), unseen=False),
    "glm5_next": Fixture("glm5.3-flash-321B", 5, {**INDEXED, "qk_rope_head_dim": 0, "qk_head_dim": 64}),
}


def build(name: str, folder: Path) -> Path:
    """The fixture as a release, in a folder of its own name under `folder`. The name of a folder is part of a GGUF's metadata."""
    fixture = FIXTURES[name]
    plain = folder / "plain" / name if fixture.fp8 else folder / name
    plain.mkdir(parents=True)
    spec, preset = preset_named(fixture.preset)
    config = small_config(spec, preset.config, Shrinking(fixture.layers, fixture.experts, Fraction(1, 64), mtp=True))
    text = {**text_of(spec, config)}
    text |= {key: value for key, value in fixture.widths.items() if key in text}
    if "linear_attn_config" in text:
        text["linear_attn_config"] = {**text["linear_attn_config"], "num_heads": text["num_attention_heads"], "head_dim": 32}
    config = {**config, spec.text: text} if spec.text else text
    if isinstance(tower := config.get("vision_config"), dict):
        config["vision_config"] = {**tower, "out_hidden_size": text["hidden_size"]}
    tensors = list(bind(spec, config, aliases=preset.aliases).tensors.values())
    files = {**side_files(text), "config.json": json.dumps(config, indent=2).encode(), "README.md": CARD.encode()}
    for file, content in (described(files) if fixture.described else files).items():
        (plain / file).write_bytes(content)
    write(plain, tensors, preset.mtp_file)
    if not fixture.fp8:
        return plain
    convert(plain, {fixture.fp8: folder / name})
    return folder / name


def digest(folder: Path) -> str:
    """Of all that a source says: its side files and its tensors, whatever way safetensors lays them out."""
    made = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    made.update(name.encode() + file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())
        elif path.is_file() and "manifest" not in path.name:
            made.update(path.name.encode() + path.read_bytes())
    return made.hexdigest()


@lru_cache(1)
def table() -> np.ndarray:
    """TABLE numbers [int16], nearly normal, deviation 181, one in 128 of them eight times as large: released weights have outliers."""
    made = np.frombuffer(hashlib.shake_256(b"glmconv's fixtures").digest(TABLE * BYTES), np.uint8).reshape(TABLE, BYTES)
    around = made[:, :6].sum(axis=1, dtype=np.int16) - np.int16(765)
    return np.where(made[:, 6] < 2, around * np.int16(8), around)


def weights(tensor: TensorSpec) -> torch.Tensor:
    """A stretch of the table that the tensor's name decides, scaled by role: in float32, then rounded to what the spec says."""
    mean, deviation = SCALES.get(tensor.role, OTHERS)
    start = int.from_bytes(hashlib.sha256((tensor.alias or tensor.name).encode()).digest()[:8], "little") % TABLE
    drawn = np.resize(np.roll(table(), -start)[: tensor.elements], tensor.shape).astype(np.float32)
    made = torch.from_numpy(drawn * np.float32(deviation / 181) + np.float32(mean))
    return made if tensor.dtype == "float32" else made.to(torch.bfloat16)


def described(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files beside the weights, with all that the converter has a rule for."""
    tokenizer, settings, sampling = (json.loads(files[name]) for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"))
    last = max(token["id"] for token in tokenizer["added_tokens"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    for number, token in enumerate(("<|mine|>", "a\u2581b", "<pad>", "<unused5>", "<x>"), last + 1):
        tokenizer["added_tokens"].append({"id": number, "content": token, **flags})
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in tokenizer["model"]["merges"]]
    templates = [{"name": "tool use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ messages }}"}]
    settings |= {"cls_token": "<sop>", "sep_token": "<eop>", "unk_token": "[MASK]", "eos_token": None, "chat_template": templates}
    sampling |= {"top_k": 40, "min_p": 0.05, "repetition_penalty": 1.1, "temperature": 0.6}
    changed = {"tokenizer.json": tokenizer, "tokenizer_config.json": settings, "generation_config.json": sampling}
    return {**files, **{name: json.dumps(value).encode() for name, value in changed.items()}, "README.md": LONG_CARD.encode()}


def write(folder: Path, tensors: list[TensorSpec], mtp_file: str) -> None:
    """The tensors' files and their index: every other tensor in the second one, so that a layer's experts lie in both."""
    weight_map = {}
    for number, tensor in enumerate(tensors):
        weight_map[tensor.name] = mtp_file if mtp_file and tensor.mtp else f"model-{number % 2 + 1:05}-of-00002.safetensors"
    by_name = {tensor.name: tensor for tensor in tensors}
    for file in sorted(set(weight_map.values())):
        save_file({name: weights(by_name[name]) for name, at in weight_map.items() if at == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
