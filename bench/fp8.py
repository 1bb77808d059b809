"""Times the float8 kernels on one core beside plain torch (the same formulas, the same bytes, one thread) and beside a copy of the memory.

    python bench/fp8.py [--rows 4096] [--columns 5120] [--repeat 5]

GB/s counts the bfloat16 side: 2 bytes a weight, whichever way. Exit code 1 if encoding is not 8 times plain torch, or decoding less than half a copy.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from rates import Rate, measured, report, weights

from glmconv.kernels import fp8, reference

FASTER, COPIES = 8.0, 2.0  # wanted: encode at least so many times plain torch, decode within so many copies


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=5120)
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    weight = weights(options.rows, options.columns)
    rates = [*blocks(weight, options.repeat), mx(weight, options.repeat), *tensor(weight, options.repeat)]
    encodes = all(rate.kernel >= FASTER * rate.torch for rate in rates if rate.what.startswith("encode"))
    decodes = all(rate.kernel >= rate.copy / COPIES for rate in rates if rate.what.startswith("decode"))
    raise SystemExit(report(weight, rates, kept=encodes and decodes))


def blocks(weight: torch.Tensor, repeat: int) -> list[Rate]:
    """128 x 128 and per channel, encoded and decoded."""
    bits, rates = weight.view(torch.uint16).numpy(), []
    for name, block, rule in (
        ("128x128", (128, 128), "division"),
        ("128x128 ue8m0", (128, 128), "ue8m0"),
        ("channel", (1, weight.shape[1]), "division"),
    ):
        rows, columns = weight.shape
        codes, out = np.empty(bits.shape, np.uint8), np.empty_like(bits)
        scales = np.empty((-(-rows // block[0]), -(-columns // block[1])), np.float32)

        def encode(block=block, rule=rule, codes=codes, scales=scales) -> object:
            return fp8.encode_block(bits, codes, scales, block, rule)

        def decode(block=block, codes=codes, scales=scales, out=out) -> object:
            return fp8.decode_block(codes, scales, out, block, 0)

        plain = measured(weight, lambda block=block, rule=rule: reference.encode_block(weight, block, rule), 2)
        rates.append(Rate.of(f"encode {name}", weight, encode, plain, repeat))
        taken = torch.from_numpy(codes), torch.from_numpy(scales)
        plain = measured(weight, lambda block=block, taken=taken: reference.decode_block(*taken, torch.bfloat16, block), 2)
        rates.append(Rate.of(f"decode {name}", weight, decode, plain, repeat))
    return rates


def mx(weight: torch.Tensor, repeat: int) -> Rate:
    bits = weight.view(torch.uint16).numpy()
    codes, exponents = np.empty(bits.shape, np.uint8), np.empty((bits.shape[0], -(-bits.shape[1] // 32)), np.uint8)
    plain = measured(weight, lambda: reference.encode_mx(weight), 2)
    return Rate.of("encode mx 1x32", weight, lambda: fp8.encode_mx(bits, codes, exponents), plain, repeat)


def tensor(weight: torch.Tensor, repeat: int) -> list[Rate]:
    """Two passes: the whole tensor's largest, then the codes."""
    bits = weight.view(torch.uint16).numpy()
    codes = np.empty(bits.shape, np.uint8)
    scale = fp8.scale_of(fp8.largest(bits, "division")[0], "division")
    scales = torch.tensor(scale)
    return [
        Rate.of("largest", weight, lambda: fp8.largest(bits, "division"), measured(weight, lambda: reference.largest(weight, "division"), 2), repeat),
        Rate.of(
            "encode tensor",
            weight,
            lambda: fp8.encode_scaled(bits, codes, scale),
            measured(weight, lambda: reference.encode(weight, scales), 2),
            repeat,
        ),
    ]


if __name__ == "__main__":
    main()
