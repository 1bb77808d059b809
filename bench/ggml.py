"""Times the kernels of ggml's block types on one core, encoding and decoding, beside a copy of the memory.

    python bench/ggml.py [--rows 1024] [--columns 4096] [--repeat 3] [--types Q4_K,Q6_K]

M/s is millions of weights a second; encoding is from bfloat16 rows as the engine drives it, without and with an importance matrix. llama-quantize's
rates beside them (one thread of a Zen 4 core) were measured once, elsewhere. Exit code 1 if Q4_K, Q5_K, Q6_K or IQ4_XS is not faster than those.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import numpy as np
import torch
from rates import fastest, weights
from watch import machine

from glmconv.codecs.ggml import IMPORTANCE_NEEDED, TYPES, GgmlEncoder, decode, ggml_type
from glmconv.dtypes import BY_NAME

PEER = {"Q4_K": 14, "Q5_K": 17, "Q6_K": 33, "Q3_K": 74, "Q2_K": 17, "IQ4_XS": 5, "IQ4_NL": 4, "Q8_0": 190}  # llama.cpp of 2026-10
WANTED = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--types", default=",".join(TYPES))
    options = parser.parse_args()
    bits = weights(options.rows, options.columns).view(torch.uint16).numpy()
    importance = np.random.default_rng(0).random(options.columns, np.float32) + np.float32(0.1)
    print(f"{machine()}; {options.rows} x {options.columns} weights, one core, M/s")
    print(f"{'':10}{'encode':>10}{'importance':>12}{'decode':>10}{'llama.cpp':>12}")
    kept = True
    for name in options.types.split(","):
        weighted, out = encoding(name, bits, importance, options.repeat)
        plain = float("nan") if name in IMPORTANCE_NEEDED else encoding(name, bits, None, options.repeat)[0]
        kind = ggml_type(name)
        back = rate(bits.size, lambda kind=kind, out=out: decode(kind, out, options.columns), options.repeat)
        kept = kept and (name not in WANTED or plain > PEER[name])
        print(f"{name:10}{plain:10.0f}{weighted:12.0f}{back:10.0f}{PEER.get(name, ''):>12}")
    copy = np.empty_like(bits)
    print(f"{'copy':10}{rate(bits.size, lambda: np.copyto(copy, bits), options.repeat):10.0f}")
    print("as wanted" if kept else "slower than wanted")
    raise SystemExit(0 if kept else 1)


def encoding(name: str, bits: np.ndarray, importance: np.ndarray | None, repeat: int) -> tuple[float, np.ndarray]:
    encoder = GgmlEncoder(ggml_type(name), bits.shape, BY_NAME["bfloat16"], importance)
    scratch: dict[int, memoryview] = {}
    work = encoder.begin(lambda size: scratch.setdefault(size, memoryview(bytearray(size))))
    out = np.empty(len(bits) * encoder.row_bytes, np.uint8)
    return rate(bits.size, lambda: work.encode(0, bits.reshape(-1).view(np.uint8).data, out.data), repeat), out


def rate(size: int, act: Callable[[], object], repeat: int) -> float:
    """M/s."""
    return size / 1e6 / fastest(act, repeat)


if __name__ == "__main__":
    main()
