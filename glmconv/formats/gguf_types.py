"""The values and element types of GGUF v3, and how both are spelled in bytes.

Source: ggml's docs/gguf.md and gguf.cpp, ggml.h's `ggml_type`, ggml-common.h for the sizes of blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

from glmconv.codecs.ggml import TYPES, GgmlType
from glmconv.errors import SourceError


class Kind(IntEnum):
    """The type of a value."""

    U8 = 0
    I8 = 1
    U16 = 2
    I16 = 3
    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    U64 = 10
    I64 = 11
    F64 = 12


FORMATS = {
    Kind.U8: "B", Kind.I8: "b", Kind.U16: "H", Kind.I16: "h", Kind.U32: "I", Kind.I32: "i", Kind.F32: "f", Kind.BOOL: "?", Kind.U64: "Q",
    Kind.I64: "q", Kind.F64: "d",
}  # fmt: skip
SIZES = {kind: struct.calcsize("<" + code) for kind, code in FORMATS.items()}
ESCAPED = "surrogateescape"  # strings are UTF-8, but llama-quantize cuts some after 127 bytes, wherever that is


@dataclass(frozen=True)
class Array:
    """Values of one kind, which may be arrays."""

    kind: Kind
    values: Sequence[object]


class Value(NamedTuple):
    """What a key says: a number, a bool, a string or an `Array`, as `kind` has it."""

    kind: Kind
    value: object


class Entry(NamedTuple):
    """A key with its value."""

    key: str
    kind: Kind
    value: object


# Beside the types of weights: what a file may hold, and nothing here makes
PLAIN = (GgmlType("F64", 28, 1, 8), GgmlType("I8", 24, 1, 1), GgmlType("I16", 25, 1, 2), GgmlType("I32", 26, 1, 4), GgmlType("I64", 27, 1, 8))
GGML_TYPES = (*TYPES.values(), *PLAIN)
BY_NUMBER = {known.id: known for known in GGML_TYPES}
BY_NAME = {known.name: known for known in GGML_TYPES}


def single(value: object, what: str, file: object) -> float:
    """A number of a config as a float32 has it. SourceError if it is none."""
    try:
        if isinstance(value, int | float) and not isinstance(value, bool):
            rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
            return rounded
    except OverflowError:
        pass
    raise SourceError(f"{what} is {str(value)[:60]}, a number is needed.", file=file)


def packed(kind: Kind, value: object) -> bytes:
    """A value's bytes, without its kind. ValueError if the value is none of that kind."""
    if kind is Kind.STRING:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is no string")
        data = value.encode("utf-8", ESCAPED)
        return struct.pack("<Q", len(data)) + data
    if kind is Kind.ARRAY:
        if not isinstance(value, Array):
            raise ValueError(f"{value!r} is no array")
        return struct.pack("<IQ", value.kind, len(value.values)) + _elements(value)
    if (kind is Kind.BOOL) != isinstance(value, bool):
        raise ValueError(f"{value!r} is no {kind.name}")
    try:
        return struct.pack("<" + FORMATS[kind], value)
    except (struct.error, OverflowError) as problem:
        raise ValueError(f"{value!r} is no {kind.name}: {problem}") from None


def _elements(array: Array) -> bytes:
    if array.kind in (Kind.STRING, Kind.ARRAY, Kind.BOOL):
        return b"".join(packed(array.kind, value) for value in array.values)
    try:
        return struct.pack(f"<{len(array.values)}{FORMATS[array.kind]}", *array.values)
    except (struct.error, OverflowError) as problem:
        raise ValueError(f"an array of {array.kind.name} holds something else: {problem}") from None
