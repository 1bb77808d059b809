"""Which tensors a quantized target encodes: decided by each one's role in the table, fused partners and a layer's experts together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from glmconv.archs import Model, TensorSpec
from glmconv.archs.spec import Role
from glmconv.codecs.codec import Codec
from glmconv.errors import CapacityError, UsageError
from glmconv.formats.serving import QUANTIZED, Parallel, problem, share

MODULES = (Role.LINEAR, Role.EXPERT, Role.HEAD, Role.ROUTER, Role.PLAIN, Role.VISION)  # those that are linear modules, whether quantized or not
Partners = tuple[str, str]


@dataclass(frozen=True)
class QuantOptions:
    """`keep`: regular expressions of names to leave alone; `first`, `last`: so many layers too; `ragged`: encode even what no engine loads."""

    keep: tuple[str, ...] = ()
    first: int = 0
    last: int = 0
    ragged: bool = False
    serve_tp: int = 1
    serve_ep: int = 1
    strict: bool = True

    @property
    def document(self) -> dict[str, object]:
        """What of it decides bytes, for the plan."""
        chosen: dict[str, object] = {"keep": list(self.keep), "first_layers_bf16": self.first, "last_layers_bf16": self.last}
        return chosen | {"ragged": self.ragged, "serve_tp": self.serve_tp, "serve_ep": self.serve_ep, "nonfinite": "error" if self.strict else "keep"}


@dataclass(frozen=True)
class Selection:
    """`encoded`: canonical names. `kept`: full paths of the linear modules that are not, sorted. `notes`: what was left out, and why."""

    codec: Codec
    encoded: frozenset[str]
    kept: tuple[str, ...]
    notes: tuple[str, ...]


def select(model: Model, names: Iterable[str], codec: Codec, options: QuantOptions) -> Selection:
    """UsageError for a wrong expression, CapacityError where the codec's group divides no expert."""
    parallel = Parallel(options.serve_tp, options.serve_ep)
    tensors = [model.tensors[name] for name in names]
    chosen = [tensor for tensor in tensors if tensor.role in QUANTIZED]
    codec = codec.fitted(sorted({share(t, model, parallel)[1] or t.shape[1] for t in chosen if t.role is Role.EXPERT}))
    asked = Asked(options)
    left: dict[Partners, str] = {}
    for tensor in chosen:
        reason = asked(tensor, model) or _reason(tensor, model, codec, parallel, options.ragged)
        if reason:
            left.setdefault(partners(tensor), "" if reason == ASKED else f"{tensor.name}: {reason}")
    encoded = frozenset(tensor.name for tensor in chosen if partners(tensor) not in left)
    if not encoded:
        why = next((f" ({reason})" for reason in left.values() if reason), "")
        raise CapacityError(
            f"--to {codec.name}: not one weight would be quantized{why}.", hint="Take fp8:channel, which divides everywhere, or --ragged quantize."
        )
    kept = {path for t in tensors if t.role in MODULES and t.name.endswith(".weight") and t.name not in encoded for path in paths(t, model)}
    return Selection(codec, encoded, tuple(sorted(kept)), tuple(_notes(left, chosen, codec)))


def paths(tensor: TensorSpec, model: Model) -> set[str]:
    """The module's path, and others by which engines ask for it."""
    scope = tensor.scope.name.format(**tensor.index)
    own = {tensor.name.removesuffix(".weight"), *(scope + path for path in tensor.row.asked)}
    return own | {other + path.removeprefix(prefix) for path in own for prefix, other in model.spec.asked.items() if path.startswith(prefix)}


def partners(tensor: TensorSpec) -> Partners:
    """What serving engines fuse and must find in one form: the parts of a fused module, and all experts of a layer."""
    layer = tensor.scope.name.format(**tensor.index)
    if tensor.role is Role.EXPERT:
        return layer, "experts"
    return layer, tensor.row.fused or tensor.row.name


ASKED = "asked for"


class Asked:
    """Whether the user wants a tensor left as it is."""

    def __init__(self, options: QuantOptions) -> None:
        self.first, self.last = options.first, options.last
        try:
            self.patterns = [re.compile(text) for text in options.keep]
        except re.error as error:
            raise UsageError(f"--keep {error.pattern!r} is no regular expression: {error.msg}.") from error

    def __call__(self, tensor: TensorSpec, model: Model) -> str:
        layer, layers = tensor.index["layer"], model.sizes["layers"]
        main = tensor.in_layers and not tensor.mtp
        if main and (layer < self.first or layer >= layers - self.last):
            return ASKED
        return ASKED if any(pattern.search(tensor.name) for pattern in self.patterns) else ""


def _reason(tensor: TensorSpec, model: Model, codec: Codec, parallel: Parallel, ragged: bool) -> str:
    refused = codec.refuses((tensor.shape[0], tensor.shape[1]))
    if refused:
        return refused
    return "" if ragged else problem(tensor, model, codec.grid, parallel)


def _notes(left: Mapping[Partners, str], chosen: Iterable[TensorSpec], codec: Codec) -> Iterable[str]:
    """One line for each reason, whatever the number of layers it holds in."""
    reasons: dict[str, list[str]] = {}
    for why in left.values():
        if why:
            name, _, reason = why.partition(": ")
            reasons.setdefault(reason, []).append(name)
    groups = {key for key in left if left[key]}
    for reason, names in reasons.items():
        count = sum(1 for tensor in chosen if partners(tensor) in groups and left[partners(tensor)].endswith(reason))
        stay = f"{count:,} tensors stay as they are" if count > 1 else "one tensor stays as it is"
        yield f"{stay}, for no serving engine would load {'them' if count > 1 else 'it'} as {codec.name}: {names[0]}: {reason}"
