"""Importance files for the fixtures, as llama-imatrix writes them: in its GGUF form, and in the form of before 2025-07."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glmconv.formats.gguf_header import padded, write_header
from glmconv.formats.gguf_types import BY_NAME, Array, Entry, Kind
from tests.gguf.interop.digests import Content

CHUNKS, CHUNK, CALLS = 12, 64, 7
KV = (
    Entry("general.type", Kind.STRING, "imatrix"),
    Entry("imatrix.datasets", Kind.ARRAY, Array(Kind.STRING, ["calibration.txt", "more.txt"])),
    Entry("imatrix.chunk_count", Kind.U32, CHUNKS),
    Entry("imatrix.chunk_size", Kind.U32, CHUNK),
)
IDLE = 3  # an expert that no token was sent to
UNSEEN = ("blk.1.attn_output.weight", "blk.1.attn_q_a.weight")  # entries that are missing beside those of the MTP layers


Sums = Mapping[str, tuple[np.ndarray, np.ndarray]]


def sums_of(content: Content, layers: int, *, unseen: bool) -> Sums:
    """Weight -> (sums [matrices, columns], counts [matrices]) float32: of each matrix of the decoder that a forward pass multiplies by.

    The heads of latent attention share a count, and their sums lie flat, as llama-imatrix has it.
    """
    found = {}
    for row in sorted(content.rows, key=lambda row: row.name):
        block = row.name.split(".")
        inside = row.name == "output.weight" or (block[0] == "blk" and int(block[1]) < layers)
        if not inside or len(row.ne) < 2 or not row.name.endswith(".weight") or (unseen and row.name in UNSEEN):
            continue
        matrices = math.prod(row.ne[2:])
        raw = np.frombuffer(hashlib.shake_256(row.name.encode()).digest(matrices * row.ne[0] * 2), "<u2").reshape(matrices, row.ne[0])
        sums = (raw % 1000).astype(np.float32) * (1 + raw // 64000).astype(np.float32) / np.float32(256)  # some are 0, some large
        counts = (np.arange(matrices) * 5 + 64).astype(np.float32)
        if row.name.endswith("_exps.weight"):
            sums[IDLE], counts[IDLE] = 0, 0
        else:
            sums, counts = sums.reshape(1, -1), counts[:1]
        found[row.name] = sums, counts
    return found


def in_gguf(sums: Sums, path: Path) -> None:
    described, data = [], b""
    for name, (values, counts) in sums.items():
        for suffix, stored in ((".in_sum2", values), (".counts", counts[:, None])):
            described.append((name + suffix, BY_NAME["F32"], tuple(reversed(stored.shape))))
            data += stored.tobytes() + bytes(padded(stored.nbytes) - stored.nbytes)
    path.write_bytes(write_header(KV, described) + data)


def in_the_old_form(sums: Sums, path: Path) -> None:
    """Every fifth weight has 0 calls: its values are taken as they are. An expert without data has ones: there are no counts to say so."""
    parts = [struct.pack("<i", len(sums))]
    for number, (name, (values, _)) in enumerate(sums.items()):
        calls = CALLS if number % 5 else 0
        values = np.where(values.any(1, keepdims=True), values, np.float32(1))
        parts += [struct.pack("<i", len(name)), name.encode(), struct.pack("<ii", calls, values.size), values.tobytes()]
    dataset = b"calibration.txt"
    path.write_bytes(b"".join(parts) + struct.pack("<ii", CHUNKS, len(dataset)) + dataset)
