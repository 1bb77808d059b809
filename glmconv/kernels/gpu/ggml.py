"""ggml's block types for torch tensors on a GPU, with the bytes of kernels/ggml.py and so of libggml: the searches for scales run in Triton.

Where finite values are so large that a sum on the way to a scale overflows, NaN of another sign may be stored; llama.cpp refuses such tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from glmconv.kernels.gpu import ggml_iq4, ggml_k, ggml_simple
from glmconv.kernels.gpu.ggml_decode import decode_blocks, decode_float
from glmconv.kernels.gpu.ggml_layout import LAYOUTS, Layout

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ENCODERS: Mapping[str, Callable[[str, Tensor, Tensor | None], Tensor]] = {
    "Q8_0": ggml_simple.encode_q8_0,
    "MXFP4": ggml_simple.encode_mxfp4,
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1"), ggml_simple.encode_fours),
    **dict.fromkeys(("Q2_K", "Q4_K", "Q5_K"), ggml_k.encode_with_minimum),
    "Q3_K": ggml_k.encode_q3_k,
    "Q6_K": ggml_k.encode_q6_k,
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), ggml_iq4.encode_iq4),
    **dict.fromkeys(("TQ1_0", "TQ2_0"), ggml_simple.encode_ternary),
}


def encode(name: str, rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Each row for itself, to uint8 [n, bytes of a row]; F32's may be a view. Meanwhile there are up to 13 bytes more for each value.

    rows:       [n, columns] of float32, bfloat16 or float16, whole blocks, finite; what NaN and Inf become means nothing
    importance: float32 [columns] on the same device, finite: how much each column's error weighs; the types without a search do without it
    """
    rows, columns = rows.to(torch.float32).contiguous(), rows.shape[1]
    if name in FLOATS:
        return rows.view(torch.uint8) if name == "F32" else ggml_simple.encode_float(rows, FLOATS[name])
    layout = _layout(name)
    if columns % layout.values:
        raise ValueError(f"{name} needs whole blocks of {layout.values}; {list(rows.shape)} is given")
    if importance is not None and (importance.dtype != torch.float32 or importance.shape != (columns,)):
        raise ValueError(f"importance of {importance.dtype} {list(importance.shape)} is given, float32 [{columns}] is needed")
    if not rows.numel():
        return torch.empty((len(rows), columns // layout.values * layout.size), dtype=torch.uint8, device=rows.device)
    return ENCODERS[name](name, rows, importance).reshape(len(rows), -1)


def decode(name: str, blocks: Tensor, columns: int) -> Tensor:
    """Float32 [n, columns] of uint8 [n, bytes of a row]; exact, but for the products and the sum that ggml itself rounds."""
    blocks = blocks.contiguous()
    if name in FLOATS:
        return decode_float(blocks, FLOATS[name])
    layout = _layout(name)
    if columns % layout.values or blocks.shape[1] != columns // layout.values * layout.size:
        raise ValueError(
            f"{name} has {layout.values} values in {layout.size} bytes; {list(blocks.shape)} bytes are given for rows of {columns} values"
        )
    return decode_blocks(name, blocks).reshape(len(blocks), columns)


def _layout(name: str) -> Layout:
    if name not in LAYOUTS:
        raise ValueError(f"{name} has no kernels for a GPU; those that have are {', '.join((*FLOATS, *LAYOUTS))}")
    return LAYOUTS[name]
