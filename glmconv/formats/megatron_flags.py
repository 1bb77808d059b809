"""A model as the command line of a Megatron run, and such a command line read back: slime's and miles' MODEL_ARGS.

Source: slime's and miles' scripts/models/*.sh, and Megatron-LM's argument parser for what a flag is called in `args`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from glmconv.archs import Model
from glmconv.formats.megatron_args import to_args

# flags with a value; the name in `args` is the flag's own with underscores
VALUES = (
    "num-layers", "hidden-size", "ffn-hidden-size", "num-attention-heads", "num-query-groups", "kv-channels", "vocab-size", "padded-vocab-size",
    "normalization", "norm-epsilon", "position-embedding-type", "rotary-percent", "rotary-base", "q-lora-rank", "kv-lora-rank", "qk-head-dim",
    "qk-pos-emb-head-dim", "v-head-dim", "num-experts", "moe-layer-freq", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size",
    "moe-router-topk", "moe-router-topk-scaling-factor", "moe-router-score-function", "moe-router-dtype", "mtp-num-layers",
)  # fmt: skip
# flags without: what they say in `args`
SWITCHES: dict[str, tuple[str, bool]] = {
    "disable-bias-linear": ("add_bias_linear", False), "add-qkv-bias": ("add_qkv_bias", True), "qk-layernorm": ("qk_layernorm", True),
    "group-query-attention": ("group_query_attention", True), "multi-latent-attention": ("multi_latent_attention", True),
    "swiglu": ("swiglu", True), "untie-embeddings-and-output-weights": ("untie_embeddings_and_output_weights", True),
    "no-position-embedding": ("add_position_embedding", False), "rotary-interleaved": ("rotary_interleaved", True),
    "moe-router-pre-softmax": ("moe_router_pre_softmax", True), "moe-router-enable-expert-bias": ("moe_router_enable_expert_bias", True),
    "moe-grouped-gemm": ("moe_grouped_gemm", True),
}  # fmt: skip
ATTENTION = ("num-attention-heads", "group-query-attention", "num-query-groups", "kv-channels", "qk-layernorm", "add-qkv-bias")
LATENT = ("num-attention-heads", "multi-latent-attention", "qk-layernorm", "q-lora-rank", "kv-lora-rank", "qk-head-dim", "qk-pos-emb-head-dim",
          "v-head-dim", "kv-channels")  # fmt: skip
MODEL = ("num-layers", "hidden-size", "ffn-hidden-size", "vocab-size", "disable-bias-linear", "swiglu", "untie-embeddings-and-output-weights",
         "normalization", "norm-epsilon", "position-embedding-type", "no-position-embedding", "rotary-base", "rotary-interleaved")  # fmt: skip
EXPERTS = ("num-experts", "moe-layer-freq", "moe-ffn-hidden-size", "moe-shared-expert-intermediate-size", "moe-router-topk",
           "moe-router-topk-scaling-factor", "moe-router-score-function", "moe-router-pre-softmax", "moe-router-enable-expert-bias",
           "moe-router-dtype", "moe-grouped-gemm")  # fmt: skip
# Of a run, not of a model; a frozen router bias is how a released model is trained on
TRAINING = ("--moe-router-bias-update-rate 0", "--moe-router-load-balancing-type seq_aux_loss", "--moe-token-dispatcher-type alltoall",
            "--moe-permute-fusion", "--moe-aux-loss-coeff 0")  # fmt: skip
DEFAULTS = {"norm-epsilon": 1e-5}  # Megatron's own, left out
LONGEST = 4096  # layers in a schedule, and characters in its text
TERM = re.compile(r"\[([\d, ]{1,4096})\](?:\*(\d{1,4}))?")
INTEGER, REAL = re.compile(r"-?\d{1,15}\Z"), re.compile(r"-?\d{1,15}(\.\d{0,15})?(e[+-]?\d{1,2})?\Z", re.IGNORECASE)


def megatron_flags(config: Mapping[str, object], model: Model) -> list[str]:
    """The flags of a run that trains this model, each with its value, as slime's MODEL_ARGS spell them."""
    args = to_args(config, model)
    latent = bool(args.get("multi_latent_attention"))
    names = [*MODEL, *(LATENT if latent else (*ATTENTION, "rotary-percent")), *(EXPERTS if args.get("num_experts") else ())]
    lines = [line for name in names for line in _line(name, args)]
    return [*lines, *(TRAINING if args.get("num_experts") else ()), *model.spec.megatron_flags]


def _line(name: str, args: Mapping[str, object]) -> Iterator[str]:
    if name in SWITCHES:
        key, on = SWITCHES[name]
        if args.get(key) is on:
            yield f"--{name}"
        return
    value = args.get(name.replace("-", "_"))
    if value is not None and value != DEFAULTS.get(name):
        yield f"--{name} {schedule_text(value) if isinstance(value, list) else plain(value)}"


def plain(value: object) -> object:
    """A whole float as slime writes it: without a point, where Megatron's argument is a whole number too."""
    return int(value) if isinstance(value, float) and value.is_integer() and value > 1 else value


def schedule_text(layers: Sequence[int]) -> str:
    """`[0]*3+[1]*89`: one entry a layer, in runs."""
    runs: list[list[int]] = []
    for flag in layers:
        if runs and runs[-1][0] == flag:
            runs[-1][1] += 1
        else:
            runs.append([flag, 1])
    return "+".join(f"[{flag}]*{count}" for flag, count in runs)


def schedule_of(text: str) -> list[int] | int | None:
    """The schedule that `[0]*3+[1]*89`, `([1]*48)`, `[0, 1, 1]` or `1` spells; None if it spells none. Nothing is evaluated."""
    text = text.strip("'\"() ")
    if text.isascii() and text.isdigit() and len(text) < 5:
        return int(text)
    layers: list[int] = []
    for part in text.split("+") if len(text) <= LONGEST else ["?"]:
        term = TERM.fullmatch(part.strip("() "))
        if not term:
            return None
        layers += [int(n) for n in term[1].split(",") if n.strip()] * min(int(term[2] or 1), LONGEST)
        if len(layers) > LONGEST:
            return None
    return layers


@dataclass(frozen=True)
class Flags:
    """A command line of a Megatron run: what it says under the names of `args`, and the flags that say nothing of a checkpoint."""

    args: Mapping[str, object]
    others: tuple[str, ...]

    @property
    def describes_a_model(self) -> bool:
        """Whether it is MODEL_ARGS: then a switch that is not there says something too."""
        return "num_layers" in self.args


def read_flags(words: Sequence[str]) -> Flags:
    """Read a command line, whatever is in it; a flag that comes twice counts as it comes last, as in Megatron."""
    args: dict[str, object] = {}
    others: list[str] = []
    at = 0
    while at < len(words):
        name, given, value = words[at].removeprefix("--").partition("=")
        at += 1
        if not words[at - 1].startswith("--"):
            continue  # a value of a flag that is not ours
        if name in SWITCHES:
            key, said = SWITCHES[name]
            args[key] = said
        elif name in VALUES:
            if not given:
                value = words[at] if at < len(words) else ""
                at += 1
            args[name.replace("-", "_")] = _value(name, value)
        else:
            others.append(f"--{name}")
    return Flags(args, tuple(others))


def _value(name: str, text: str) -> object:
    if name == "moe-layer-freq":
        return schedule_of(text)
    if INTEGER.match(text):
        return int(text)
    return float(text) if REAL.match(text) else text
