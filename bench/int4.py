"""Four-bit kernels on one core beside the same formula in plain torch, in one run: GB/s of bfloat16.

    python bench/int4.py [--rows 1536] [--columns 5120] [--group 128]

Plain torch stops at the codes; packing them is its user's work (compressed-tensors does it in one more pass a nibble).
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from pace import paces, show
from watch import machine

from glmconv.kernels import int4, reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--group", type=int, default=128)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows, columns, group = options.rows, options.columns, options.group
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    bits = weight.view(torch.int16).numpy().view(np.uint16)
    out = np.empty_like(bits)
    print(f"{machine()}; {rows} x {columns} bfloat16, groups of {group}, normal values")
    for name, symmetric in (("int4 (sym)", True), ("int4:asym", False)):
        words, scales = np.empty((rows, columns // 8), np.int32), np.empty((rows, columns // group), np.uint16)
        zeros = None if symmetric else np.empty((rows, columns // group), np.int8)
        encode = {
            "ours": lambda words=words, scales=scales, zeros=zeros: int4.encode_packed(bits, words, scales, zeros, group),
            "plain torch": lambda symmetric=symmetric: pack_to_int32(reference.encode_packed(weight, group, symmetric)[0], 4),
        }
        show(f"encode, {name}", paces(encode, bits.nbytes), "plain torch")
        decode = {
            "ours": lambda words=words, scales=scales, zeros=zeros: int4.decode_packed(words, scales, zeros, out, group),
            "memory copy": lambda: np.copyto(out, bits),
        }
        show(f"decode, {name}", paces(decode, bits.nbytes), "memory copy")
    words, zeros = np.empty((columns, rows // 8), np.int32), np.empty((columns // group, rows // 8), np.int32)
    halves = np.empty((columns // group, rows), np.float16)
    awq = {"ours": lambda: int4.encode_awq(bits, words, zeros, halves, group), "plain torch": lambda: reference.encode_awq(weight, group)}
    show("encode, awq", paces(awq, bits.nbytes), "plain torch")
    back = {"ours": lambda: int4.decode_awq(words, zeros, halves, out, group), "memory copy": lambda: np.copyto(out, bits)}
    show("decode, awq", paces(back, bits.nbytes), "memory copy")


if __name__ == "__main__":
    main()
