"""numba's compiler, told how: compiled on first use, kept on disk where there is a place for it, without Python's lock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def jit(function: Callable[..., Any]) -> Any:
    """Compile a loop over arrays. IEEE arithmetic as written (no fastmath), division by zero as IEEE has it."""
    options: dict[str, Any] = {"nopython": True, "nogil": True, "error_model": "numpy"}
    try:
        return numba.jit(function, cache=True, **options)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compiled anew in each process
        return numba.jit(function, **options)
