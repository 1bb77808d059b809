"""FP8 kernels on one core beside the same formula in plain torch and a copy of the same bytes, in one run: GB/s of bfloat16.

python bench/fp8.py [--rows 1536] [--columns 5120]
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from pace import paces, show
from watch import machine

from glmconv.kernels import fp8, reference

BLOCK, ROW = (128, 128), (1, 1 << 62)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--columns", type=int, default=5120)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    weight = (torch.randn(options.rows, options.columns) * 0.02).bfloat16()
    bits = weight.view(torch.int16).numpy().view(np.uint16)
    print(f"{machine()}; {options.rows} x {options.columns} bfloat16, normal values")
    for name, block, rule in (("128x128", BLOCK, "division"), ("128x128 ue8m0", BLOCK, "ue8m0"), ("a scale for each row", ROW, "division")):
        grid = [-(-n // min(by, n)) for n, by in zip(bits.shape, block, strict=True)]
        codes, scales, out = np.empty(bits.shape, np.uint8), np.empty(grid, np.float32), np.empty_like(bits)
        fp8.encode_block(bits, codes, scales, block, rule)
        coded, scaled = torch.from_numpy(codes), torch.from_numpy(scales)
        encode = {
            "ours": lambda block=block, rule=rule, codes=codes, scales=scales: fp8.encode_block(bits, codes, scales, block, rule),
            "plain torch": lambda block=block, rule=rule: reference.encode_block(weight, block, rule),
            "memory copy": lambda out=out: np.copyto(out, bits),
        }
        decode = {
            "ours": lambda block=block, codes=codes, scales=scales, out=out: fp8.decode_block(codes, scales, out, block, 0),
            "plain torch": lambda block=block, coded=coded, scaled=scaled: reference.decode_block(coded, scaled, block, torch.bfloat16),
            "memory copy": lambda out=out: np.copyto(out, bits),
        }
        show(f"encode, {name}", paces(encode, bits.nbytes), "plain torch")
        show(f"decode, {name}", paces(decode, bits.nbytes), "plain torch")
    codes, exponents = np.empty(bits.shape, np.uint8), np.empty((options.rows, options.columns // 32), np.uint8)
    mx = {"ours": lambda: fp8.encode_mx(bits, codes, exponents), "plain torch": lambda: reference.encode_mx(weight)}
    show("encode, mxfp8", paces(mx, bits.nbytes), "plain torch")


if __name__ == "__main__":
    main()
