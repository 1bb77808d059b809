"""Where NaN or Inf first stands in raw values, at the speed of memory: an exponent of ones only, looked for while the bytes are in the cache."""

from __future__ import annotations

from typing import Any

import numpy as np

# dtype -> (how its bits are read, its exponent's bits); IEEE 754, and bfloat16 as the upper half of float32
EXPONENTS: dict[str, tuple[np.dtype[Any], int]] = {
    "bfloat16": (np.dtype("<u2"), 0x7F80),
    "float16": (np.dtype("<u2"), 0x7C00),
    "float32": (np.dtype("<u4"), 0x7F80_0000),
    "float64": (np.dtype("<u8"), 0x7FF0_0000_0000_0000),
}
BLOCK = 1 << 18  # bytes; with its masked copy it stays in a second-level cache


def first_nonfinite(data: memoryview | bytes, dtype: str) -> int | None:
    """Index of the first NaN or Inf among the values in `data` (little-endian); None if there is none, or if `dtype` has no such values."""
    if dtype not in EXPONENTS:
        return None
    kind, mask = EXPONENTS[dtype]
    bits = np.frombuffer(data, kind)
    step = BLOCK // kind.itemsize
    exponents = np.empty(min(step, len(bits)), kind)
    for at in range(0, len(bits), step):
        block = bits[at : at + step]
        found = np.bitwise_and(block, mask, out=exponents[: len(block)])
        if found.max() == mask:
            return at + int(found.argmax())
    return None
