"""ggml's IQ2_XXS, IQ2_XS and IQ2_S: magnitudes in groups of eight as points of a codebook, signs apart. Arguments as in ggml_k.py."""

from __future__ import annotations

from typing import Any

from glmconv.kernels.floats import Array, f32
from glmconv.kernels.ggml_codebook import codebook
from glmconv.kernels.ggml_iq_search import ALWAYS, MISSED, Rule, found, scratch, searcher
from glmconv.kernels.ggml_simple import put_half
from glmconv.kernels.jit import inner, kernel

XXS = Rule(32, True, f32(1e-15), f32(1), f32(0), 13, f32(0.1), ALWAYS, f32(1))
XS = Rule(16, True, f32(1e-15), f32(1), f32(0), 19, f32(0.1), MISSED, f32(1))
S = Rule(16, False, f32(1e-8), f32(2), f32(0.25), 19, f32(0.1), MISSED, f32(0.9875))
search = searcher(8, 3)


def encode_iq2_xxs(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ2_XXS"), XXS)


def encode_iq2_xs(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ2_XS"), XS)


def encode_iq2_s(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ2_S"), S)


@kernel
def _encode(values: Any, importance: Any, out: Any, book: Any, rule: Any) -> None:
    s, f = scratch(), found()
    for b in range(len(out)):
        block, at = out[b], b * 256 % max(len(importance), 1)
        d = search(book, s, f, rule, values[b * 256 : (b + 1) * 256], importance[at : at + 256])
        block[:] = 0
        put_half(block, 0, d * rule.fudge)
        if len(block) == 82:
            _pack_s(f, block)
        elif d != f32(0):
            if len(block) == 66:
                _pack_xxs(f, block)
            else:
                _pack_xs(f, block)


@inner
def _pack_xxs(f: Any, out: Any) -> None:
    """For each sub-block four numbers of points, and four times seven signs with four bits of scale."""
    for j in range(8):
        word = f.codes[j] << 28
        for k in range(4):
            out[2 + 8 * j + k] = f.points[4 * j + k]
            word |= f.signs[4 * j + k] << 7 * k
        for k in range(4):
            out[6 + 8 * j + k] = word >> 8 * k & 255


@inner
def _pack_xs(f: Any, out: Any) -> None:
    """32 numbers of points, nine bits each with seven signs; 16 scales of four bits."""
    for i in range(32):
        word = f.points[i] | f.signs[i] << 9
        out[2 + 2 * i] = word & 255
        out[3 + 2 * i] = word >> 8 & 255
    for j in range(16):
        out[66 + j // 2] |= f.codes[j] << 4 * (j % 2)


@inner
def _pack_s(f: Any, out: Any) -> None:
    """32 numbers of points but for their upper two bits, 32 bytes of signs, those bits, and 16 scales of four bits."""
    for i in range(32):
        out[2 + i] = f.points[i] & 255
        out[34 + i] = f.signs[i]
        out[66 + i // 4] |= (f.points[i] >> 8 & 3) << 2 * (i % 4)
    for j in range(16):
        out[74 + j // 2] |= f.codes[j] << 4 * (j % 2)
