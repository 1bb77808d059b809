"""JSON from strangers: one meaning only, and its cost bounded before it is parsed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import numpy as np

from glmconv.errors import SourceError

LIMIT = 64 << 20
DEPTH = 32
DIGITS = 20
VALUES = 4_000_000  # commas, colons and openings at most: what bounds the parsed objects' memory
OPENINGS = 800_000  # objects and arrays; a safetensors header of 262,144 tensors has 786,433
ESCAPES = 200_000
NUMBER = re.compile(r"-?\d{1,%d}\Z" % DIGITS)


def parse(data: bytes, *, file: object, limit: int = LIMIT, depth: int = DEPTH, values: int = VALUES) -> object:
    """The value that `data` spells. SourceError for anything but strict UTF-8 JSON within the limits: duplicate keys, NaN, long integers, deep nesting."""
    if len(data) > limit:
        raise SourceError(f"is {len(data):,} bytes of JSON; at most {limit:,} are read.", file=file)
    _bounded(data, file, depth, values)
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=_pairs, parse_int=_integer, parse_float=_float, parse_constant=_constant)
    except UnicodeDecodeError as problem:
        raise SourceError("is not UTF-8.", file=file, offset=problem.start) from None
    except json.JSONDecodeError as problem:
        raise SourceError(f"is not JSON: {problem.msg}.", file=file, offset=problem.pos) from None
    except _Refused as problem:
        raise SourceError(f"is not strict JSON: {problem}.", file=file) from None


class _Refused(ValueError):
    pass


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {key[:100]!r} is there twice")
            seen.add(key)
    if any(not key.isascii() and _surrogate(key) for key in found):
        raise _Refused("half a surrogate pair")
    for value in found.values():
        if isinstance(value, str) and not value.isascii() and _surrogate(value):
            raise _Refused("half a surrogate pair")
    return found


def _surrogate(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text)


def _integer(text: str) -> int:
    if not NUMBER.match(text):
        raise _Refused(f"an integer of more than {DIGITS} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text[:400])
    if len(text) > 400 or value in (float("inf"), float("-inf")):
        raise _Refused("a number too large or too long")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"{text} is no JSON number")


def _bounded(data: bytes, file: object, depth: int, values: int) -> None:
    """Depth and number of values, counted on the bytes outside strings, in blocks: no recursion, no objects."""
    if data.count(b"\\") > ESCAPES:
        raise SourceError(f"holds more than {ESCAPES:,} backslashes.", file=file)
    level = deepest = count = opened = 0
    inside = escaped = False
    block = 1 << 20
    for begin in range(0, len(data), block):
        part = np.frombuffer(data, np.uint8, min(block, len(data) - begin), begin)
        outside, inside, escaped = _outside_strings(part, inside, escaped)
        opening = ((part == 0x7B) | (part == 0x5B)) & outside
        closing = ((part == 0x7D) | (part == 0x5D)) & outside
        opened += int(opening.sum())
        count += int(opening.sum()) + int((((part == 0x2C) | (part == 0x3A)) & outside).sum())
        steps = np.cumsum(opening.astype(np.int32) - closing.astype(np.int32))
        if len(steps):
            deepest = max(deepest, level + int(steps.max()))
            level += int(steps[-1])
        if deepest > depth:
            raise SourceError(f"is nested more than {depth} deep.", file=file)
        if count > values or opened > OPENINGS:
            raise SourceError(f"holds more than {values:,} values or {OPENINGS:,} objects and arrays.", file=file)


def _outside_strings(part: np.ndarray, inside: bool, escaped: bool) -> tuple[np.ndarray, bool, bool]:  # type: ignore[type-arg]
    """Which bytes of a block lie outside strings, and the state behind it."""
    backslash = part == 0x5C
    escapes = np.zeros(len(part), bool)  # the byte is escaped by an odd run of backslashes before it
    if escaped or backslash.any():
        state = escaped
        for at in np.nonzero(backslash)[0] if not escaped else np.union1d(np.nonzero(backslash)[0], [-1]):
            if at == -1:
                escapes[0] = True
                continue
            if not escapes[at]:
                if at + 1 < len(part):
                    escapes[at + 1] = True
                else:
                    state = True
                    break
        else:
            state = False
        escaped = state and bool(len(part)) and bool(backslash[-1]) and not escapes[-1]
    quotes = (part == 0x22) & ~escapes
    odd = (np.cumsum(quotes) + int(inside)) % 2 == 1
    return ~odd & ~quotes, bool(odd[-1]) if len(part) else inside, escaped


def mapping(value: object, what: str, file: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise SourceError(f"{what} is not an object.", file=file)
    return value


def string(value: object, what: str, file: object) -> str:
    if not isinstance(value, str):
        raise SourceError(f"{what} is not a string.", file=file)
    return value


def integer(value: object, what: str, file: object, low: int = 0, high: int = 2**63 - 1) -> int:
    """A whole number within bounds; true, false and 1.0 are none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise SourceError(f"{what} is not a whole number.", file=file)
    if not low <= value <= high:
        raise SourceError(f"{what} is {value}, outside {low} to {high}.", file=file)
    return value


def strings(value: object, what: str, file: object) -> Mapping[str, str]:
    found = mapping(value, what, file)
    return {name: string(item, f"{what}.{name}", file) for name, item in found.items()}
