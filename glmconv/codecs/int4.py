"""Four-bit integers in groups along a row, rounded to nearest: AutoAWQ's `gemm` layout and compressed-tensors' `pack-quantized`.

    value = (code - zero) * scale

|                    | awq (gemm)                                 | int4 (pack-quantized)                          |
|---|---|---|
| codes              | qweight int32 [columns, rows/8], 0..15     | weight_packed int32 [rows, columns/8], code+8  |
| nibble i holds     | row 8c + (0,2,4,6,1,3,5,7)[i]              | column 8c + i                                  |
| scales             | scales float16 [columns/g, rows]           | weight_scale [rows, columns/g], model's dtype  |
| zeros              | qzeros int32 [columns/g, rows/8]           | weight_zero_point int32 [rows/8, columns/g]    |

Sources: AutoAWQ 0.2.9 (WQLinear_GEMM, pseudo_quantize_tensor), compressed-tensors 0.20 (pack_quantized, calculate_qparams).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from glmconv.codecs.codec import NUMPY, Array, Codec, Found, Grid, Part, PartReader, WeightEncoder, checked_scales, raw, read_rows, values
from glmconv.codecs.fp8 import compressed_tensors
from glmconv.dtypes import BY_NAME, DType
from glmconv.encoding import Encoder
from glmconv.errors import CapacityError, SourceError, UsageError

INT32, INT64, FLOAT16 = BY_NAME["int32"], BY_NAME["int64"], BY_NAME["float16"]
GROUPS = (128, 64, 32)  # what serving kernels know, the coarsest first
PACK = 8  # codes in an int32
AUTO = 0


@dataclass(frozen=True)
class Int4:
    """`layout`: awq or int4. `group` columns of a row share a scale; AUTO: the coarsest of GROUPS that divides."""

    layout: str
    group: int = 128
    symmetric: bool = False

    @property
    def name(self) -> str:
        return f"{self.layout}:{f'g{self.group}' if self.group else 'auto'}" + ("" if self.layout == "awq" else ":sym" if self.symmetric else ":asym")

    @property
    def grid(self) -> Grid:
        return Grid(PACK if self.layout == "awq" or not self.symmetric else 1, max(self.group, PACK))

    def label(self, dtype: DType) -> str:
        return f"awq g{self.group}" if self.layout == "awq" else f"int4 g{self.group} {'sym' if self.symmetric else 'asym'} {dtype}"

    def fitted(self, widths: Sequence[int]) -> Codec:
        """This codec with a group that divides each of `widths` (columns of one rank). CapacityError names the sizes that would do."""
        fits = [group for group in (256, *GROUPS, 16) if all(width % group == 0 for width in widths)]
        if self.group == AUTO:
            chosen = next((group for group in fits if group in GROUPS), None)
            if chosen is None:
                raise CapacityError(f"--to {self.name}: no group of 128, 64 or 32 divides the experts' widths on each rank.", hint=_would_do(fits))
            return replace(self, group=chosen)
        if any(width % self.group for width in widths):
            wrong = next(width for width in widths if width % self.group)
            raise CapacityError(f"--to {self.name}: {wrong:,} columns are no multiple of {self.group}.", hint=_would_do(fits))
        return self

    def refuses(self, shape: tuple[int, int]) -> str:
        rows, columns = shape
        if columns % self.group or columns % PACK:
            return f"{columns:,} columns are no multiple of {self.group}"
        return f"{rows:,} rows are no multiple of {PACK}" if rows % self.grid.rows else ""

    def parts(self, shape: tuple[int, int], dtype: DType) -> tuple[Part, ...]:
        rows, columns = shape
        groups = columns // self.group
        if self.layout == "awq":
            codes, zeros = Part("qweight", INT32, (columns, rows // PACK)), Part("qzeros", INT32, (groups, rows // PACK))
            return codes, zeros, Part("scales", FLOAT16, (groups, rows))
        packed = (Part("weight_packed", INT32, (rows, columns // PACK)), Part("weight_scale", dtype, (rows, groups)))
        zero = () if self.symmetric else (Part("weight_zero_point", INT32, (rows // PACK, groups)),)
        return *packed, *zero, Part("weight_shape", INT64, (2,))

    def encoder(self, shape: tuple[int, int], dtype: DType, *, wide: bool = False, strict: bool = True) -> Encoder:
        return (AwqEncoder if self.layout == "awq" else PackedEncoder)(self, shape, dtype, wide, strict)

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        if self.layout == "awq":
            return {
                "quant_method": "awq", "bits": 4, "group_size": self.group, "zero_point": True, "version": "gemm",
                "modules_to_not_convert": list(kept),
            }  # fmt: skip
        weights = {
            "num_bits": 4, "type": "int", "symmetric": self.symmetric, "strategy": "group", "group_size": self.group, "dynamic": False,
            "actorder": None, "block_structure": None, "observer": "minmax", "observer_kwargs": {},
        }  # fmt: skip
        return compressed_tensors("pack-quantized", weights, None, kept)


def _would_do(fits: Sequence[int]) -> str:
    return f"Groups that would do: {', '.join(map(str, fits))}." if fits else "No group does; take fp8:channel."


class GroupEncoding:
    """An encoding that looks at no row but those that it encodes: each group has a scale of its own."""

    def look(self, rows: memoryview) -> int:
        return -1


@dataclass(frozen=True)
class PackedEncoder(WeightEncoder[Int4]):
    """Rows to `pack-quantized`: the codes go out as they are made."""

    unit: int = PACK
    looks: bool = False

    @property
    def row_bytes(self) -> int:
        return self.shape[1] // 2

    def begin(self, lend: Callable[[int], memoryview]) -> PackedEncoding:
        rows, groups = self.shape[0], self.shape[1] // self.codec.group
        scales = np.frombuffer(lend(rows * groups * self.dtype.itemsize), NUMPY[self.dtype.name]).reshape(rows, groups)
        zeros = None if self.codec.symmetric else np.frombuffer(lend(rows * groups), np.int8).reshape(rows, groups)
        return PackedEncoding(self, scales, zeros)


@dataclass
class PackedEncoding(GroupEncoding):
    encoder: PackedEncoder
    scales: Array
    zeros: Array | None

    def encode(self, start: int, rows: memoryview, out: memoryview) -> int:
        from glmconv.kernels import int4

        weight = values(rows, self.encoder.rows, self.encoder.shape[1])
        packed = np.frombuffer(out, np.int32).reshape(len(weight), -1)
        here = slice(start, start + len(weight))
        return int4.encode_packed(weight, packed, self.scales[here], None if self.zeros is None else self.zeros[here], self.encoder.codec.group)

    def part(self, number: int) -> memoryview:
        from glmconv.kernels import int4

        name = self.encoder.codec.parts(self.encoder.shape, self.encoder.dtype)[number].suffix
        if name == "weight_shape":
            return raw(np.array(self.encoder.shape, np.int64))
        if name == "weight_zero_point" and self.zeros is not None:
            return raw(np.ascontiguousarray(int4.pack_zeros(self.zeros)))
        return raw(self.scales)


@dataclass(frozen=True)
class AwqEncoder(WeightEncoder[Int4]):
    """Rows to AutoAWQ's layout, which lies the other way round: all of a tensor's codes are held until its last row."""

    unit: int = PACK
    looks: bool = False
    row_bytes: int = 0

    def begin(self, lend: Callable[[int], memoryview]) -> AwqEncoding:
        parts = self.codec.parts(self.shape, self.dtype)
        return AwqEncoding(self, [np.frombuffer(lend(p.size), NUMPY[p.dtype.name]).reshape(p.shape) for p in parts])


@dataclass
class AwqEncoding(GroupEncoding):
    encoder: AwqEncoder
    held: list[Array]

    def encode(self, start: int, rows: memoryview, out: memoryview) -> int:
        from glmconv.kernels import int4

        weight = values(rows, self.encoder.rows, self.encoder.shape[1])
        words = slice(start // PACK, (start + len(weight)) // PACK)
        codes, zeros, scales = self.held
        return int4.encode_awq(weight, codes[:, words], zeros[:, words], scales[:, start : start + len(weight)], self.encoder.codec.group)

    def part(self, number: int) -> memoryview:
        return raw(self.held[number])


class Way(Protocol):
    def __call__(self, parts: Mapping[str, PartReader], start: int, out: Array) -> None: ...


@dataclass(frozen=True)
class Int4Decoder:
    """Either layout; `way` reads the parts that the rows need."""

    label: str
    way: Way = field(compare=False)

    def decode(self, parts: Mapping[str, PartReader], start: int, out: Array, dtype: DType) -> None:
        self.way(parts, start, out)


def packed_rows(group: int) -> Way:
    def read(parts: Mapping[str, PartReader], start: int, out: Array) -> None:
        from glmconv.kernels import int4

        rows = len(out)
        zeros = None
        if "weight_zero_point" in parts:
            first, last = start // PACK, -(-(start + rows) // PACK)
            whole = int4.unpack_zeros(read_rows(parts["weight_zero_point"], first, last - first))
            zeros = np.ascontiguousarray(whole[start - first * PACK :][:rows])
        packed = read_rows(parts["weight_packed"], start, rows)
        stated = tuple(int(n) for n in read_rows(parts["weight_shape"], 0, 2))
        if stated != (parts["weight_packed"].shape[0], out.shape[1]):
            raise SourceError(f"has a weight_shape of {list(stated)}, which is not its shape.", hint="Is the checkpoint damaged?")
        int4.decode_packed(packed, checked_scales(read_rows(parts["weight_scale"], start, rows)), zeros, out, group)

    return read


def awq_rows(group: int) -> Way:
    def read(parts: Mapping[str, PartReader], start: int, out: Array) -> None:
        from glmconv.kernels import int4

        codes, zeros, scales = (read_rows(parts[name], 0, parts[name].shape[0]) for name in ("qweight", "qzeros", "scales"))
        first, last = start // PACK, -(-(start + len(out)) // PACK)
        words, columns = slice(first, last), slice(first * PACK, last * PACK)
        if (start, len(out)) == (first * PACK, (last - first) * PACK):
            int4.decode_awq(codes[:, words], zeros[:, words], checked_scales(scales[:, columns]), out, group)
            return
        whole = np.empty(((last - first) * PACK, out.shape[1]), out.dtype)
        int4.decode_awq(codes[:, words], zeros[:, words], checked_scales(scales[:, columns]), whole, group)
        out[:] = whole[start - first * PACK :][: len(out)]

    return read


Stored = Mapping[str, tuple[DType, tuple[int, ...]]]


def recognise(stored: Stored, shape: tuple[int, ...], quantization: Mapping[str, object]) -> Found | None:
    """The decoder of a weight in one of the two layouts, by the parts' names; their shapes must be those of one group size."""
    if len(shape) != 2:
        return None
    if "qweight" in stored:
        return _recognise_awq(stored, (shape[0], shape[1]), quantization)
    if "weight_packed" in stored:
        return _recognise_packed(stored, (shape[0], shape[1]))
    return None


def _recognise_awq(stored: Stored, shape: tuple[int, int], quantization: Mapping[str, object]) -> Found:
    names = ("qweight", "qzeros", "scales")
    if "g_idx" in stored or quantization.get("quant_method") == "gptq":
        raise SourceError("is in GPTQ's layout, which is not read.", hint="Take the unquantized release.")
    if quantization.get("version", "gemm") not in ("gemm", "GEMM") or quantization.get("zero_point", True) is not True:
        raise SourceError("is AWQ of another version than gemm with zero points, which is not read.")
    group = _group(stored, names, "scales", 0, shape[1])
    if shape[0] % PACK:
        raise SourceError(f"has {shape[0]:,} rows, which {PACK} codes in a word do not fill.")
    _fits(stored, Int4("awq", group).parts(shape, FLOAT16), shape)
    return Found(Int4Decoder(f"awq g{group}", awq_rows(group)), names)


def _recognise_packed(stored: Stored, shape: tuple[int, int]) -> Found:
    if "weight_g_idx" in stored:
        raise SourceError("has its columns in another order (weight_g_idx), which is not read.", hint="Take the unquantized release.")
    if shape[1] % PACK:
        raise SourceError(f"has {shape[1]:,} columns, which {PACK} codes in a word do not fill.")
    symmetric = "weight_zero_point" not in stored
    names = ("weight_packed", "weight_scale", *(() if symmetric else ("weight_zero_point",)), "weight_shape")
    group = _group(stored, names, "weight_scale", 1, shape[1])
    dtype = stored["weight_scale"][0]
    if dtype.name not in ("bfloat16", "float16", "float32"):
        raise SourceError(f"has scales of {dtype}, which are not read.")
    parts = Int4("int4", group, symmetric).parts(shape, dtype)
    small = stored["weight_shape"][0].name == "int32"  # slime writes int32
    parts = tuple(replace(part, dtype=INT32) if part.suffix == "weight_shape" and small else part for part in parts)
    _fits(stored, parts, shape)
    return Found(Int4Decoder(f"int4 g{group} {'sym' if symmetric else 'asym'} {dtype}", packed_rows(group)), names)


def _group(stored: Stored, names: Sequence[str], scales: str, axis: int, columns: int) -> int:
    missing = [name for name in names if name not in stored]
    if missing:
        raise SourceError(f"has no {missing[0]}.", hint="Is the download complete?")
    shape = stored[scales][1]
    groups = shape[axis] if len(shape) == 2 else 0
    if not groups or columns % groups:
        raise SourceError(f"has {groups} groups for {columns:,} columns.", hint="Does config.json belong to these weights?")
    return columns // groups


def _fits(stored: Stored, parts: Sequence[Part], shape: tuple[int, int]) -> None:
    for part in parts:
        if stored[part.suffix] != (part.dtype, part.shape):
            dtype, found = stored[part.suffix]
            wanted = f"{part.dtype} {list(part.shape)}"
            raise SourceError(f"has a {part.suffix} of {dtype} {list(found)}; for a weight of {list(shape)} it must be {wanted}.")


def _target(layout: str, options: Sequence[str]) -> Codec:
    codec = Int4(layout, symmetric=layout == "int4")
    for option in options:
        if option == "auto":
            codec = replace(codec, group=AUTO)
        elif option[:1] == "g" and option[1:].isdecimal() and 8 <= int(option[1:]) <= 4096 and int(option[1:]) % 8 == 0:
            codec = replace(codec, group=int(option[1:]))
        elif layout == "int4" and option in ("sym", "asym"):
            codec = replace(codec, symmetric=option == "sym")
        else:
            more = ", :sym, :asym" if layout == "int4" else ""
            raise UsageError(f"--to {layout} has no option {option!r}.", hint=f"Options: :g128, :g64, :g32, :auto{more}.")
    return codec


def target(options: Sequence[str]) -> Codec:
    """`int4` with its options: a group (g128, g64, g32, auto), sym or asym."""
    return _target("int4", options)


def awq_target(options: Sequence[str]) -> Codec:
    """`awq` with its options: a group."""
    return _target("awq", options)
