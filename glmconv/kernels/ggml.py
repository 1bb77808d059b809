"""ggml's block types, written: float32 rows to packed blocks, with an importance or without, the bytes being libggml's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from glmconv.kernels import ggml_iq1, ggml_iq4, ggml_iq23, ggml_k, ggml_simple, ggml_tiny
from glmconv.kernels.floats import Array, fits

NO_IMPORTANCE = np.empty(0, np.float32)


class Way(NamedTuple):
    """`block` values become `size` bytes. `encode` takes flat values, the importance of a row (or nothing), and bytes [blocks, size]."""

    block: int
    size: int
    encode: Callable[[Array, Array, Array], None]


WAYS: Mapping[str, Way] = {
    "F32": Way(1, 4, ggml_simple.encode_f32),
    "F16": Way(1, 2, ggml_simple.encode_f16),
    "BF16": Way(1, 2, ggml_simple.encode_bf16),
    "Q8_0": Way(32, 34, ggml_simple.encode_q8_0),
    "Q4_0": Way(32, 18, ggml_simple.encode_q4_0),
    "Q4_1": Way(32, 20, ggml_simple.encode_q4_1),
    "Q5_0": Way(32, 22, ggml_simple.encode_q5_0),
    "Q5_1": Way(32, 24, ggml_simple.encode_q5_1),
    "Q6_K": Way(256, 210, ggml_k.encode_q6_k),
    "Q5_K": Way(256, 176, ggml_k.encode_q5_k),
    "Q4_K": Way(256, 144, ggml_k.encode_q4_k),
    "Q3_K": Way(256, 110, ggml_k.encode_q3_k),
    "Q2_K": Way(256, 84, ggml_k.encode_q2_k),
    "IQ4_NL": Way(32, 18, ggml_iq4.encode_iq4_nl),
    "IQ4_XS": Way(256, 136, ggml_iq4.encode_iq4_xs),
    "IQ1_S": Way(256, 50, ggml_iq1.encode_iq1_s),
    "IQ1_M": Way(256, 56, ggml_iq1.encode_iq1_m),
    "IQ2_XXS": Way(256, 66, ggml_iq23.encode_iq2_xxs),
    "IQ2_XS": Way(256, 74, ggml_iq23.encode_iq2_xs),
    "IQ2_S": Way(256, 82, ggml_iq23.encode_iq2_s),
    "IQ3_XXS": Way(256, 98, ggml_iq23.encode_iq3_xxs),
    "IQ3_S": Way(256, 110, ggml_iq23.encode_iq3_s),
    "MXFP4": Way(32, 17, ggml_simple.encode_mxfp4),
    "NVFP4": Way(64, 36, ggml_tiny.encode_nvfp4),
    "Q1_0": Way(128, 18, ggml_tiny.encode_q1_0),
    "Q2_0": Way(64, 18, ggml_tiny.encode_q2_0),
    "TQ1_0": Way(256, 54, ggml_simple.encode_tq1_0),
    "TQ2_0": Way(256, 66, ggml_simple.encode_tq2_0),
}


def encode(name: str, rows: Array, importance: Array | None, out: Array) -> None:
    """Each row for itself.

    rows:       float32 [n, columns], C order, whole blocks; what NaN and Inf become means nothing
    importance: float32 [columns], finite: how much each column's error weighs; the types without a search do without it
    out:        uint8 [n, columns / block * size], C order
    """
    way = WAYS[name]
    columns = rows.shape[1]
    if columns % way.block or not rows.flags.c_contiguous or not out.flags.c_contiguous:
        raise ValueError(f"{name} needs whole blocks of {way.block} in C order; {list(rows.shape)} is given")
    fits(rows, "float32", len(rows), columns)
    fits(out, "uint8", len(rows), columns // way.block * way.size)
    weights = NO_IMPORTANCE if importance is None else np.ascontiguousarray(importance)
    if weights.dtype != np.float32 or weights.shape not in ((0,), (columns,)):
        raise ValueError(f"importance of {weights.dtype.name} {list(weights.shape)} is given, float32 [{columns}] is needed")
    if rows.size:
        way.encode(_still(rows.reshape(-1)), _still(weights), out.reshape(-1, way.size))


def _still(array: Array) -> Array:
    """A view that may not be written: numba compiles anew for arrays that may."""
    view: Array = array.view()
    view.flags.writeable = False
    return view
