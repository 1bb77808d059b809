"""Importance files for a model's GGUF, as llama-imatrix writes them: any numbers, but for experts that no token chose."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glmconv.formats.gguf_header import GgufTensor, padded, write_header
from glmconv.formats.gguf_types import BY_NAME, Array, Entry, Kind

KV = (
    Entry("general.type", Kind.STRING, "imatrix"),
    Entry("imatrix.datasets", Kind.ARRAY, Array(Kind.STRING, ["wiki.txt"])),
    Entry("imatrix.chunk_count", Kind.U32, 12),
    Entry("imatrix.chunk_size", Kind.U32, 512),
)
CALLS = 7
Sums = dict[str, tuple[np.ndarray, np.ndarray]]


def sums_of(tensors: Mapping[str, GgufTensor]) -> Sums:
    """(sums, counts) of each matrix of the decoder's layers; the MTP layer, embedding and head have none, as from llama-imatrix."""
    last = max(int(name.split(".")[1]) for name in tensors if name.startswith("blk."))
    skipped = f"blk.{last}." if any(".nextn." in name for name in tensors) else "none"
    rng = np.random.default_rng(1)
    found: Sums = {}
    for name, tensor in tensors.items():
        if len(tensor.ne) > 1 and name.startswith("blk.") and not name.startswith(skipped) and "ffn_gate_inp" not in name:
            slices = math.prod(tensor.ne[2:])
            sums = (rng.random((slices, tensor.ne[0]), np.float32) ** 4 * 100).astype("<f4")
            counts = rng.integers(0, 4, (slices, 1)).astype("<f4")
            if "_exps" in name:
                found[name] = sums, counts
            else:  # of heads there is one count for all
                found[name] = sums.reshape(1, -1), np.full((1, 1), CALLS, "<f4")
    return found


def gguf_form(sums: Sums) -> bytes:
    described, data = [], b""
    for name, pair in sums.items():
        for suffix, values in zip((".in_sum2", ".counts"), pair, strict=True):
            described.append((name + suffix, BY_NAME["F32"], values.shape[::-1]))
            data += values.tobytes() + bytes(padded(values.nbytes) - values.nbytes)
    return write_header(KV, described) + data


def old_form(sums: Sums) -> bytes:
    parts = [struct.pack("<i", len(sums))]
    for name, (values, _) in sums.items():
        parts.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", CALLS, values.size) + values.tobytes())
    return b"".join(parts) + struct.pack("<ii", 12, 8) + b"wiki.txt"


def written(tensors: Mapping[str, GgufTensor], path: Path, *, old: bool = False) -> Path:
    sums = sums_of(tensors)
    path.write_bytes(old_form(sums) if old else gguf_form(sums))
    return path
