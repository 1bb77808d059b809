"""What a model needs to be served: weights on each GPU, by target and parallel sizes, and how many tokens the rest of the memory holds.

Sources: what vLLM and SGLang keep in their caches per token (their MLA and DSA backends' cache shapes; docs/multi-node.md and docs/quantization.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from glmconv.archs import Model, Role, bind, field_of, preset_named, text_of
from glmconv.archs.model import TensorSpec
from glmconv.codecs.codec import Grid
from glmconv.convert import Options
from glmconv.dtypes import BY_NAME
from glmconv.errors import CapacityError
from glmconv.formats.selection import Selection, select
from glmconv.formats.serving import SIZES, Parallel, problem
from glmconv.targets import GGUF, parse_target

TARGETS = ("hf", "fp8", "fp8:channel", "awq:auto")  # what is compared if no target is named
LINEAR = (Role.LINEAR, Role.EXPERT)
ENGINES_OWN = "what is left is before the engine takes its own: activations, CUDA graphs, buffers; 5 to 10 % of the memory is usual"
BYTES, SCALE = 2, 4  # of a value in a bfloat16 cache, and of the float32 scale of an indexer's FP8 key
KEY_BLOCK = 128


@dataclass(frozen=True)
class Fit:
    """One target at one size. `weights`, `left` and `kv_per_token` are bytes of one GPU, `tokens` those of all sequences together that fit
    then, in the cache of one group of `tp` GPUs.

    `problem` is empty if it fits; `mtp` is the part of `weights` that is the MTP layers', which engines load for speculative decoding only.
    """

    target: str
    tp: int
    ep: int
    gpus: int
    weights: int
    mtp: int
    left: int
    kv_per_token: int
    tokens: int
    problem: str


@dataclass(frozen=True)
class ServingPlan:
    """What fits into GPUs of `gpu_memory` bytes. `context` is the longest sequence that the config allows, 0 if it does not say."""

    model: str
    gpu_memory: int
    context: int
    fits: list[Fit]
    notes: list[str]


@dataclass(frozen=True)
class Family:
    """Tensors alike: one of them, the stored bytes of one, and how many there are. `grid` is None where they are not encoded."""

    tensor: TensorSpec
    size: int
    count: int
    grid: Grid | None


def serving_plan(source: str | Path, gpu_memory: int, to: Sequence[str] = (), *, options: Options | None = None) -> ServingPlan:
    """What of a checkpoint fits, by its headers and config; see `preset_serving_plan`."""
    options = options or Options()
    with options.open(source) as checkpoint:
        dtypes = {name: tensor.dtype.name for name, tensor in checkpoint}
        return plan_of(checkpoint.arch, str(source), checkpoint.config, dtypes, gpu_memory, to, options)


def preset_serving_plan(name: str, gpu_memory: int, to: Sequence[str] = (), *, options: Options | None = None) -> ServingPlan:
    """What of a released model fits, by its published config alone. UsageError for a preset or target that is not known."""
    options = options or Options()
    spec, preset = preset_named(name)
    model = bind(spec, preset.config, mtp=options.mtp)
    dtypes = {name: tensor.dtype or "bfloat16" for name, tensor in model.tensors.items()}
    return plan_of(model, preset.name, preset.config, dtypes, gpu_memory, to, options)


def plan_of(
    model: Model, name: str, config: Mapping[str, object], dtypes: Mapping[str, str], gpu_memory: int, to: Sequence[str], options: Options
) -> ServingPlan:  # fmt: skip
    """`dtypes`: of each canonical tensor that there is. A size asked for by `options.serve_tp` is the only one."""
    sizes = (options.serve_tp,) if options.serve_tp > 1 else SIZES
    fits, notes = [], [ENGINES_OWN]
    for text in to or TARGETS:
        target = parse_target(text.partition("=")[0], None)
        if target.format == GGUF:
            notes.append(f"{target.to}: llama.cpp deals out whole layers: each GPU needs the file's size divided by their number, and a layer more")
            continue
        try:
            selection = select(model, dtypes, target.codec, options.quant) if target.codec else None
        except CapacityError as refused:
            notes.append(refused.line)
            continue
        made = families(model, dtypes, selection)
        label = selection.codec.name if selection else target.to
        fits += [fit(label, model, made, Parallel(size, options.serve_ep), gpu_memory) for size in sizes]
    context = field_of(text_of(model.spec, config), "max_position_embeddings")
    return ServingPlan(name, gpu_memory, context if isinstance(context, int) else 0, fits, notes)


def families(model: Model, dtypes: Mapping[str, str], selection: Selection | None) -> list[Family]:
    """The tensors, those that are alike together: a model has ten thousands."""
    found: dict[tuple[str, str, str, bool], list[str]] = {}
    for name, dtype in dtypes.items():
        tensor = model.tensors[name]
        if not tensor.alias:
            encoded = bool(selection and name in selection.encoded)
            found.setdefault((tensor.scope.title, tensor.row.name, dtype, encoded), []).append(name)
    return [
        Family(model.tensors[names[0]], stored(model.tensors[names[0]], dtype, selection if encoded else None), len(names), grid(selection, encoded))
        for (_, _, dtype, encoded), names in found.items()
    ]


def grid(selection: Selection | None, encoded: bool) -> Grid | None:
    return selection.codec.grid if selection and encoded else None


def stored(tensor: TensorSpec, dtype: str, selection: Selection | None) -> int:
    """Bytes of one tensor as the target stores it."""
    if selection is None:
        return tensor.elements * BY_NAME[dtype].itemsize
    return sum(part.size for part in selection.codec.parts((tensor.shape[0], tensor.shape[1]), BY_NAME[dtype]))


def fit(target: str, model: Model, made: Iterable[Family], parallel: Parallel, memory: int) -> Fit:
    """One size's answer: first whether the weights can be cut so, then whether they fit."""
    weights = mtp = 0
    wrong = "" if model.sizes["heads"] % parallel.tensor == 0 else f"{model.sizes['heads']} attention heads cannot be split among {parallel.tensor}"
    for family in made:
        tensor = family.tensor
        if not wrong and tensor.role in LINEAR and (why := problem(tensor, model, family.grid or Grid(), parallel)):
            wrong = f"{tensor.name}: {why}"
        size = family.count * family.size // copies(tensor, model, parallel)
        weights += size
        mtp += size if tensor.mtp else 0
    left, per_token = memory - weights, kv_bytes(model, parallel.tensor)
    if not wrong and left <= 0:
        wrong = f"{-left / 1e9:,.1f} GB a GPU too much"
    gpus = max(parallel.tensor, parallel.expert)
    tokens = left // per_token if left > 0 and per_token else 0
    return Fit(target, parallel.tensor, parallel.expert, gpus, weights, mtp, left, per_token, tokens, wrong)


def copies(tensor: TensorSpec, model: Model, parallel: Parallel) -> int:
    """Among how many GPUs a tensor's bytes are divided; what is not split lies whole on each."""
    if tensor.role is Role.EXPERT:
        return max(parallel.tensor, parallel.expert)
    if tensor.row.parallel == "none" or tensor.role not in (Role.LINEAR, Role.EMBEDDING, Role.HEAD):
        return 1
    if tensor.row.parallel == "kv":
        return min(parallel.tensor, model.sizes["groups"])
    return parallel.tensor


def kv_bytes(model: Model, tp: int) -> int:
    """Bytes that one token takes in the cache of one GPU, in bfloat16, MTP layers not counted.

    GQA: keys and values of this GPU's KV heads, each GPU having at least one. MLA: the latent and the rotary key, whole on every GPU. An indexer:
    its key in FP8 and a scale for each 128 values. Linear attention keeps a state for each sequence and nothing for a token.
    """
    s, layers = model.sizes, model.layers
    attention = len(layers["attention"]) if "attention" in layers else s["layers"]
    if "kv_rank" in s:
        indexed = len(layers.get("indexed", ()))
        index_key = s["index_dim"] + SCALE * -(-s["index_dim"] // KEY_BLOCK) if indexed else 0
        return attention * (s["kv_rank"] + s["rope"]) * BYTES + indexed * index_key
    return attention * 2 * -(-s["groups"] // min(tp, s["groups"])) * s["head_dim"] * BYTES
