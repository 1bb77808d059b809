"""FP8 weights (E4M3, largest value 448) under float32 scales of blocks, rows or whole tensors, and MXFP8: 1 x 32 groups under powers of two.

    value = code * scale        the scale is called `weight_scale_inv` in block checkpoints, and multiplies all the same

Sources: slime's convert_hf_to_fp8 for the default's formula, DeepGEMM's per_block_cast_to_fp8 for `ue8m0`, compressed-tensors for `mxfp8`;
docs/quantization.md has the formulas side by side and which loader reads what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glmconv.codecs.codec import (
    NUMPY,
    Array,
    Codec,
    Found,
    Grid,
    Part,
    PartReader,
    WeightEncoder,
    checked_scales,
    raw,
    read_rows,
    refuse_code,
    values,
)
from glmconv.codecs.codec import bfloat16_values as widened
from glmconv.dtypes import BY_NAME, DType
from glmconv.encoding import Encoder
from glmconv.errors import SourceError, UsageError

E4M3, E8M0, FLOAT32, UINT8 = BY_NAME["float8_e4m3fn"], BY_NAME["float8_e8m0fnu"], BY_NAME["float32"], BY_NAME["uint8"]
WHOLE = 1 << 62  # a block that no tensor is larger than
GROUP = 32
Rule = Literal["division", "reciprocal", "ue8m0"]  # how a scale is rounded: kernels/fp8.py has the formulas
DIVISION: Rule = "division"
UE8M0: Rule = "ue8m0"
RULES: dict[str, Rule] = {"": DIVISION, "cuda-compat": "reciprocal", "ue8m0": UE8M0}


def ceil_div(size: int, by: int) -> int:
    return -(-size // by)


@dataclass(frozen=True)
class Fp8:
    """`strategy`: block, channel, tensor or mx; `block` rows and columns share a scale; `rule`: how the scale is rounded."""

    strategy: str = "block"
    block: tuple[int, int] = (128, 128)
    rule: Rule = DIVISION

    @property
    def name(self) -> str:
        if self.strategy == "mx":
            return "mxfp8"
        option = next(option for option, rule in RULES.items() if rule == self.rule)
        size = "" if self.strategy != "block" or self.block == (128, 128) else f"{self.block[0]}x{self.block[1]}"
        return ":".join(text for text in ("fp8", "" if self.strategy == "block" else self.strategy, size, option) if text)

    @property
    def grid(self) -> Grid:
        if self.strategy == "mx":
            return Grid(1, GROUP)
        return Grid(*self.block) if self.strategy == "block" else Grid()

    def refuses(self, shape: tuple[int, int]) -> str:
        return f"{shape[1]:,} columns are no multiple of {GROUP}" if self.strategy == "mx" and shape[1] % GROUP else ""

    def label(self, dtype: DType) -> str:
        scale, kept = ("weight_scale_inv", FLOAT32) if self.strategy == "block" else ("weight_scale", UINT8 if self.strategy == "mx" else FLOAT32)
        block = {"channel": (1, WHOLE), "tensor": (WHOLE, WHOLE)}.get(self.strategy, self.block)
        return label(scale, kept, block) + (" ue8m0" if self.strategy == "block" and self.rule == UE8M0 else "")

    def fitted(self, widths: Sequence[int]) -> Codec:
        return self

    def parts(self, shape: tuple[int, int], dtype: DType) -> tuple[Part, ...]:
        rows, columns = shape
        codes = Part("weight", E4M3, shape)
        if self.strategy == "mx":
            return codes, Part("weight_scale", UINT8, (rows, columns // GROUP))
        if self.strategy == "tensor":
            return codes, Part("weight_scale", FLOAT32, (1,))
        if self.strategy == "channel":
            return codes, Part("weight_scale", FLOAT32, (rows, 1))
        return codes, Part("weight_scale_inv", FLOAT32, (ceil_div(rows, self.block[0]), ceil_div(columns, self.block[1])))

    def encoder(self, shape: tuple[int, int], dtype: DType, *, wide: bool = False, strict: bool = True) -> Encoder:
        return Fp8Encoder(self, shape, dtype, wide, strict)

    def config(self, kept: Sequence[str]) -> dict[str, object]:
        if self.strategy == "block":
            config: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(self.block)}
            return config | ({"scale_fmt": "ue8m0"} if self.rule == UE8M0 else {}) | {"modules_to_not_convert": list(kept)}
        weights: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "minmax"}
        activations: dict[str, object] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "observer": None}
        if self.strategy == "mx":
            more: dict[str, object] = {"strategy": "group", "group_size": GROUP, "scale_dtype": "torch.uint8"}
            return compressed_tensors("mxfp8-quantized", weights | more, activations | more, kept)
        by = "token" if self.strategy == "channel" else "tensor"
        return compressed_tensors("float-quantized", weights | {"strategy": self.strategy}, activations | {"strategy": by}, kept)


def compressed_tensors(form: str, weights: object, activations: object, kept: Sequence[str]) -> dict[str, object]:
    """`quantization_config` as compressed-tensors and the official GLM-4.x FP8 releases have it: one group for every linear module."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None, "format": form}
    return {
        "quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed", "config_groups": {"group_0": group},
        "ignore": list(kept), "kv_cache_scheme": None, "global_compression_ratio": None,
    }  # fmt: skip


@dataclass(frozen=True)
class Fp8Encoder(WeightEncoder[Fp8]):
    """One weight on its way to codes and scales. The codes go out as they are made, the scales are held until the last row is."""

    @property
    def unit(self) -> int:
        return self.codec.block[0] if self.codec.strategy == "block" else 1

    @property
    def row_bytes(self) -> int:
        return self.shape[1]

    @property
    def looks(self) -> bool:
        return self.codec.strategy == "tensor"

    def begin(self, lend: Callable[[int], memoryview]) -> Fp8Encoding:
        part = self.codec.parts(self.shape, self.dtype)[1]
        scales = np.frombuffer(lend(part.size), NUMPY[part.dtype.name]).reshape(part.shape)
        return Fp8Encoding(self, scales)


@dataclass
class Fp8Encoding:
    """An encoder at work."""

    encoder: Fp8Encoder
    scales: Array
    largest: float = 0.0

    def look(self, rows: memoryview) -> int:
        from glmconv.kernels import fp8

        found, bad = fp8.largest(values(rows, self.encoder.rows, self.encoder.shape[1]), self.encoder.codec.rule)
        self.largest = max(self.largest, found)
        self.scales[:] = fp8.scale_of(self.largest, self.encoder.codec.rule)
        return bad

    def encode(self, start: int, rows: memoryview, out: memoryview) -> int:
        from glmconv.kernels import fp8

        codec, columns = self.encoder.codec, self.encoder.shape[1]
        weight = values(rows, self.encoder.rows, columns)
        codes = np.frombuffer(out, np.uint8).reshape(weight.shape)
        if codec.strategy == "tensor":
            return fp8.encode_scaled(weight, codes, self.scales[0])
        if codec.strategy == "mx":
            return fp8.encode_mx(weight, codes, self.scales[start : start + len(weight)], GROUP)
        block = (1, columns) if codec.strategy == "channel" else codec.block
        first = start // block[0]
        return fp8.encode_block(weight, codes, self.scales[first : first + ceil_div(len(weight), block[0])], block, codec.rule)

    def part(self, number: int) -> memoryview:
        return raw(self.scales)


@dataclass(frozen=True)
class Fp8Decoder:
    """Codes under scales of one `block`; the scales' name is `scale`, their grid [rows, columns] of blocks."""

    scale: str
    block: tuple[int, int]
    grid: tuple[int, int]
    label: str

    def decode(self, parts: Mapping[str, PartReader], start: int, out: Array, dtype: DType) -> None:
        from glmconv.kernels import fp8

        rows, columns = out.shape
        codes = read_rows(parts["weight"], start, rows)
        stored = parts[self.scale]
        if self.grid[0] == 1:
            scales, first_row = read_rows(stored, 0, stored.shape[0]) if stored.shape else read_rows(Scalar(stored), 0, 1), 0
        else:
            first = start // self.block[0]
            last = ceil_div(start + rows, self.block[0])
            scales, first_row = read_rows(stored, first, last - first), start - first * self.block[0]
        plain = np.ascontiguousarray(float_scales(scales, stored.dtype).reshape(-1, self.grid[1]))
        bad = fp8.decode_block(codes, plain, out, self.block, first_row)
        if bad >= 0:
            refuse_code(bad, start, columns)


@dataclass(frozen=True)
class Scalar:
    """A part without axes as one row."""

    part: PartReader

    @property
    def shape(self) -> tuple[int, ...]:
        return (1,)

    @property
    def dtype(self) -> DType:
        return self.part.dtype

    def read_into(self, start: int, out: memoryview) -> None:
        self.part.read_into(0, out)


def float_scales(scales: Array, dtype: DType) -> Array:
    """Scales of any stored dtype as float32: float32, bfloat16, float16, or exponents (E8M0, bias 127) in a dtype of their own or uint8."""
    if dtype in (E8M0, UINT8):
        from glmconv.kernels import fp8

        return checked_scales(fp8.exponents_to_scales(scales))
    if dtype.name == "bfloat16":
        return checked_scales(widened(scales))
    return checked_scales(scales.astype(np.float32, copy=False))


SCALES = {"float32", "bfloat16", "float16", "float8_e8m0fnu", "uint8"}


def recognise(stored: Mapping[str, tuple[DType, tuple[int, ...]]], shape: tuple[int, ...], quantization: Mapping[str, object]) -> Found | None:
    """The decoder of a weight whose stored parts are these; the parts decide, the config only between blocks of one grid."""
    if "weight" not in stored or stored["weight"][0] != E4M3:
        return None
    names = [suffix for suffix in ("weight_scale_inv", "weight_scale") if suffix in stored]
    if len(names) != 1:
        raise SourceError("is FP8, and has no scale." if not names else "has two scales.", hint="Is the download complete?")
    (name,) = names
    dtype, grid = stored[name]
    if len(shape) != 2:
        raise SourceError("is FP8 and no matrix; only matrices are read.")
    if stored["weight"][1] != shape:
        raise SourceError(f"is {list(stored['weight'][1])}, the config needs {list(shape)}.")
    if dtype.name not in SCALES:
        raise SourceError(f"has scales of {dtype}; float32, bfloat16 and E8M0 are read.")
    block = block_of(grid, dtype, (shape[0], shape[1]), quantization)
    if block is None:
        raise SourceError(f"is {list(shape)} under scales of {list(grid)}: no block, row or whole fits that.", hint="Is it another quantization?")
    rows, columns = (ceil_div(size, by) for size, by in zip(shape, block, strict=True))
    return Found(Fp8Decoder(name, block, (rows, columns), label(name, dtype, block)), ("weight", name))


def label(scale: str, dtype: DType, block: tuple[int, int]) -> str:
    return f"fp8 {scale} {dtype} {'x'.join('all' if n == WHOLE else str(n) for n in block)}"


def block_of(grid: tuple[int, ...], dtype: DType, shape: tuple[int, int], quantization: Mapping[str, object]) -> tuple[int, int] | None:
    """Rows and columns under one scale. Never found by dividing shapes: a ragged grid would give a wrong block."""
    rows, columns = shape
    stated = quantization.get("weight_block_size")
    blocks = [(128, 128)] if dtype not in (E8M0, UINT8) else [(128, 128), (1, GROUP)]
    if isinstance(stated, list) and len(stated) == 2 and all(type(n) is int and n > 0 for n in stated):
        blocks.insert(0, (stated[0], stated[1]))
    for block in blocks:
        if grid == (ceil_div(rows, block[0]), ceil_div(columns, block[1])):
            return block
    if grid in ((rows, 1), (rows,)):
        return 1, WHOLE
    return (WHOLE, WHOLE) if grid in ((), (1,), (1, 1)) else None


def target(options: Sequence[str]) -> Codec:
    """`fp8` with its options: a strategy (block, channel, tensor), a block (64x128), a rule (ue8m0, cuda-compat)."""
    codec = Fp8()
    for option in options:
        height, cross, width = option.partition("x")
        if option in ("block", "channel", "tensor"):
            codec = Fp8(option, codec.block, codec.rule)
        elif option in RULES and option:
            codec = Fp8(codec.strategy, codec.block, RULES[option])
        elif cross and height.isdecimal() and width.isdecimal() and 1 <= int(height) <= 4096 and 1 <= int(width) <= 4096:
            codec = Fp8(codec.strategy, (int(height), int(width)), codec.rule)
        else:
            raise UsageError(f"--to fp8 has no option {option!r}.", hint="fp8, fp8:ue8m0, fp8:cuda-compat, fp8:channel, fp8:tensor or fp8:64x64.")
    if codec.strategy != "block" and (codec.block != (128, 128) or codec.rule == UE8M0):
        raise UsageError(f"--to fp8:{codec.strategy} has no blocks and no ue8m0 scales.")
    return codec


def mx_target(options: Sequence[str]) -> Codec:
    if options:
        raise UsageError(f"--to mxfp8 has no option {options[0]!r}.")
    return Fp8("mx", (1, GROUP), UE8M0)
