"""config.json out of a GGUF file: the copy that rides along, held against the keys; or one rebuilt from the keys and the release that they fit best.

What the keys say is a list of facts, a path in config.json and its value; a rebuilt config is a release's with the facts laid over it. Source of
the keys: `gguf_metadata`, whose way there this is read backwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from glmconv import strict_json
from glmconv.archs import SIZE_FIELDS, SPECS, ArchSpec, Preset, field_of
from glmconv.archs.model import LIMITS
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.coded import QUANTIZATION
from glmconv.formats.gguf_files import GgufFiles
from glmconv.formats.gguf_metadata import ARCHITECTURES, CONFIG, SOURCE, YARN
from glmconv.formats.gguf_tensors import layer_of
from glmconv.formats.gguf_types import Array
from glmconv.formats.graft import with_field
from glmconv.formats.side_files import as_json

CONFIG_LARGEST = 4 << 20
PRE_TOKENIZERS = ("glm4", "chatglm-bpe")  # two names of one way to cut text
SECTIONS = "rope.dimension_sections"
VISIONS = {"glm4_moe": "glm4v_moe"}  # the model whose language model has the same tensors, if positions come in sections
FLAGS = {"attn_q.bias": "attention_bias", "attn_q_norm.weight": "use_qk_norm"}
ROPE_KINDS = ("rope_parameters", "rope_scaling")
# config.json's field in the language model's part, the key behind the architecture's name
WHOLE = {
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "max_position_embeddings": "context_length",
    "num_attention_heads": "attention.head_count", "n_routed_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
    "n_group": "expert_group_count", "topk_group": "expert_group_used_count", "first_k_dense_replace": "leading_dense_block_count",
    "moe_intermediate_size": "expert_feed_forward_length", "n_shared_experts": "expert_shared_count", "q_lora_rank": "attention.q_lora_rank",
    "kv_lora_rank": "attention.kv_lora_rank", "v_head_dim": "attention.value_length_mla", "index_n_heads": "attention.indexer.head_count",
    "index_head_dim": "attention.indexer.key_length", "index_topk": "attention.indexer.top_k", "index_kpool": "attention.indexer.kpool",
    "hc_mult": "hyper_connection.count", "hc_sinkhorn_iters": "hyper_connection.sinkhorn_iterations",
}  # fmt: skip
REAL = {"rms_norm_eps": "attention.layer_norm_rms_epsilon", "routed_scaling_factor": "expert_weights_scale", "hc_eps": "hyper_connection.epsilon"}
FLAGGED = {"norm_topk_prob": "expert_weights_norm", "index_kpool_always_select_tail": "attention.indexer.kpool_select_tail"}
OBSERVATION = "<|observation|>"
PICTURES = {  # config.json's field and the token that it means
    "image_start_token_id": "<|begin_of_image|>", "image_end_token_id": "<|end_of_image|>", "image_token_id": "<|image|>",
    "video_start_token_id": "<|begin_of_video|>", "video_end_token_id": "<|end_of_video|>", "video_token_id": "<|video|>",
}  # fmt: skip
LINEAR = {"head_dim": "kda.head_dim", "short_conv_kernel_size": "ssm.conv_kernel"}
Fact = tuple[str, object, str]  # path in config.json, value, what in the file says so


@dataclass(frozen=True)
class FoundConfig:
    """A config and where it came from. `preset` is the release that it was rebuilt from, None for a copy that rode along."""

    config: Mapping[str, object]
    data: bytes
    preset: Preset | None
    notes: tuple[str, ...] = ()


def config_of(files: GgufFiles, embedded: Mapping[str, bytes]) -> FoundConfig:
    """SourceError for a copy that the keys contradict, or for keys that are missing; UnsupportedError for a model that is none of GLM's."""
    told = Told(files)
    if CONFIG not in embedded:
        return rebuilt(told)
    file = f"{files.path}: {SOURCE}{CONFIG}"
    value = strict_json.mapping(strict_json.parse(embedded[CONFIG], file=file, limit=CONFIG_LARGEST), CONFIG, file)
    model_type = value.get("model_type")
    if not isinstance(model_type, str) or ARCHITECTURES.get(model_type) != told.architecture:
        raise SourceError(f"model_type is {str(model_type)[:60]!r}, general.architecture {told.architecture}.", file=file)
    for path, wanted, says in told.facts(SPECS[model_type]):
        found = _stated(value, path)
        told_otherwise = isinstance(wanted, dict) or path.endswith("partial_rotary_factor")  # in other words, or cut to a whole number
        if found is not None and not told_otherwise and not agrees(found, wanted):
            raise SourceError(f"{path} is {str(found)[:60]}, {says} says {str(wanted)[:60]}.", file=file, hint="Was one of them edited?")
    if QUANTIZATION not in value:
        return FoundConfig(value, embedded[CONFIG], None)
    plain = {name: inner for name, inner in value.items() if name != QUANTIZATION}
    note = f"the embedded config.json's {QUANTIZATION} is left out: the tensors are what GGUF made of them"
    return FoundConfig(plain, as_json(plain), None, (note,))


def _stated(config: Mapping[str, object], path: str) -> object:
    """What a config says; the base of its rope may lie beside the rope's other parameters, or above them."""
    found = field_of(config, path)
    field = path.rpartition(".")[2]
    if found is None and field in ("rope_theta", "partial_rotary_factor"):
        inner = path.removesuffix(field)
        others = (f"{inner}{kind}.{field}" for kind in ROPE_KINDS)
        return next((other for name in others if (other := field_of(config, name)) is not None), None)
    return found


def agrees(found: object, wanted: object) -> bool:
    if isinstance(wanted, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return abs(found) < 1e30 and bool(np.float32(found) == np.float32(wanted))
    return found == wanted and isinstance(found, bool) == isinstance(wanted, bool)


def rebuilt(told: Told) -> FoundConfig:
    """The release whose config the facts change least, with the facts laid over it."""
    spec = told.spec
    facts = list(told.facts(spec))
    scored = [(sum(not agrees(_stated(p.config, path), value) for path, value, _ in facts), n) for n, p in enumerate(spec.presets)]
    preset = spec.presets[min(scored)[1]]
    config: Mapping[str, object] = preset.config
    for path, value, _ in facts:
        if not agrees(_stated(config, path), value):
            config = with_field(config, _place(config, path), value)
    for path, value in told.followers(spec, config, preset):
        if field_of(config, path) is not None or (isinstance(value, list) and "shared" in value):
            config = with_field(config, path, value)
    config = dict(config)
    inner = f"{spec.text}." if spec.text else ""
    if any(field_of(config, inner + field) != field_of(preset.config, inner + field) for field in SIZE_FIELDS):
        what = f"no release has this model's sizes; what GGUF does not hold is as in {preset.hub}"
    else:
        what = f"what GGUF does not hold is as in {preset.hub}"
    note = f"config.json is rebuilt from the file's keys and tensors: {what} (activation, dropout, initializer, dtype, versions)"
    return FoundConfig(config, as_json(config), preset, (note,))


def _place(config: Mapping[str, object], path: str) -> str:
    """Where a config has a field of the rope: among the rope's parameters, if it has such."""
    field = path.rpartition(".")[2]
    inner = path.removesuffix(field)
    if field in ("rope_theta", "partial_rotary_factor") and isinstance(field_of(config, f"{inner}rope_parameters"), Mapping):
        return f"{inner}rope_parameters.{field}"
    return path


class Told:
    """What a file's keys and tensors say of its model."""

    def __init__(self, files: GgufFiles) -> None:
        self.files = files
        self.architecture = self._text("general.architecture")
        if self.architecture not in ARCHITECTURES.values():
            known = ", ".join(dict.fromkeys(ARCHITECTURES.values()))
            raise UnsupportedError(f"is of llama.cpp's architecture {self.architecture}.", file=files.path, hint=f"Known are {known}.")

    @cached_property
    def spec(self) -> ArchSpec:
        """Of the architecture's models that which the keys fit. UnsupportedError if it is none of GLM's."""
        model_type = next(name for name, architecture in ARCHITECTURES.items() if architecture == self.architecture)
        pre = self.files.kv.get("tokenizer.ggml.pre")
        if pre is not None and pre.value not in PRE_TOKENIZERS:
            raise UnsupportedError(
                f"is {self.architecture} with the pre-tokenizer {str(pre.value)[:60]}: another model than GLM's.", file=self.files.path
            )
        if self._key(SECTIONS) in self.files.kv:
            if model_type not in VISIONS:
                raise UnsupportedError(f"is {self.architecture} with positions in sections, whose rows lie in another order.", file=self.files.path)
            model_type = VISIONS[model_type]
        return SPECS[model_type]

    @cached_property
    def mtp(self) -> int:
        """MTP layers: those that have a tensor of their own, and not the number that a key has."""
        return len({layer_of(name) for name in self.files.tensors if ".nextn." in name})

    @cached_property
    def layers(self) -> int:
        """Of the decoder."""
        layers = self.whole("block_count") - max(self.mtp, self.whole("nextn_predict_layers", 0))
        if not 1 <= layers <= LIMITS["layers"]:
            what = f"{self._key('block_count')} leaves {layers:,} layers to the decoder; it has 1 to {LIMITS['layers']:,}."
            raise SourceError(what, file=self.files.path)
        return layers

    def facts(self, spec: ArchSpec) -> Iterator[Fact]:
        """(path in config.json, value, what says so)."""
        inner = f"{spec.text}." if spec.text else ""
        for field, value, says in self._facts("kv_lora_rank" in str(spec.config.get("kv_rank", "")), spec):
            yield inner + field, value, says

    def _facts(self, latent: bool, spec: ArchSpec) -> Iterator[Fact]:
        for field, name in WHOLE.items():
            if self._key(name) in self.files.kv:
                yield field, self.whole(name), self._key(name)
        for field, name in REAL.items():
            if self._key(name) in self.files.kv:
                yield field, self.real(name), self._key(name)
        for field, name in FLAGGED.items():
            if self._key(name) in self.files.kv:
                yield field, self.flag(name), self._key(name)
        yield "num_hidden_layers", self.layers, self._key("block_count")
        yield "vocab_size", self.vocabulary, "token_embd.weight"
        yield from self._latent() if latent else self._grouped()
        yield from self._positions(latent)
        if "linear_heads" in spec.config:
            yield from self._linear()

    def _latent(self) -> Iterator[Fact]:
        rope = self.whole("rope.dimension_count")
        yield "qk_rope_head_dim", rope, self._key("rope.dimension_count")
        yield "qk_nope_head_dim", self.whole("attention.key_length_mla") - rope, self._key("attention.key_length_mla")
        yield "num_key_value_heads", self.whole("attention.head_count"), self._key("attention.head_count")

    def _grouped(self) -> Iterator[Fact]:
        yield "num_key_value_heads", self.whole("attention.head_count_kv"), self._key("attention.head_count_kv")
        head = self.whole("attention.key_length", self.whole("embedding_length") // max(1, self.whole("attention.head_count")))
        yield "head_dim", head, self._key("attention.key_length")
        for suffix, field in FLAGS.items():
            if field == "use_qk_norm" and self.architecture == "glm4":
                continue
            yield field, f"blk.0.{suffix}" in self.files.tensors, f"blk.0.{suffix}"

    def _positions(self, latent: bool) -> Iterator[Fact]:
        if self._key("rope.freq_base") in self.files.kv:
            yield "rope_theta", self.real("rope.freq_base"), self._key("rope.freq_base")
        if not latent and self._key("rope.dimension_count") in self.files.kv:
            head = self.whole("attention.key_length", 0) or 1
            yield "partial_rotary_factor", self.whole("rope.dimension_count") / head, self._key("rope.dimension_count")
        if self._key("rope.scaling.type") in self.files.kv:
            yield "rope_scaling", dict(self._scaling()), self._key("rope.scaling.type")
        if self._key(SECTIONS) in self.files.kv:
            sections = [n for n in self._array(SECTIONS) if n]
            yield "rope_scaling.mrope_section", sections, self._key(SECTIONS)

    def _scaling(self) -> Iterator[tuple[str, object]]:
        yield "rope_type", self._text(self._key("rope.scaling.type"))
        yield "factor", self.real("rope.scaling.factor")
        if self._key("rope.scaling.original_context_length") in self.files.kv:
            yield "original_max_position_embeddings", self.whole("rope.scaling.original_context_length")
        for field, name in YARN.items():
            if self._key(f"rope.scaling.{name}") in self.files.kv:
                yield field, self.real(f"rope.scaling.{name}")

    def _linear(self) -> Iterator[Fact]:
        for field, name in LINEAR.items():
            yield f"linear_attn_config.{field}", self.whole(name), self._key(name)
        yield "linear_attn_config.gate_lower_bound", self.real("kda.gate_lower_bound"), self._key("kda.gate_lower_bound")
        decays = next((stored for name, stored in self.files.tensors.items() if name.endswith(".ssm_a")), None)
        if decays is not None:
            yield "linear_attn_config.num_heads", max(decays.tensor.ne), decays.name
        limits = self._array("swiglu_clamp_exp")
        if limits:
            yield "swiglu_limit", shortest(limits[0]), self._key("swiglu_clamp_exp")

    def followers(self, spec: ArchSpec, config: Mapping[str, object], preset: Preset) -> Iterator[tuple[str, object]]:
        """Fields that follow from others or from the tensors; laid over those that the release has."""
        inner = f"{spec.text}." if spec.text else ""

        def field(name: str) -> object:
            return field_of(config, inner + name)

        yield inner + "num_nextn_predict_layers", self.mtp
        nope, rope = field("qk_nope_head_dim"), field("qk_rope_head_dim")
        if isinstance(nope, int) and isinstance(rope, int):
            yield inner + "qk_head_dim", nope + rope
            if field("head_dim"):  # GLM-5.2 counts the part without positions, GLM-5 the part with
                same = field_of(preset.config, inner + "head_dim") == field_of(preset.config, inner + "qk_nope_head_dim")
                yield inner + "head_dim", nope if same else rope
        layers = self.layers
        dense = field("first_k_dense_replace")
        if isinstance(dense, int):
            yield inner + "mlp_layer_types", ["dense" if n < dense else "sparse" for n in range(layers)]
        indexed = {layer_of(name) for name in self.files.tensors if ".indexer.attn_k." in name}
        if "linear_heads" in spec.config:
            yield from self._kinds(inner)
            indexed |= set(range(layers))  # a linear layer's entry says nothing
        if "index_heads" in spec.config:
            yield inner + "indexer_types", ["full" if n in indexed else "shared" for n in range(layers)]
        yield from self._tokens(inner)
        if field_of(config, "vision_config.out_hidden_size") is not None:
            yield "vision_config.out_hidden_size", field("hidden_size")

    def _kinds(self, inner: str) -> Iterator[tuple[str, object]]:
        heads = self._array("attention.head_count_kv")
        linear = [n for n in range(self.layers) if n < len(heads) and heads[n] == 0]
        kinds = ["linear_attention" if n in set(linear) else "deepseek_sparse_attention" for n in range(self.layers)]
        yield f"{inner}layer_types", kinds
        yield f"{inner}linear_attn_config.kda_layers", linear
        yield f"{inner}linear_attn_config.full_attn_layers", [n for n in range(self.layers) if n not in set(linear)]

    def _tokens(self, inner: str) -> Iterator[tuple[str, object]]:
        there = {token: number for number, token in enumerate(self.tokens) if token in PICTURES.values()}
        for field, token in PICTURES.items():
            if token in there:
                yield field, there[token]
        ends = self.ends
        if ends:
            yield f"{inner}eos_token_id", ends
        pad = self.files.kv.get("tokenizer.ggml.padding_token_id")
        if pad is not None:
            yield f"{inner}pad_token_id", pad.value

    @cached_property
    def ends(self) -> list[int]:
        """The tokens that end an answer in every GLM: end of text, the user's turn, an observation."""
        found = [self.files.kv[key].value for key in (f"tokenizer.ggml.{kind}_token_id" for kind in ("eos", "eot", "eom")) if key in self.files.kv]
        if OBSERVATION in self.tokens:
            found.append(list(self.tokens).index(OBSERVATION))
        return list(dict.fromkeys(number for number in found if isinstance(number, int)))

    @cached_property
    def tokens(self) -> Sequence[object]:
        found = self.files.kv.get("tokenizer.ggml.tokens")
        return found.value.values if found is not None and isinstance(found.value, Array) else ()

    @cached_property
    def vocabulary(self) -> int:
        embedding = self.files.tensors.get("token_embd.weight")
        if embedding is None:
            raise SourceError("is missing: the file holds no language model.", file=self.files.path, tensor="token_embd.weight")
        return embedding.tensor.ne[1] if len(embedding.tensor.ne) > 1 else 1

    def _key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def whole(self, name: str, default: int | None = None) -> int:
        key = self._key(name)
        found = self.files.kv.get(key)
        if found is None and default is not None:
            return default
        if found is None or not isinstance(found.value, int) or isinstance(found.value, bool) or not 0 <= found.value < 2**31:
            what = "is missing" if found is None else f"is {str(found.value)[:60]}, a whole number is needed"
            raise SourceError(f"{key} {what}.", file=self.files.path)
        return found.value

    def real(self, name: str) -> float:
        found = self.files.kv.get(self._key(name))
        if found is None or not isinstance(found.value, int | float) or isinstance(found.value, bool) or not abs(found.value) < 1e30:
            what = "is missing" if found is None else f"is {str(found.value)[:60]}, a number is needed"
            raise SourceError(f"{self._key(name)} {what}.", file=self.files.path)
        return shortest(found.value)

    def flag(self, name: str) -> bool:
        value = self.files.kv[self._key(name)].value
        if not isinstance(value, bool):
            raise SourceError(f"{self._key(name)} is {str(value)[:60]}, which is neither true nor false.", file=self.files.path)
        return value

    def _array(self, name: str) -> Sequence[object]:
        found = self.files.kv.get(self._key(name))
        if found is None:
            return ()
        if not isinstance(found.value, Array):
            raise SourceError(f"{self._key(name)} is no array.", file=self.files.path)
        return found.value.values

    def _text(self, key: str) -> str:
        found = self.files.kv.get(key)
        if found is None or not isinstance(found.value, str):
            raise SourceError(f"{key} is {'missing' if found is None else 'no text'}.", file=self.files.path)
        return found.value


def shortest(value: object) -> float:
    """The shortest decimal that is the same float32: what the config said."""
    return float(str(np.float32(value))) if isinstance(value, int | float) else 0.0
