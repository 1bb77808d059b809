"""What a pickle's names and calls become: inert records. Plain data stays plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Budget:
    """What one pickle may cost: opcodes, which is also how many items a walk over the result may meet, and roughly the bytes of its values."""

    steps: int
    memory: int


@dataclass(frozen=True, slots=True)
class Global:
    """The name of something importable; never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(slots=True, eq=False, repr=False)
class Object:
    """A call of a global that was not made: its name, its arguments, the state set on it and what was put into it afterwards."""

    cls: object
    args: tuple[object, ...] = ()
    state: object = None
    items: dict[object, object] | None = None
    elements: list[object] | None = None
    measure: int = 1  # see pickle_machine

    def add(self, measure: int) -> None:
        """Count what was put into it."""
        self.measure = (self.measure >> 7) + (measure >> 7) << 7 | max(self.measure & 127, (measure & 127) + 1)

    def field(self, name: str) -> object:
        """A member of the state, if the state is a dict."""
        return self.state.get(name) if isinstance(self.state, dict) else None

    def named(self, *names: str) -> bool:
        return isinstance(self.cls, Global) and str(self.cls) in names


@dataclass(slots=True, eq=False, repr=False)
class PersistentId:
    """A reference to something beside the pickle, such as a tensor's storage."""

    value: object
    measure: int = 1


# Calls whose result is plain data. Sets become lists; protocol 2 spells bytes as text that is to be encoded.
PLAIN = {
    Global(module, name): kind
    for module in ("builtins", "__builtin__")
    for name, kind in (("dict", "dict"), ("list", "list"), ("set", "list"), ("frozenset", "list"), ("tuple", "tuple"), ("bytes", "bytes"))
} | {Global("collections", "OrderedDict"): "dict", Global("torch", "Size"): "size", Global("_codecs", "encode"): "encode"}
