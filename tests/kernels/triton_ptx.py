"""Compile every Triton kernel for a GPU, which needs none, and look for arithmetic that would give other bytes. Run by test_triton.py.

python -m tests.kernels.triton_ptx
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from glmconv.kernels.gpu import fp8, int4

BITS = {"bfloat16": "*i16", "float16": "*i16", "float32": "*i32"}
POINTERS = {
    "codes": "*u8", "exponents": "*u8", "spoiled": "*i64", "amax": "*i32", "scale": "*fp32", "packed": "*i32", "qweight": "*i32", "qzeros": "*i32",
    "zeros": "*i8", "lows": "*fp32", "highs": "*fp32",
}  # fmt: skip
REALS = {"floor": "fp32", "epsilon": "fp32", "most": "fp32", "ceiling": "fp32"}
# Rounded to nearest even, or exact; no `.ftz`, no fma, no `.approx` or `.full`
RIGHT = re.compile(
    r"(?:add|sub|mul|div)\.rn\.f32|(?:min|max|abs)\.f(?:16|32)(?:x2)?|neg\.f32|cvt\.f32\.f16|cvt\.rn\.f32\.s32|cvt\.rzi\.s(?:8|16|32)\.f32|(?:setp|selp)\..*"
)
FLOATING = re.compile(r"^\s*(?:@%p\d+ )?([a-z0-9_.:]*\.b?f(?:16|32)(?:x2)?[a-z0-9_.]*)\s", re.MULTILINE)


def variants() -> Iterator[tuple[Any, str, dict[str, Any]]]:
    """(kernel, scales' bits, constants)."""
    for rule, kind in (("division", "bfloat16"), ("reciprocal", "float16"), ("ue8m0", "float32")):
        yield fp8._encode_block, "*fp32", {"RULE": rule, "KIND": kind, "TALL": 16, "WIDE": 64}
    yield int4._encode_packed, "*i16", {"STORED": "float16", "KIND": "float16", "SYMMETRIC": False, "LIMITED": True, "TALL": 16, "WIDE": 64}
    yield fp8._largest, "", {"KIND": "float32", "SIZE": 1024}
    yield fp8._encode, "", {"KIND": "bfloat16", "SIZE": 1024}
    yield fp8._encode_mx, "", {"KIND": "bfloat16", "TALL": 32, "WIDE": 32}
    yield fp8._decode_block, "*fp32", {"KIND": "float16", "TALL": 8, "WIDE": 128}
    yield int4._encode_packed, "*i16", {"STORED": "bfloat16", "KIND": "float32", "SYMMETRIC": True, "LIMITED": False, "TALL": 16, "WIDE": 64}
    yield int4._decode_packed, "*i16", {"STORED": "bfloat16", "KIND": "bfloat16", "SYMMETRIC": False, "TALL": 8, "WIDE": 128}
    yield int4._encode_awq, "*i16", {"KIND": "bfloat16", "LIMITED": True, "TALL": 16, "WIDE": 64}
    yield int4._decode_awq, "*i16", {"KIND": "bfloat16", "TALL": 32, "WIDE": 32}


def ptx_of(kernel: Any, scales: str, constants: dict[str, Any]) -> str:
    pointers = POINTERS | {"scales": scales, "weight": BITS[constants["KIND"]], "out": BITS[constants["KIND"]]}
    signature = {name: "constexpr" if name in constants else (pointers | REALS).get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False}).asm["ptx"]


if __name__ == "__main__":
    for kernel, scales, constants in variants():
        found = set(FLOATING.findall(ptx_of(kernel, scales, constants)))
        wrong = {operation for operation in found if not RIGHT.fullmatch(operation)}
        assert not wrong, (kernel.__name__, constants, wrong)
        assert found or kernel is fp8._largest, kernel.__name__
