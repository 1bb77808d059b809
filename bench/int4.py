"""Times the 4-bit kernels on one core beside plain torch (the same formulas, the same bytes, one thread) and beside a copy of the memory.

    python bench/int4.py [--rows 2048] [--columns 5120] [--group 128] [--repeat 5]

GB/s counts the bfloat16 side: 2 bytes a weight, whichever way. Exit code 1 if encoding is not 8 times plain torch.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rates import Rate, measured, report, weights

from glmconv.kernels import int4, reference

FASTER = 8.0  # wanted: encode at least so many times plain torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight = weights(options.rows, options.columns)
    rates = [
        *packed(weight, options.group, options.repeat, symmetric=True),
        *packed(weight, options.group, options.repeat, symmetric=False),
        *awq(weight, options.group, options.repeat),
    ]
    kept = all(rate.kernel >= FASTER * rate.torch for rate in rates if rate.what.startswith("encode"))
    raise SystemExit(report(weight, rates, kept=kept))


def packed(weight: torch.Tensor, group: int, repeat: int, *, symmetric: bool) -> list[Rate]:
    bits = weight.view(torch.uint16).numpy()
    rows, columns = bits.shape
    words, scales, out = np.empty((rows, columns // 8), np.int32), np.empty((rows, columns // group), np.uint16), np.empty_like(bits)
    zeros = None if symmetric else np.empty(scales.shape, np.int8)
    name = f"pack-quantized g{group} {'sym' if symmetric else 'asym'}"
    plain = measured(weight, lambda: reference.encode_packed(weight, group, symmetric=symmetric), 2)
    encode = Rate.of(f"encode {name}", weight, lambda: int4.encode_packed(bits, words, scales, zeros, group), plain, repeat)
    taken = torch.from_numpy(words), torch.from_numpy(scales).view(torch.bfloat16), None if zeros is None else torch.from_numpy(zeros)
    plain = measured(weight, lambda: reference.decode_packed(*taken, torch.bfloat16, group), 2)
    return [encode, Rate.of(f"decode {name}", weight, lambda: int4.decode_packed(words, scales, zeros, out, group), plain, repeat)]


def awq(weight: torch.Tensor, group: int, repeat: int) -> list[Rate]:
    bits = weight.view(torch.uint16).numpy()
    rows, columns = bits.shape
    qweight, qzeros = np.empty((columns, rows // 8), np.int32), np.empty((columns // group, rows // 8), np.int32)
    scales, out = np.empty((columns // group, rows), np.float16), np.empty_like(bits)
    plain = measured(weight, lambda: reference.encode_awq(weight, group), 2)
    encode = Rate.of(f"encode awq g{group}", weight, lambda: int4.encode_awq(bits, qweight, qzeros, scales, group), plain, repeat)
    taken = torch.from_numpy(qweight), torch.from_numpy(qzeros), torch.from_numpy(scales)
    plain = measured(weight, lambda: reference.decode_awq(*taken, torch.bfloat16, group), 2)
    return [encode, Rate.of(f"decode awq g{group}", weight, lambda: int4.decode_awq(qweight, qzeros, scales, out, group), plain, repeat)]


if __name__ == "__main__":
    main()
