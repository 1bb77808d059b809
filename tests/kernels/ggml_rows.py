"""Rows that ggml's encoders are held to beside the stored vectors: made from integers alone, so that they are the same everywhere."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ROWS, COLUMNS = 12, 512


def families() -> Iterator[tuple[str, np.ndarray]]:
    """(what they are, float32 [ROWS, COLUMNS])."""
    rng = np.random.default_rng(20250)

    def even(*shape: int) -> np.ndarray:
        return rng.integers(-(2**20), 2**20, shape or (ROWS, COLUMNS)) / 2.0**24

    def runs(length: int) -> np.ndarray:
        """One of 0 and 1 for so many values."""
        return np.repeat(rng.integers(0, 2, (ROWS, COLUMNS // length)), length, axis=1)

    made = {
        "even": even(),
        "round": even() + even() + even() + even(),
        "heavy": even() ** 3 * 2.0**8,
        "heavier": even() / (np.abs(even()) + 2.0**-20),
        "bfloat16": (even() + even()).astype(np.float32).view(np.uint32) >> 16,
        "constant": np.repeat(even(ROWS, COLUMNS // 64), 64, axis=1),
        "whole": np.round((even() + even()) * 2.0**6),
        "ternary": np.round((even() + even()) * 2.0**4) / 32,
        "zeros": even() * runs(8),
        "zero sub-blocks": even() * runs(32),
        "sparse": even() * (rng.integers(0, 20, (ROWS, COLUMNS)) == 0),
        "one sign": np.abs(even()) + 2.0**-7,
        "mixed": even() * 2.0 ** np.repeat(rng.integers(-40, 8, (ROWS, COLUMNS // 16)), 16, axis=1),
        "small": even() * 2.0**-25,
        "smaller": even() * 2.0**-120,
        "large": even() * 2.0**14,
    }
    for name, x in made.items():
        yield name, (x.astype(np.uint32) << 16).view(np.float32) if name == "bfloat16" else np.ascontiguousarray(x, np.float32)


def importances() -> Iterator[tuple[str, np.ndarray | None]]:
    """(what they are, float32 [COLUMNS])."""
    rng = np.random.default_rng(20251)
    whole = rng.integers(1, 2**16, COLUMNS)
    yield "none", None
    yield "even", (whole / 2.0**16).astype(np.float32)
    yield "heavy", (2.0**12 / whole**2.0).astype(np.float32)
    yield "zeros", (whole * (rng.integers(0, 3, COLUMNS) > 0) * np.repeat(rng.integers(0, 4, COLUMNS // 16) > 0, 16)).astype(np.float32)
