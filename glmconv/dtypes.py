"""The element types that checkpoints hold, under the names that each format gives them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DType:
    """One element type. `name` is torch's, `safetensors` the code in a safetensors header, `storage` torch.save's storage class."""

    name: str
    itemsize: int
    safetensors: str
    storage: str = ""
    floating: bool = True

    def __str__(self) -> str:
        return self.name


ALL = (
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("float8_e4m3fn", 1, "F8_E4M3"),
    DType("float8_e5m2", 1, "F8_E5M2"),
    DType("float8_e8m0fnu", 1, "F8_E8M0"),
    DType("int64", 8, "I64", "LongStorage", floating=False),
    DType("int32", 4, "I32", "IntStorage", floating=False),
    DType("int16", 2, "I16", "ShortStorage", floating=False),
    DType("int8", 1, "I8", "CharStorage", floating=False),
    DType("uint64", 8, "U64", floating=False),
    DType("uint32", 4, "U32", floating=False),
    DType("uint16", 2, "U16", floating=False),
    DType("uint8", 1, "U8", "ByteStorage", floating=False),
    DType("bool", 1, "BOOL", "BoolStorage", floating=False),
)
BY_NAME = {dtype.name: dtype for dtype in ALL}
BY_SAFETENSORS = {dtype.safetensors: dtype for dtype in ALL}
BY_STORAGE = {dtype.storage: dtype for dtype in ALL if dtype.storage}
