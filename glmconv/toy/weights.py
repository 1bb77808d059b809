"""Random weights without end: every tensor is a stretch of one table of normal numbers, so any row can be had without those before it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from glmconv.archs import Role, TensorSpec
from glmconv.dtypes import BY_NAME, DType
from glmconv.formats.format import row_size

TABLE = 1_048_573  # a prime, so that no two rows of a tensor begin at the same place
SCALES = {Role.NORM: (1.0, 0.1), Role.BIAS: (0.0, 0.05), Role.ROUTER: (0.0, 0.05), Role.EMBEDDING: (0.0, 0.5), Role.HEAD: (0.0, 0.05)}
OTHERS = (0.0, 0.05)  # mean and deviation; the widths of a toy are small, so its weights are larger than a release's 0.02


class Tables:
    """The tables of one seed: one per dtype, mean and deviation, made when first asked for."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.normal = np.random.Generator(np.random.PCG64(seed)).standard_normal(TABLE, np.float32)
        self.made: dict[tuple[str, float, float], bytes] = {}

    def table(self, dtype: DType, mean: float, deviation: float) -> bytes:
        key = (dtype.name, mean, deviation)
        if key not in self.made:
            values = self.normal * np.float32(deviation) + np.float32(mean)
            if dtype.name == "bfloat16":
                bits = values.view(np.uint32)
                self.made[key] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest, ties to even
            else:
                self.made[key] = values.astype({"float32": "<f4", "float16": "<f2"}[dtype.name]).tobytes()
        return self.made[key]

    def offset(self, name: str) -> int:
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "little") % TABLE


@dataclass(frozen=True)
class ToyRows:
    """One made tensor; element i is the table's (offset + i) mod TABLE."""

    shape: tuple[int, ...]
    dtype: DType
    table: bytes
    offset: int
    place: tuple[int, int]

    def read_into(self, start: int, out: memoryview) -> None:
        size = self.dtype.itemsize
        at = (self.offset + start * (row_size(self.shape, self.dtype) // size)) % TABLE * size
        done = 0
        while done < len(out):
            part = memoryview(self.table)[at : at + len(out) - done]
            out[done : done + len(part)] = part
            done += len(part)
            at = 0


def toy_rows(tensor: TensorSpec, dtype: DType, tables: Tables, number: int) -> ToyRows:
    """The made rows of a tensor: scale by role; a bias that decides routing must not be a bfloat16 number, so that rounding it shows."""
    canonical = BY_NAME[tensor.dtype] if tensor.dtype else dtype
    mean, deviation = SCALES.get(tensor.role, OTHERS)
    name = tensor.alias or tensor.name
    return ToyRows(tensor.shape, canonical, tables.table(canonical, mean, deviation), tables.offset(name), (number, 0))


@dataclass(frozen=True)
class Literal:
    """A side file whose bytes are here."""

    content: bytes
    dtype: DType = BY_NAME["uint8"]
    place: tuple[int, int] = (0, 0)

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.content),)

    def read_into(self, start: int, out: memoryview) -> None:
        out[:] = self.content[start : start + len(out)]
