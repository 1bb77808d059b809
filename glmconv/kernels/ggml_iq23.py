"""ggml's IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S: magnitudes as points of a codebook, signs apart. Arguments as in ggml_k.py."""

from __future__ import annotations

from typing import Any, NamedTuple

from glmconv.kernels.floats import Array, f32
from glmconv.kernels.ggml_codebook import codebook
from glmconv.kernels.ggml_iq_search import ALWAYS, ANY_MISSED, MISSED, found, scratch, search
from glmconv.kernels.ggml_simple import put_half
from glmconv.kernels.jit import inner, kernel


class Rule(NamedTuple):
    """How a type's super-blocks of 256 values are searched. Numbers with a point are float32."""

    dimensions: int  # of a point: 8 or 4
    levels: int  # of a coordinate
    n: int  # values of a sub-block, which have a scale
    even: bool  # whether an eighth sign is told by seven others
    least: Any  # a sub-block whose values are below is all 0
    spread: Any  # times the mean of squares, beside a value's own square, under the root that the importance is multiplied with
    floor: Any  # without importance: times that, beside a value's own square, is a value's weight
    tries: int
    step: Any  # tried is whether the greatest value stands for 2 * levels - 1 and so many steps more or less
    how: int
    fudge: Any  # times the super-block's scale


IQ2_XXS = Rule(8, 3, 32, True, f32(1e-15), f32(1), f32(0), 13, f32(0.1), ALWAYS, f32(1))
IQ2_XS = Rule(8, 3, 16, True, f32(1e-15), f32(1), f32(0), 19, f32(0.1), MISSED, f32(1))
IQ2_S = Rule(8, 3, 16, False, f32(1e-8), f32(2), f32(0.25), 19, f32(0.1), MISSED, f32(0.9875))
IQ3_XXS = Rule(4, 8, 32, True, f32(1e-8), f32(2), f32(0), 31, f32(0.2), MISSED, f32(1.0125))
IQ3_S = Rule(4, 8, 32, False, f32(1e-45), f32(2), f32(0), 19, f32(0.2), ANY_MISSED, f32(1.033))


def encode_iq2_xxs(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ2_XXS"), IQ2_XXS)


def encode_iq2_xs(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ2_XS"), IQ2_XS)


def encode_iq2_s(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ2_S"), IQ2_S)


def encode_iq3_xxs(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ3_XXS"), IQ3_XXS)


def encode_iq3_s(values: Array, importance: Array, out: Array) -> None:
    _encode(values, importance, out, codebook("IQ3_S"), IQ3_S)


@kernel
def _encode(values: Any, importance: Any, out: Any, book: Any, rule: Any) -> None:
    s, f = scratch(), found()
    for b in range(len(out)):
        block, at = out[b], b * 256 % max(len(importance), 1)
        d = search(book, s, f, rule, values[b * 256 : (b + 1) * 256], importance[at : at + 256])
        block[:] = 0
        put_half(block, 0, d * rule.fudge)
        if len(block) == 110:
            _pack_iq3_s(f, block)
        elif len(block) == 82:
            _pack_iq2_s(f, block)
        elif d != f32(0):
            if len(block) == 98:
                _pack_iq3_xxs(f, block)
            elif len(block) == 66:
                _pack_iq2_xxs(f, block)
            else:
                _pack_iq2_xs(f, block)


@inner
def _pack_iq2_xxs(f: Any, out: Any) -> None:
    """For each sub-block four numbers of points, and four times seven signs with four bits of scale."""
    for j in range(8):
        word = f.codes[j] << 28
        for k in range(4):
            out[2 + 8 * j + k] = f.points[4 * j + k]
            word |= f.signs[4 * j + k] << 7 * k
        for k in range(4):
            out[6 + 8 * j + k] = word >> 8 * k & 255


@inner
def _pack_iq2_xs(f: Any, out: Any) -> None:
    """32 numbers of points, nine bits each with seven signs; 16 scales of four bits."""
    for i in range(32):
        word = f.points[i] | f.signs[i] << 9
        out[2 + 2 * i] = word & 255
        out[3 + 2 * i] = word >> 8 & 255
    for j in range(16):
        out[66 + j // 2] |= f.codes[j] << 4 * (j % 2)


@inner
def _pack_iq2_s(f: Any, out: Any) -> None:
    """32 numbers of points but for their upper two bits, 32 bytes of signs, those bits, and 16 scales of four bits."""
    for i in range(32):
        out[2 + i] = f.points[i] & 255
        out[34 + i] = f.signs[i]
        out[66 + i // 4] |= (f.points[i] >> 8 & 3) << 2 * (i % 4)
    for j in range(16):
        out[74 + j // 2] |= f.codes[j] << 4 * (j % 2)


@inner
def _pack_iq3_xxs(f: Any, out: Any) -> None:
    """64 numbers of points, then four times seven signs and four bits of scale for each sub-block."""
    for i in range(64):
        out[2 + i] = f.points[i]
    for j in range(8):
        word = f.codes[j] << 28
        for k in range(4):
            word |= f.signs[4 * j + k] << 7 * k
        for k in range(4):
            out[66 + 4 * j + k] = word >> 8 * k & 255


@inner
def _pack_iq3_s(f: Any, out: Any) -> None:
    """64 numbers of points but for their ninth bits, those, 32 bytes of signs, and scales of four bits.

    As ggml does it, a sub-block of zeros takes no place among the numbers and signs: those behind it move up, and are read as another sub-block's.
    """
    place = 0
    for j in range(8):
        if f.live[j]:
            for k in range(8):
                out[2 + 8 * place + k] = f.points[8 * j + k] & 255
                out[66 + j] |= f.points[8 * j + k] >> 8 << k
            for k in range(4):
                out[74 + 4 * place + k] = f.signs[4 * j + k]
            place += 1
        out[106 + j // 2] |= f.codes[j] << 4 * (j % 2)
