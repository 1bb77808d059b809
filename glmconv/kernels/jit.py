"""Compiles the kernels: by numba, when first called, for the types of that call; kept on disk where some folder lets it.

numba looks at a kernel's own file alone when it judges whether what it kept is stale: touch fp8.py and int4.py after an edit of floats.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import types
from numba.extending import overload

F = TypeVar("F", bound=Callable[..., Any])

# The GIL is released; division by zero gives Inf as IEEE 754 says; no fastmath: the bytes must not depend on how a loop was vectorised.
OPTIONS: Any = {"nogil": True, "error_model": "numpy"}


def kernel(function: F) -> F:
    """`function`, compiled when called from Python."""
    try:
        return cast("F", numba.njit(cache=True, **OPTIONS)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written: compile in every process
        return cast("F", numba.njit(**OPTIONS)(function))


def inner(function: F) -> F:
    """`function`, compiled into the kernels that call it."""
    return cast("F", numba.njit(**OPTIONS)(function))


def by_type(choose: Callable[..., Callable[..., Any] | None]) -> Callable[[F], F]:
    """Let kernels call the decorated function, whose Python body never runs: `choose` picks the body for the types of its arguments."""

    def register(function: F) -> F:
        overload(function, strict=False, jit_options=OPTIONS)(choose)
        return function

    return register


__all__ = ["by_type", "inner", "kernel", "types"]
