"""An `ArchSpec` bound to one config: every size a number, every canonical tensor by its name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from glmconv.archs.spec import ArchSpec, Index, Move, Role, Row, Scope, Sizes, moves
from glmconv.errors import SourceError

LIMITS = {"layers": 1024, "v_depth": 1024, "mtp": 64, "experts": 4096}  # every other size: 2**24
LARGEST = 2**24


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One canonical tensor: what the spec says of it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # empty: the model's
    row: Row
    scope: Scope
    index: Index

    @property
    def in_layers(self) -> bool:
        """Whether it lies in one of the decoder's layers (or an MTP layer, which follows them)."""
        return "{layer}" in self.scope.name

    @property
    def role(self) -> Role:
        return self.row.role

    @property
    def alias(self) -> str:
        return self.row.alias

    @property
    def mtp(self) -> bool:
        return self.scope.mtp

    @property
    def rows(self) -> int:
        return self.shape[0]

    @property
    def elements(self) -> int:
        total = 1
        for n in self.shape:
            total *= n
        return total


@dataclass(frozen=True)
class Model:
    """A spec and the sizes and sets of layers that one config gives it.

    `aliases`: whether the copies that some releases carry are among its tensors.
    """

    spec: ArchSpec
    sizes: Sizes
    layers: Mapping[str, tuple[int, ...]]
    aliases: bool = False

    @cached_property
    def tensors(self) -> Mapping[str, TensorSpec]:
        """Every canonical tensor in the spec's order: model, layers, MTP layers."""
        found: dict[str, TensorSpec] = {}
        for tensor in sorted(self._tensors(), key=lambda t: t.index["layer"] if t.in_layers else -1):
            if tensor.name in found:
                raise AssertionError(f"{self.spec.model_type}: {tensor.name} is in the table twice")
            found[tensor.name] = tensor
        return found

    def names_of(self, layers: str) -> list[str]:
        """The canonical tensors of a set of layers, copies left out."""
        return [name for name, tensor in self.tensors.items() if tensor.scope.layers == layers and not tensor.alias]

    def _tensors(self) -> Iterator[TensorSpec]:
        s = self.sizes
        for scope in self.spec.scopes:
            rows = [(row, tuple(n.of(s) for n in row.shape)) for row in scope.rows if row.when(s) and (self.aliases or not row.alias)]
            for layer in self.layers[scope.layers] if scope.layers else (0,):
                for row, shape in rows:
                    for expert in range(s["experts"]) if "{expert}" in row.name else (0,):
                        index = {"layer": layer, "block": layer, "mtp": layer - s.get("layers", 0) if scope.mtp else 0, "expert": expert}
                        yield TensorSpec((scope.name + row.name).format(**index), shape, row.dtype, row, scope, index)

    def megatron(self, tensor: TensorSpec, dialect: str) -> Iterator[Move]:
        """The tensor's moves into Megatron's tensors, full key names in them; nothing for an alias."""
        place = tensor.row.megatron_place(dialect)
        if place is not None:
            prefix = tensor.scope.megatron
            for move in moves(place, tensor.rows, tensor.index, self.sizes):
                yield Move((prefix + move.name).format(**tensor.index), move.source, move.target, move.rows, move.stride)


def field_of(config: Mapping[str, object], path: str) -> object:
    """A config field by its dotted path; None if it is not there."""
    value: object = config
    for step in path.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def text_of(spec: ArchSpec, config: Mapping[str, object]) -> Mapping[str, object]:
    """The language model's own config: the whole, or the part of it that the spec names."""
    inner = config.get(spec.text) if spec.text else config
    return inner if isinstance(inner, Mapping) else {}


def bind(
    spec: ArchSpec, config: Mapping[str, object], *, aliases: bool = False, mtp: bool = True, without: Collection[str] = (),
    file: object = "config.json",
) -> Model:  # fmt: skip
    """The spec's sizes from a config.json. SourceError names the field that is absent, no whole number, out of its limits or contradictory.

    `mtp` False leaves the MTP layers out, `without` the sets of layers of these names.
    """
    s: dict[str, int] = {}
    for size, source in spec.config.items():
        paths, _, default = source.partition("=")
        path = next((path for path in paths.split("|") if field_of(config, path) is not None), paths.partition("|")[0])
        value = field_of(config, path)
        if value is None and default:
            whole, _, part = default.partition("//")
            value = s[whole] // s[part] if part else int(default)
        s[size] = _whole(value, path, LIMITS.get(size, LARGEST), 0 if default or size == "first_dense" else 1, file)
    if not mtp:
        s["mtp"] = 0
    s |= {name: size.of(s) for name, size in spec.derived.items()}
    for rule in spec.rules:
        if not rule.holds(s):
            raise SourceError(f"does not hold: {rule.text}.", file=file, hint="Is this config.json complete and of this model?")
    layers: dict[str, tuple[int, ...]] = {}
    for name, of in spec.layers.items():
        try:
            layers[name] = () if name in without else tuple(of(s, lambda path: field_of(config, path)))
        except ValueError as error:
            raise SourceError(f"{error}.", file=file, hint="Is this config.json complete and of this model?") from None
    return Model(spec, s, layers, aliases)


def _whole(value: object, field: str, highest: int, lowest: int, file: object) -> int:
    if value is None:
        raise SourceError(f"{field} is missing.", file=file, hint="Take config.json from the model's release.")
    if not isinstance(value, int) or (isinstance(value, bool) and lowest):  # true is 1 where a flag may be absent, and nowhere else
        raise SourceError(f"{field} is {value!r}, a whole number is needed.", file=file)
    if not lowest <= value <= highest:
        raise SourceError(f"{field} is {value}, it must be {lowest} to {highest}.", file=file)
    return int(value)
