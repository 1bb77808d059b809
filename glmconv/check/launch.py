"""A Megatron command line held against a checkpoint: would a run that is launched so have these tensors?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from glmconv.checkpoint import Checkpoint
from glmconv.formats.megatron_args import to_args
from glmconv.formats.megatron_flags import SWITCHES, Flags, plain, read_flags, schedule_text

# What decides which tensors there are and of which shape; the rest changes what is computed with them
SHAPES = {
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "vocab_size", "padded_vocab_size",
    "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "num_experts", "moe_layer_freq", "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size", "add_bias_linear", "add_qkv_bias", "qk_layernorm", "multi_latent_attention",
    "untie_embeddings_and_output_weights",
}  # fmt: skip
PADDED = ("vocab_size", "padded_vocab_size")
ABSENT_SAYS = ("add_qkv_bias", "qk_layernorm", "multi_latent_attention", "add_bias_linear", "untie_embeddings_and_output_weights", "swiglu")
LATENT_IGNORES = ("add_qkv_bias", "num_query_groups", "group_query_attention", "rotary_percent")


@dataclass(frozen=True)
class Disagreement:
    """`flag` says one thing, config.json another; `shape` tells that the weights contradict it too."""

    flag: str
    said: str
    config: str
    shape: bool

    @property
    def line(self) -> str:
        return f"{self.flag} {self.said}: config.json says {self.config}".replace("  ", " ")


def disagreements(checkpoint: Checkpoint, words: Sequence[str] | Flags) -> list[Disagreement]:
    """Where the arguments of a Megatron run (MODEL_ARGS and any others) contradict the checkpoint's config, shapes first.

    The MTP layers are left out: a run may train without. Flags that say nothing of the model, unknown ones too, are passed over.
    """
    flags = words if isinstance(words, Flags) else read_flags(words)
    wanted = to_args(checkpoint.config, checkpoint.arch)
    ignored = LATENT_IGNORES if wanted.get("multi_latent_attention") else ()
    found = [
        Disagreement(_flag(key), _text(said), _text(wanted.get(key)), key in SHAPES and not _padding(key, said, wanted))
        for key, said in _said(flags)
        if key not in ignored and key in wanted and not _same(key, said, wanted[key], wanted)
    ]
    return sorted(found, key=lambda one: not one.shape)


def _said(flags: Flags) -> Iterator[tuple[str, object]]:
    """What the command line says, and what it says by leaving a switch out."""
    yield from ((key, value) for key, value in flags.args.items() if key != "mtp_num_layers")
    if flags.describes_a_model:
        for key, value in SWITCHES.values():
            if key in ABSENT_SAYS and key not in flags.args:
                yield key, not value


def _same(key: str, said: object, config: object, wanted: dict[str, object]) -> bool:
    if key == "moe_layer_freq" and isinstance(config, list):
        layers = wanted["num_layers"]
        return said == config or (isinstance(said, int) and said > 0 and config == [int(i % said == 0) for i in range(int(str(layers)))])
    if isinstance(said, (int, float)) and isinstance(config, (int, float)):
        return float(said) == float(config)
    return said == config


def _padding(key: str, said: object, wanted: dict[str, object]) -> bool:
    """A larger vocabulary is one that is padded: rows more, which loaders fill."""
    return key in PADDED and isinstance(said, int) and said > int(str(wanted["vocab_size"]))


def _flag(key: str) -> str:
    return next((f"--{name}" for name, (arg, _) in SWITCHES.items() if arg == key), f"--{key.replace('_', '-')}")


def _text(value: object) -> str:
    if isinstance(value, list):
        return schedule_text(value)
    return "nothing" if value is None else str(plain(value))
