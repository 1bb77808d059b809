"""Megatron's tensors: which canonical rows each is made of, how other Megatron versions spell its key, which objects go with it.

Source of the key forms: docs/torch_dist.md, found by running Megatron-Core 0.12 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from glmconv.archs import Model, TensorSpec

MODEL_KEYS = ("embedding.", "decoder.", "output_layer.", "mtp.", "language_model.", "visual.")
TRAINER_KEYS = re.compile(r"(^|\.)(optimizer|chained_\d+|opt_param_scheduler|rng_state|rerun_state_machine_state|common_state)(\.|/|$)")
STATELESS = ("mlp.router", "embedding.word_embeddings", "output_layer")  # modules without Transformer Engine's `_extra_state`
VISION = "visual."  # transformers' own modules, which have none either
COMMON_STATE = "common_state/shard_"  # Megatron-Core from 0.19 on keeps a run's arguments in this object, before that in common.pt
LAYER_KEY = re.compile(r"^(?P<prefix>(?:[a-z_]+\.)*decoder\.layers\.)(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True, slots=True)
class Tile:
    """`rows` rows from row `target` of a Megatron tensor are the rows from `source` of the canonical tensor `tensor`."""

    target: int
    rows: int
    tensor: str
    source: int


@dataclass
class MegatronTensor:
    """One global Megatron tensor: shape [rows, ...], or [experts, stride, ...] when stacked; `tiles` sorted, covering each row once.

    A stack of experts is read and written expert by expert and half by half, a stack of layers (`layered`) layer by layer.
    """

    key: str
    tail: tuple[int, ...]
    stride: int
    padded: bool  # vocabulary rows: a file may hold more
    tiles: list[Tile] = field(default_factory=list)
    layered: bool = False

    @property
    def rows(self) -> int:
        last = self.tiles[-1]
        return last.target + last.rows

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows // self.stride, self.stride, *self.tail) if self.stride else (self.rows, *self.tail)


def megatron_tensors(model: Model, dialect: str, names: Mapping[str, object] | None = None) -> dict[str, MegatronTensor]:
    """Every Megatron tensor of the model (of those canonical tensors that are in `names`), tiled and checked to be tiled exactly once."""
    found: dict[str, MegatronTensor] = {}
    for name, tensor in model.tensors.items():
        if names is None or name in names:
            for move in model.megatron(tensor, dialect):
                stored = found.get(move.name)
                if stored is None:
                    stored = found[move.name] = MegatronTensor(move.name, tensor.shape[1:], move.stride, _is_vocabulary(tensor))
                stored.tiles.append(Tile(move.target, move.rows, name, move.source))
    for stored in found.values():
        stored.tiles.sort(key=lambda tile: tile.target)
        at = 0
        for tile in stored.tiles:
            if tile.target != at:
                raise AssertionError(f"{stored.key}: row {at} is covered {'twice' if tile.target < at else 'never'}")
            at += tile.rows
    return found


def stacked_layers(tensors: Mapping[str, MegatronTensor]) -> dict[str, MegatronTensor]:
    """The same tensors with all layers of the decoder in one, as Megatron saves a decoder whose layers are alike."""
    found: dict[str, MegatronTensor] = {}
    for key, stored in tensors.items():
        stack = stacked_spelling(key)
        if stack is None:
            found[key] = stored
            continue
        assert not stored.stride, f"{key}: stacks of experts in stacks of layers are not written"
        whole = found.setdefault(stack[0], MegatronTensor(stack[0], stored.tail, stored.rows, False, layered=True))
        first = stack[1] * whole.stride
        whole.tiles += [Tile(first + tile.target, tile.rows, tile.tensor, tile.source) for tile in stored.tiles]
    return found


def _is_vocabulary(tensor: TensorSpec) -> bool:
    return tensor.row.shape[0].text == "vocab"


def spellings(key: str) -> Iterator[str]:
    """The key, then the other names that Megatron versions and specs give the same tensor.

    `mtp_model_layer`: Megatron-Core's hybrid models, read by Megatron-Bridge. `mlp.linear_fc1.layer_norm_weight` in a MoE layer: the
    local (not Transformer Engine) layer spec.
    """
    yield key
    other = key.replace(".transformer_layer.", ".mtp_model_layer.") if key.startswith(("mtp.", "language_model.mtp.")) else key
    if other != key:
        yield other
    for form in (key, other):
        if form.endswith("pre_mlp_layernorm.weight"):
            yield form.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")


def stacked_spelling(key: str) -> tuple[str, int] | None:
    """The key under which all layers lie in one tensor with a first axis of layers, and this layer's number; None outside the decoder."""
    match = LAYER_KEY.match(key)
    return (match["prefix"] + match["rest"], int(match["layer"])) if match else None


def is_optimizers(key: str) -> bool:
    """Whether a key is a trainer's own state other than the objects that modules keep beside their weights."""
    return bool(TRAINER_KEYS.search(key)) and not key.startswith(COMMON_STATE)


def is_trainers(key: str) -> bool:
    """Whether a key is a trainer's own state: optimizer, schedule, random numbers. Skipped by name, never read."""
    return is_optimizers(key) or key.startswith(COMMON_STATE) or "_extra_state" in key


def extra_states(tensors: Mapping[str, MegatronTensor]) -> Iterator[tuple[str, str]]:
    """(module prefix key, object key) of each `_extra_state` that some Megatron version asks for: the union over 0.12 to 0.18.

    One per Transformer Engine module, one per expert for the grouped experts, and `core_attention` of every layer.
    """
    seen = set()
    for key, stored in tensors.items():
        module, _, leaf = key.rpartition(".")
        count = stored.rows // stored.stride if stored.stride else 1
        modules = [module]
        if "self_attention." in module:
            modules.insert(0, module[: module.index("self_attention.")] + "self_attention.core_attention")
        for name in modules:
            if name in seen or leaf not in ("weight", "bias", "layer_norm_weight") or name.endswith(STATELESS) or name.startswith(VISION):
                continue
            seen.add(name)
            yield from ((key, f"{name}._extra_state/shard_{n}_{count}") for n in range(count))
