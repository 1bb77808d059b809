"""What every codec offers: how one tensor is stored in parts, how rows become parts and parts become rows. Knows no file and no architecture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from glmconv.dtypes import BY_NAME, DType
from glmconv.encoding import Encoder
from glmconv.errors import SourceError

NUMPY = {"bfloat16": "<u2", "float16": "<f2", "float32": "<f4", "float8_e4m3fn": "u1", "float8_e8m0fnu": "u1", "uint8": "u1", "int8": "i1",
         "int32": "<i4", "int64": "<i8"}  # fmt: skip
Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor of an encoded one. `suffix` follows the module's path and a dot: `weight`, `weight_scale_inv`."""

    suffix: str
    dtype: DType
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        total = self.dtype.itemsize
        for n in self.shape:
            total *= n
        return total


@dataclass(frozen=True)
class Grid:
    """What a serving engine must be able to cut: each rank's share of the rows a multiple of `rows`, of the columns one of `columns`."""

    rows: int = 1
    columns: int = 1


class Codec(Protocol):
    """One encoding with its options, as a target."""

    @property
    def name(self) -> str:
        """As `--to` spells it: `fp8:ue8m0`."""

    @property
    def grid(self) -> Grid: ...

    def refuses(self, shape: tuple[int, int]) -> str:
        """Why a weight of this shape cannot be encoded at all; empty if it can."""

    def label(self, dtype: DType) -> str:
        """The `Decoder.label` of what it writes in a model of this dtype."""

    def fitted(self, widths: Sequence[int]) -> Codec:
        """This codec for weights with so many columns on each rank. CapacityError if it cannot be."""

    def parts(self, shape: tuple[int, int], dtype: DType) -> tuple[Part, ...]:
        """What a weight of this shape, in a model of this dtype, is stored as."""

    def encoder(self, shape: tuple[int, int], dtype: DType, *, wide: bool = False, strict: bool = True) -> Encoder:
        """In a model of `dtype` (bfloat16, float16, float32), for rows of that dtype, or of float32 if `wide`. `strict`: NaN and Inf are errors."""

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        """`quantization_config`, `kept` being the full paths of the linear modules that are not encoded."""


C = TypeVar("C", bound=Codec)


@dataclass(frozen=True)
class WeightEncoder(Generic[C]):
    """What every encoder knows: its codec, the weight's shape, the model's dtype, and whether the rows are of float32 instead."""

    codec: C
    shape: tuple[int, int]
    dtype: DType
    wide: bool = False
    strict: bool = True

    @property
    def rows(self) -> DType:
        """The dtype of the rows."""
        return BY_NAME["float32"] if self.wide else self.dtype

    @property
    def id(self) -> str:
        return f"{self.codec.name} of {self.rows}"


class PartReader(Protocol):
    """Rows of a stored part, read from wherever it lies."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> DType: ...
    def read_into(self, start: int, out: memoryview) -> None: ...


class Decoder(Protocol):
    """The way back for one tensor: made when its parts' dtypes and shapes are known, so that a wrong one is an error before anything is read."""

    @property
    def label(self) -> str:
        """The codec and all that its bytes depend on: tensors of one label on both sides may pass unchanged."""

    def decode(self, parts: Mapping[str, PartReader], start: int, out: Array, dtype: DType) -> None:
        """Rows from `start` on into `out` [rows, columns] of `dtype`, rounded once. SourceError for codes or scales that mean nothing."""


@dataclass(frozen=True)
class Found:
    """A tensor that was recognised: its decoder and its parts' suffixes."""

    decoder: Decoder
    suffixes: tuple[str, ...]


Recognise = Callable[[Mapping[str, tuple[DType, tuple[int, ...]]], tuple[int, ...], Mapping[str, object]], Found | None]


def values(rows: memoryview, dtype: DType, columns: int) -> Array:
    """Raw bytes as [rows, columns]; bfloat16 as its bits in uint16."""
    return np.frombuffer(rows, NUMPY[dtype.name]).reshape(-1, columns)


def raw(array: Array) -> memoryview:
    """A contiguous array's bytes."""
    return array.reshape(-1).view(np.uint8).data


def read_rows(part: PartReader, start: int, rows: int) -> Array:
    """Rows of a stored part as an array of its own."""
    out = np.empty((rows, *part.shape[1:]), NUMPY[part.dtype.name])
    if out.size:
        part.read_into(start, raw(out))
    return out


def bfloat16_values(bits: Array) -> NDArray[np.float32]:
    """The values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def checked_scales(scales: Array) -> Array:
    """`scales` if each is finite and above 0."""
    plain = bfloat16_values(scales) if scales.dtype == np.uint16 else scales
    if not (np.isfinite(plain).all() and (plain > 0).all()):
        raise SourceError(
            "has a scale that is NaN, infinite, zero or negative.", hint="Is the checkpoint damaged? Some converters write NaN for zeros."
        )
    return scales


def check_part(suffix: str, dtype: DType, data: memoryview, start: int, columns: int) -> None:
    """SourceError for scales or codes among a stored part's bytes, from row `start` on, that mean nothing."""
    if "scale" in suffix and dtype.name in ("float32", "float16", "bfloat16"):
        checked_scales(np.frombuffer(data, NUMPY[dtype.name]))
    elif "scale" in suffix and dtype.itemsize == 1:
        if (np.frombuffer(data, np.uint8) == 0xFF).any():
            raise SourceError("has a scale that is NaN.", hint="Is the checkpoint damaged?")
    elif dtype.name == "float8_e4m3fn":
        nan = (np.frombuffer(data, np.uint8) & 0x7F) == 0x7F
        if nan.any():
            refuse_code(int(nan.argmax()), start, columns)


def refuse_code(at: int, start: int, columns: int) -> NoReturn:
    """SourceError for the NaN code at this flat index, behind row `start`."""
    raise SourceError(f"has the code NaN in row {start + at // columns:,}, column {at % columns:,}.", hint="Is the checkpoint damaged?")
