"""Numbers of which GGUF stores only a function that has no exact inverse: with `--embed-source` their bits ride along, so that they come back.

`glmconv.original.NAME` is an array with an element for each value of the canonical tensor NAME: its bits, as U16 of a bfloat16 tensor, as I16 of
a float16 one, as U32 of a float32 one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from glmconv.codecs.codec import bfloat16_values
from glmconv.dtypes import BY_NAME, DType
from glmconv.errors import SourceError
from glmconv.formats.format import Opened, content_of, row_size
from glmconv.formats.gguf_stored import Stretch, decoded
from glmconv.formats.gguf_tensors import Transform, gguf_tensors
from glmconv.formats.gguf_types import Array, Entry, Kind, Value

PREFIX = "glmconv.original."
KINDS = {"bfloat16": Kind.U16, "float16": Kind.I16, "float32": Kind.U32}
BITS = {Kind.U16: "<u2", Kind.I16: "<i2", Kind.U32: "<u4"}
CLOSE = 2  # units in the last place by which two machines' exponentials may differ


@dataclass(frozen=True)
class Original:
    """A canonical tensor whose bits are in memory."""

    content: bytes
    shape: tuple[int, ...]
    dtype: DType
    place: tuple[int, int]

    def read_into(self, start: int, out: memoryview) -> None:
        at = start * row_size(self.shape, self.dtype)
        out[:] = self.content[at : at + len(out)]


def originals(opened: Opened) -> list[Entry]:
    """The entries for what of a model would not come back."""
    found = []
    for tensor in gguf_tensors(opened.model, opened.tensors):
        if tensor.transform is not Transform.NEGATIVE_EXPONENTIAL:
            continue
        for name in dict.fromkeys(run.tensor for run in tensor.runs):
            reader = opened.tensors[name]
            kind = KINDS[reader.dtype.name]
            found.append(Entry(PREFIX + name, Kind.ARRAY, Array(kind, np.frombuffer(content_of(reader), BITS[kind]).tolist())))
    return found


def original(kv: Mapping[str, Value], name: str, shape: tuple[int, ...], stretches: tuple[Stretch, ...]) -> Original | None:
    """The tensor as it rode along; None if it did not. SourceError if the file's own numbers are not what it gives."""
    entry, stored = kv.get(PREFIX + name), stretches[0].stored
    if entry is None:
        return None
    array = entry.value
    if not isinstance(array, Array) or array.kind not in BITS:
        raise SourceError(f"{PREFIX}{name} is no array of bits.", file=stored.file.path)
    dtype = BY_NAME[next(known for known, kind in KINDS.items() if kind is array.kind)]
    bits = np.array(array.values, BITS[array.kind])
    decays = np.concatenate([decoded(each.stored, each.at, each.rows, row_size(shape, dtype) // dtype.itemsize).reshape(-1) for each in stretches])
    if bits.shape != decays.shape or not _agree(bits, dtype, decays):
        raise SourceError(
            f"{PREFIX}{name} is not what the tensor was made of.", file=stored.file.path, tensor=stored.name, hint="Is the file damaged?"
        )
    return Original(bits.tobytes(), shape, dtype, stored.place)


def _agree(bits: np.ndarray, dtype: DType, decays: np.ndarray) -> bool:
    """Whether the decays are -exp(x), as close as two machines' are."""
    x = bfloat16_values(bits) if dtype.name == "bfloat16" else bits.view(f"<f{bits.itemsize}").astype(np.float32)
    with np.errstate(all="ignore"):
        wanted = (-np.exp(x.astype(np.float64))).astype(np.float32)
    apart = np.abs(wanted.view(np.int32).astype(np.int64) - decays.view(np.int32).astype(np.int64))
    return bool(((apart <= CLOSE) | (np.isnan(wanted) & np.isnan(decays))).all())
