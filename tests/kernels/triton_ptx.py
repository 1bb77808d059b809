"""Compile every Triton kernel for a GPU, which needs none, and look for arithmetic that would give other bytes. Run by test_triton.py.

python -m tests.kernels.triton_ptx
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from glmconv.codecs.ggml import WEIGHTED
from glmconv.kernels.gpu import fp8, ggml, int4

BITS = {"bfloat16": "*i16", "float16": "*i16", "float32": "*i32"}
POINTERS = {
    "codes": "*u8", "exponents": "*u8", "spoiled": "*i64", "amax": "*i32", "scale": "*fp32", "packed": "*i32", "qweight": "*i32", "qzeros": "*i32",
    "zeros": "*i8", "lows": "*fp32", "highs": "*fp32",
}  # fmt: skip
REALS = {"floor": "fp32", "epsilon": "fp32", "most": "fp32", "ceiling": "fp32"}
# Rounded to nearest even, or exact; no `.ftz`, no fma, no `.approx` or `.full`
RIGHT = re.compile(
    r"(?:add|sub|mul|div|sqrt)\.rn\.f32|(?:min|max|abs)\.f(?:16|32)(?:x2)?|neg\.f32|cvt\.f32\.f16|cvt\.rn\.f32\.[su](?:16|32)|cvt\.rzi\.s(?:8|16|32)\.f32"
    r"|(?:setp|selp)\..*"
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


class Absent:
    """What Triton asks of a device before it compiles for it."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def launched(work: Callable[[], None]) -> dict[str, tuple[str, str]]:
    """(name, PTX) of each kernel that `work` would run on a GPU, compiled for its arguments and not run."""
    found, run = {}, JITFunction.run

    def compiled(kernel: Any, *arguments: Any, **options: Any) -> Any:
        made = run(kernel, *arguments, **options | {"warmup": True})
        found[made.hash] = kernel.__name__, made.asm["ptx"]
        return made

    driver.set_active(Absent())
    JITFunction.run = compiled
    try:
        work()
    finally:
        JITFunction.run = run
    return found


def every_block_type() -> None:
    """Of rows whose number no kernel is specialised for."""
    rows = torch.zeros((3, 768))
    for name in ggml.ENCODERS:
        for importance in (None, torch.ones(768)) if name in WEIGHTED else (None,):
            blocks = ggml.encode(name, rows, importance)
        ggml.decode(name, blocks, 768)


def check(name: str, ptx: str) -> set[str]:
    """Its floating-point operations, all of them right."""
    found = set(FLOATING.findall(ptx))
    wrong = {operation for operation in found if not RIGHT.fullmatch(operation)}
    assert not wrong, (name, wrong)
    return found


if __name__ == "__main__":
    for kernel, scales, constants in variants():
        assert check(kernel.__name__, ptx_of(kernel, scales, constants)) or kernel is fp8._largest, kernel.__name__
    of_blocks = [(name, check(name, ptx)) for name, ptx in launched(every_block_type).values()]
    assert len(of_blocks) > 40
    assert {"sqrt.rn.f32", "div.rn.f32"} < set().union(*(operations for _, operations in of_blocks))
