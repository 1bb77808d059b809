"""JSON from strangers: one meaning only, and what it costs known before it is parsed.

Source: RFC 8259, read strictly: where it leaves a choice (duplicate keys, numbers, lone surrogates) the answer here is no.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

from glmconv.errors import SourceError, printable

LIMIT = 64 << 20
WIDE_LIMIT = 16 << 20  # one character outside ASCII makes Python hold up to four bytes for each of a text's characters
DEPTH = 32
DIGITS = 20
VALUES = 1_000_000
CONTAINERS = 400_000
STRING_LARGEST = 1 << 20
BLOCK = 1 << 20
HIGH = rb"\\u[dD][89abAB][0-9a-fA-F]{2}"
LOW = rb"\\u[dD][c-fC-F][0-9a-fA-F]{2}"
PAIR = re.compile(HIGH + LOW)
HALF = re.compile(rb"\\u[dD][89a-fA-F]")
LONG = re.compile(rb'"[^"]{%d}' % (STRING_LARGEST + 1))
NO_STRUCTURE = bytes(set(range(256)) - set(b'"{}[],'))


def parse(
    data: bytes,
    *,
    file: object,
    limit: int = LIMIT,
    wide: int = WIDE_LIMIT,
    depth: int = DEPTH,
    values: int = VALUES,
    containers: int = CONTAINERS,
    levels: Sequence[int] = (),
    begin: int = 0,
    build: Callable[[dict[str, object]], object] | None = None,
) -> object:
    """The value that `data` spells in strict UTF-8 JSON.

    limit:      bytes
    wide:       bytes, where there are characters beyond ASCII
    depth:      objects and arrays inside each other
    values:     elements of arrays and members of objects, in all
    containers: objects and arrays, in all
    levels:     where the shape is known: values at depth 1, 2, ... at most, and no deeper
    begin:      where `data` begins in its file, for messages
    build:      called with each object, innermost first; what it returns takes the object's place

    Raises SourceError, with the offset where it is known, for anything else: duplicate keys, NaN, numbers of more than 20 digits or
    beyond float64, half a surrogate pair, strings of more than 1 MiB. Nothing is built before size, depth and counts are known to be in bounds.
    """
    if len(data) > limit:
        raise SourceError(f"is {len(data):,} bytes of JSON; at most {limit:,} are read.", file=file)
    plain = _plain(data, file, begin, values, wide)
    _check_structure(_outside_strings(plain, 2 * containers + values), file, levels or (values,) * depth, values, containers)
    del plain
    hook = _unique if build is None else lambda pairs: build(_unique(pairs))
    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=hook, parse_int=_integer, parse_float=_float, parse_constant=_constant)
    except UnicodeDecodeError as problem:
        raise SourceError("is not UTF-8.", file=file, offset=begin + problem.start) from None
    except json.JSONDecodeError as problem:
        raise SourceError(f"is not JSON: {problem.msg}.", file=file, offset=begin + len(text[: problem.pos].encode())) from None
    except _Refused as problem:
        raise SourceError(f"is not strict JSON: {problem}.", file=file) from None


class _Refused(ValueError):
    """What Python's parser would accept and we do not."""


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {printable(key, 100)} is there twice")
            seen.add(key)
    return found


def _integer(text: str) -> int:
    if len(text) > DIGITS and len(text.lstrip("-")) > DIGITS:
        raise _Refused(f"an integer of more than {DIGITS} digits")
    if text == "-0":
        raise _Refused("-0, which others read as a float")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= 64 else float("inf")
    if value in (float("inf"), float("-inf")):
        raise _Refused("a number too large or too long")
    return value


def _constant(text: str) -> float:
    raise _Refused(f"{text} is no JSON number")


def _plain(data: bytes, file: object, begin: int, values: int, wide: int) -> bytes:
    """`data` with escaped backslashes and quotes replaced, at equal length: in it every quote begins or ends a string. Its strings are in bounds."""
    escaped = b"\\" in data
    if len(data) > wide and (not data.isascii() or (escaped and b"\\u" in data)):
        raise SourceError(f"is {len(data):,} bytes of JSON beyond ASCII; at most {wide:,} of that are read.", file=file)
    if data.count(b'"') > 6 * values:  # two for each key and each string, and as many escaped ones
        raise SourceError(f"holds more than {values:,} values.", file=file)
    plain = data.replace(b"\\\\", b"__").replace(b'\\"', b"__") if escaped else data
    quotes = at = 0
    for long in LONG.finditer(plain):  # behind a quote that begins a string, not behind one that ends it
        quotes += plain.count(b'"', at, long.start())
        at = long.start()
        if quotes % 2 == 0:
            raise SourceError(f"holds a string of more than {STRING_LARGEST:,} bytes.", file=file, offset=begin + at)
    if escaped and HALF.search(plain) and (half := HALF.search(PAIR.sub(lambda pair: b"_" * len(pair[0]), plain))):
        raise SourceError("holds half a surrogate pair.", file=file, offset=begin + half.start())
    return plain


def _outside_strings(plain: bytes, enough: int) -> bytes:
    """Braces, brackets and commas outside strings, up to somewhat more than `enough`: no document within bounds has more."""
    import numpy as np  # not needed to print a help text

    outside = bytearray()
    inside = np.uint8(0)
    for begin in range(0, len(plain), BLOCK):
        part = np.frombuffer(plain[begin : begin + BLOCK].translate(None, NO_STRUCTURE), np.uint8)
        if len(part):
            quotes = part == ord('"')
            strings = np.bitwise_xor.accumulate(quotes.view(np.uint8)) ^ inside
            inside = strings[-1]
            outside += part[(strings == 0) & ~quotes].tobytes()
        if len(outside) > enough:
            break
    return bytes(outside)


def _check_structure(outside: bytes, file: object, levels: Sequence[int], values: int, containers: int) -> None:
    """Refuse what would be dear to parse or would recurse, without building it. What is no JSON at all is left for the parser to say."""
    import numpy as np

    opened = outside.count(b"{") + outside.count(b"[")
    if opened > containers:
        raise SourceError(f"holds more than {containers:,} objects and arrays.", file=file)
    if opened + outside.count(b",") > values or len(outside) > 2 * containers + values:
        raise SourceError(f"holds more than {values:,} values.", file=file)
    step = np.zeros(256, np.int8)
    step[list(b"{[")], step[list(b"}]")] = 1, -1
    steps = step[np.frombuffer(outside, np.uint8)]
    level = np.cumsum(steps, dtype=np.int32)
    if len(level) and level.max() > len(levels):
        raise SourceError(f"is nested more than {len(levels)} deep.", file=file)
    counts = np.bincount(level[(steps >= 0) & (level > 0)], minlength=len(levels) + 1)  # a value behind each opening and each comma
    for number, most in enumerate(levels, 1):
        if counts[number] > most:
            raise SourceError(f"holds more than {most:,} values at depth {number}.", file=file)


def mapping(value: object, what: str, file: object) -> dict[str, object]:
    """An object's members."""
    if not isinstance(value, dict):
        raise SourceError(f"{what} is not an object.", file=file)
    return value


def array(value: object, what: str, file: object) -> list[object]:
    """An array's elements."""
    if not isinstance(value, list):
        raise SourceError(f"{what} is not an array.", file=file)
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
    """An object whose members are all strings."""
    return {name: string(item, f"{what}.{name}", file) for name, item in mapping(value, what, file).items()}
