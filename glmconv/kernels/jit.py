"""Compiles the kernels: by numba, when first called, for the types of that call; kept on disk where some folder lets it.

numba takes what it kept for fresh as long as the kernel's own file is the same, whatever it calls from others. So the name that it is kept under has
the hash of all files of this folder: an edit or an upgrade of floats.py compiles fp8.py and int4.py anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba import types
from numba.extending import overload

F = TypeVar("F", bound=Callable[..., Any])

# The GIL is released; division by zero gives Inf as IEEE 754 says; no fastmath: the bytes must not depend on how a loop was vectorised.
OPTIONS: Any = {"nogil": True, "error_model": "numpy"}


def _hash_of_sources() -> str:
    sources = (source.read_bytes() for source in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"\0".join(sources)).hexdigest()[:16]


SOURCES = _hash_of_sources()


def kernel(function: F) -> F:
    """`function`, compiled when called from Python."""
    function.__qualname__ += f"_{SOURCES}"
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
