"""The keys of a model's GGUF file, as llama.cpp's converter writes them: what llama.cpp must know to run it, and its tokenizer.

Source: llama.cpp's conversion/glm.py and deepseek.py. Where configs are silent, the model's facts decide: the router's gate is a sigmoid, the
layers before the first with experts are counted from the schedule, MTP layers are those that there are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from glmconv.archs import Model, text_of
from glmconv.archs.model import field_of
from glmconv.archs.schedules import indexed
from glmconv.errors import SourceError, UnsupportedError
from glmconv.formats.gguf_general import general_entries
from glmconv.formats.gguf_mix import TABLE
from glmconv.formats.gguf_tokenizer import tokenizer_entries
from glmconv.formats.gguf_types import ESCAPED, Array, Entry, Kind, single

ARCHITECTURES = {
    "glm4_moe": "glm4moe", "glm4v_moe": "glm4moe", "glm4_moe_lite": "deepseek2", "glm_moe_dsa": "glm-dsa", "glm4": "glm4", "glm5_next": "glm5-next",
}  # fmt: skip
FILE_TYPES = {mix.name: mix.id for mix in TABLE}
QUANTIZATION_VERSION = 2
SIGMOID = 2
CONFIG = "config.json"
ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")  # transformers keeps them with the rope's parameters since 5.0
YARN = {
    "extrapolation_factor": "yarn_ext_factor", "attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow",
}  # fmt: skip
CUT = 127  # bytes that llama-quantize keeps of a string that it appends
SOURCE = "glmconv.source."
# What transformers takes where a config is silent
DEFAULTS: dict[str, object] = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "partial_rotary_factor": 0.5, "rope_theta": 10000.0}


@dataclass(frozen=True)
class ImportanceOrigin:
    """Where an importance matrix came from, as llama-quantize records it."""

    file: str
    dataset: str
    entries: int
    chunks: int


def metadata(model: Model, config: Mapping[str, object], files: Mapping[str, bytes], folder: str) -> list[Entry]:
    """Every key of the language model's file but those that `quantized` appends, in the converter's order.

    files:  those beside the weights, by name: tokenizer.json and, where there are, tokenizer_config.json, chat_template.jinja,
            generation_config.json, README.md
    folder: the name of the model's folder, from which its own is guessed
    SourceError for what is missing or broken, UnsupportedError for what llama.cpp would not run as it is meant.
    """
    architecture = ARCHITECTURES[model.spec.model_type]
    found = [Entry("general.architecture", Kind.STRING, architecture), Entry("general.type", Kind.STRING, "model")]
    found += general_entries(model, config, files, folder)
    text = text_of(model.spec, config)
    keys = _Keys(architecture, model, text)
    found += keys.entries()
    found += tokenizer_entries(
        architecture, model.sizes["vocab"], {**text, **{field: value for field, value in config.items() if value is not None}}, files
    )
    return found


def quantized(file_type: str, importance: ImportanceOrigin | None = None) -> list[Entry]:
    """The keys that llama-quantize appends. `file_type` is one of FILE_TYPES."""
    found = [
        Entry("general.quantization_version", Kind.U32, QUANTIZATION_VERSION),
        Entry("general.file_type", Kind.U32, FILE_TYPES[file_type]),
    ]
    if importance is not None:
        texts = {"file": importance.file, "dataset": importance.dataset}
        for key, text in texts.items():
            if text:
                found.append(Entry(f"quantize.imatrix.{key}", Kind.STRING, text.encode("utf-8", ESCAPED)[:CUT].decode("utf-8", ESCAPED)))
        found.append(Entry("quantize.imatrix.entries_count", Kind.U32, importance.entries))
        if importance.chunks > 0:
            found.append(Entry("quantize.imatrix.chunks_count", Kind.U32, importance.chunks))
    return found


def embedded(files: Mapping[str, bytes]) -> list[Entry]:
    """Files that ride along under keys of glmconv's own, so that the way back gives them again. llama.cpp ignores them."""
    found = []
    for name, content in files.items():
        try:
            found.append(Entry(SOURCE + name, Kind.STRING, content.decode("utf-8")))
        except UnicodeDecodeError as problem:
            raise SourceError("is not UTF-8, so that it cannot ride along.", file=name, offset=problem.start) from None
    return found


def embedded_files(kv: Mapping[str, tuple[Kind, object]]) -> dict[str, bytes]:
    """The files that `embedded` put there, by name. Who writes them must check the names."""
    texts = {key.removeprefix(SOURCE): value for key, (_, value) in kv.items() if key.startswith(SOURCE)}
    return {name: text.encode("utf-8", ESCAPED) for name, text in texts.items() if isinstance(text, str)}


class _Keys:
    """The keys of one model. Each method gives one architecture's, or a group that several share."""

    def __init__(self, architecture: str, model: Model, text: Mapping[str, object]) -> None:
        self.architecture = architecture
        self.model = model
        self.s = model.sizes
        self.text = text
        rope = text.get("rope_parameters") or text.get("rope_scaling")
        self.rope: Mapping[str, object] = rope if isinstance(rope, Mapping) else {}
        self.latent = "kv_rank" in model.sizes
        self.next = architecture == "glm5-next"

    def entries(self) -> list[Entry]:
        s = self.s
        found = [
            self.number("block_count", self.blocks),
            self.number("context_length", self.whole("max_position_embeddings")),
            self.number("embedding_length", s["hidden"]),
            self.number("feed_forward_length", s["ffn"]),
            self.number("attention.head_count", s["heads"]),
            self.key_heads(),
            *self.positions(),
            self.real("attention.layer_norm_rms_epsilon", self.field("rms_norm_eps"), "rms_norm_eps"),
        ]
        if "experts" in s:
            found += self.experts()
        if self.next:
            return [*found, *self.next_model()]
        found += self.latent_attention() if self.latent else self.grouped_attention()
        if "experts" in s:
            found += self.expert_sizes()
        if self.latent:
            found.append(self.number("rope.dimension_count", s["rope"]))
        found += self.mtp_layers()
        if "index_heads" in s:
            found += self.indexer()
            found.append(self.index_types(self.model.layers["indexed"]))
        return found

    def key(self, name: str, kind: Kind, value: object) -> Entry:
        return Entry(f"{self.architecture}.{name}", kind, value)

    def number(self, name: str, value: int) -> Entry:
        return self.key(name, Kind.U32, value)

    def real(self, name: str, value: object, field: str) -> Entry:
        return self.key(name, Kind.F32, single(value, field, CONFIG))

    def field(self, name: str) -> object:
        """A field of the config, or what transformers takes for it. SourceError if neither is there."""
        value = self.rope.get(name) if name in ROPE_FIELDS and name in self.rope else self.text.get(name)
        value = DEFAULTS.get(name) if value is None else value
        if value is None:
            raise SourceError(f"{name} is missing.", file=CONFIG, hint="Take config.json from the model's release.")
        return value

    def whole(self, name: str, at: Mapping[str, object] | None = None) -> int:
        value = self.field(name) if at is None else at.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**32:
            raise SourceError(f"{name} is {str(value)[:60]}, a whole number is needed.", file=CONFIG)
        return value

    def flag(self, name: str) -> bool:
        value = self.field(name)
        if not isinstance(value, bool):
            raise SourceError(f"{name} is {str(value)[:60]}, which is neither true nor false.", file=CONFIG)
        return value

    @property
    def blocks(self) -> int:
        """The decoder's layers and the MTP layers behind them."""
        return self.s["layers"] + self.mtp

    @property
    def mtp(self) -> int:
        """Those that there are: a fine-tune may have lost them and keep the number in its config."""
        return len(self.model.layers.get("mtp", ()))

    @property
    def head_size(self) -> int:
        return self.s["kv_rank"] + self.s["rope"] if self.latent else self.s["head_dim"]

    def key_heads(self) -> Entry:
        if self.next:  # no keys in layers of linear attention
            linear = set(self.model.layers["linear"])
            heads = [0 if layer in linear else 1 for layer in range(self.blocks)]
            return self.key("attention.head_count_kv", Kind.ARRAY, Array(Kind.I32, heads))
        return self.number("attention.head_count_kv", 1 if self.latent else self.s["groups"])

    def positions(self) -> Iterator[Entry]:
        """How positions are told: scaling, sections, base."""
        kind = self.rope.get("rope_type", self.rope.get("type", "default"))
        if kind in ("linear", "yarn"):
            yield self.key("rope.scaling.type", Kind.STRING, kind)
            yield self.real("rope.scaling.factor", self.rope.get("factor"), "the rope's factor")
            if kind == "yarn":
                yield self.number("rope.scaling.original_context_length", self.whole("original_max_position_embeddings", self.rope))
                for name, key in YARN.items():
                    if self.rope.get(name) is not None:
                        yield self.real(f"rope.scaling.{key}", self.rope[name], name)
        elif kind != "default":
            raise UnsupportedError(f"has rope_type {str(kind)[:60]}; known are default, linear and yarn.", file=CONFIG)
        sections = self.rope.get("mrope_section")
        if sections is not None:
            if not isinstance(sections, Sequence) or len(sections) > 4 or not all(type(n) is int and 0 <= n < 2**31 for n in sections):
                raise SourceError("mrope_section is not up to four whole numbers.", file=CONFIG)
            yield self.key("rope.dimension_sections", Kind.ARRAY, Array(Kind.I32, [*sections, *[0] * (4 - len(sections))]))
        if not self.next:  # whose attention has no positions
            yield self.real("rope.freq_base", self.field("rope_theta"), "rope_theta")

    def experts(self) -> Iterator[Entry]:
        yield self.number("expert_count", self.s["experts"])
        yield self.number("expert_used_count", self.s["top_k"])
        yield self.number("expert_group_count", self.whole("n_group"))
        yield self.number("expert_group_used_count", self.whole("topk_group"))
        if self.latent:
            yield self.number("expert_gating_func", SIGMOID)

    def head_lengths(self) -> Iterator[Entry]:
        yield self.number("attention.key_length", self.head_size)
        yield self.number("attention.value_length", self.s["kv_rank"] if self.latent else self.s["head_dim"])

    def grouped_attention(self) -> Iterator[Entry]:
        yield from self.head_lengths()
        part = self.field("partial_rotary_factor")
        if not isinstance(part, int | float) or not 0 < part <= 1:
            raise SourceError(f"partial_rotary_factor is {str(part)[:60]}, which is not above 0 and at most 1.", file=CONFIG)
        yield self.number("rope.dimension_count", int(self.head_size * part))

    def latent_attention(self) -> Iterator[Entry]:
        if self.architecture == "glm-dsa":
            yield from self.head_lengths()
        yield self.leading_dense()
        yield self.number("vocab_size", self.s["vocab"])
        yield from self.ranks()
        if self.architecture != "glm-dsa":
            yield from self.head_lengths()
        yield from self.latent_lengths()

    def ranks(self) -> Iterator[Entry]:
        yield self.number("attention.q_lora_rank", self.s["q_rank"])
        yield self.number("attention.kv_lora_rank", self.s["kv_rank"])

    def latent_lengths(self) -> Iterator[Entry]:
        yield self.number("attention.key_length_mla", self.s["nope"] + self.s["rope"])
        yield self.number("attention.value_length_mla", self.s["v_dim"])

    def leading_dense(self) -> Entry:
        """The layers before the first with experts, whatever way the config says that."""
        dense = list(self.model.layers["dense"])
        if dense != list(range(len(dense))):
            raise UnsupportedError("has layers without experts behind layers with experts: GGUF cannot say that.", file=CONFIG)
        return self.number("leading_dense_block_count", len(dense))

    def expert_sizes(self) -> Iterator[Entry]:
        yield self.number("expert_feed_forward_length", self.s["moe_ffn"])
        yield self.number("expert_shared_count", self.s["shared"])
        if not self.latent:
            yield self.leading_dense()
            yield self.number("expert_gating_func", SIGMOID)
        yield self.real("expert_weights_scale", self.field("routed_scaling_factor"), "routed_scaling_factor")
        if self.flag("norm_topk_prob") or not self.latent:
            yield self.key("expert_weights_norm", Kind.BOOL, self.flag("norm_topk_prob"))

    def mtp_layers(self) -> Iterator[Entry]:
        """How many; none is said where the config says so itself, but by two architectures only."""
        if self.mtp or (self.text.get("num_nextn_predict_layers") == 0 and self.architecture in ("glm4moe", "glm-dsa")):
            yield self.number("nextn_predict_layers", self.mtp)

    def indexer(self) -> Iterator[Entry]:
        yield self.number("attention.indexer.head_count", self.s["index_heads"])
        yield self.number("attention.indexer.key_length", self.s["index_dim"])
        yield self.number("attention.indexer.top_k", self.whole("index_topk"))

    def index_types(self, full: Collection[int]) -> Entry:
        """Which of the decoder's layers select for themselves."""
        types = [layer in full for layer in range(self.s["layers"])]
        return self.key("attention.indexer.types", Kind.ARRAY, Array(Kind.BOOL, types))

    def next_model(self) -> Iterator[Entry]:
        """GLM-5.3-Flash from its vocabulary on: nearly what deepseek2 has and more, in another order."""
        yield self.number("vocab_size", self.s["vocab"])
        yield self.key("attention.layer_norm_epsilon", Kind.F32, single(1e-6, "layer_norm_epsilon", CONFIG))
        yield from self.mtp_layers()
        yield from self.linear_attention()
        yield from self.ranks()
        yield self.number("rope.dimension_count", self.s["rope"])
        yield from self.head_lengths()
        yield from self.latent_lengths()
        yield from self.indexer()
        yield self.number("attention.indexer.kpool", self.s["pool"])
        yield self.key("attention.indexer.kpool_select_tail", Kind.BOOL, self.flag("index_kpool_always_select_tail"))
        yield self.index_types(indexed("")(self.s, lambda path: field_of(self.text, path)))  # of every layer, whatever its attention
        yield self.number("hyper_connection.count", self.s["streams"])
        yield self.number("hyper_connection.sinkhorn_iterations", self.whole("hc_sinkhorn_iters"))
        yield self.real("hyper_connection.epsilon", self.field("hc_eps"), "hc_eps")
        yield self.leading_dense()
        yield from self.expert_sizes()
        limit = single(self.field("swiglu_limit"), "swiglu_limit", CONFIG)
        for key in ("swiglu_clamp_exp", "swiglu_clamp_shexp"):
            yield self.key(key, Kind.ARRAY, Array(Kind.F32, [limit] * self.blocks))

    def linear_attention(self) -> Iterator[Entry]:
        linear = self.text.get("linear_attn_config")
        bound = linear.get("gate_lower_bound") if isinstance(linear, Mapping) else self.field("linear_lower_bound")
        yield self.number("ssm.conv_kernel", self.s["kernel"])
        yield self.number("kda.head_dim", self.s["linear_dim"])
        yield self.real("kda.gate_lower_bound", bound, "gate_lower_bound")
