"""kernels/ggml_search.py for Triton: one sub-block in each lane of a program, whose sums run in the order of ggml's scalar loops.

The arrays lie as kernels/lanes.py has them: value i of each sub-block beside the others', `stride` after those of value i - 1, so that neighbouring
lanes read neighbouring values. `at` is where a lane's first value and its weight lie.
What is not at hand again is computed again, by the same operations: nothing that a lane writes is read by it.
"""

from __future__ import annotations

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-15)


@triton.jit
def lanes(count, SIZE: tl.constexpr):
    """(this program's sub-blocks, which of them are there); what is not there reads the first one and must not be stored."""
    lane = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    return tl.where(lane < count, lane, 0), lane < count


@triton.jit
def held(v, low, high):
    """The nearest integer, ties to even, as ggml has it (beyond 2^22 it wraps), held between two. NaN is 0, as where processors make it of a sum."""
    code = ((v + 12582912.0).to(tl.int32, bitcast=True) & 0x7F_FFFF) - 0x40_0000
    return tl.minimum(tl.maximum(tl.where(v == v, code, 0), low), high)


@triton.jit
def nearest(v):
    """`held` by nothing."""
    return held(v, -0x40_0000, 0x3F_FFFF)


@triton.jit
def nothing(like):
    """0.0 in each lane."""
    return tl.zeros(like.shape, tl.float32)


@triton.jit
def inverse(v):
    """1 / v, 0 of 0."""
    return tl.where(v != 0.0, tl.div_rn(1.0, v), 0.0)


@triton.jit
def greatest(x, at, stride, N: tl.constexpr):
    """The first value of the greatest magnitude."""
    top = nothing(at)
    for _ in range(N):
        v = tl.load(x + at)
        top = tl.where(tl.abs(v) > tl.abs(top), v, top)
        at += stride
    return top


@triton.jit
def squares(x, at, stride, size):
    """The sum of the squares of `size` values, one after the other."""
    total = nothing(at)
    for _ in range(size):
        v = tl.load(x + at)
        total += v * v
        at += stride
    return total


@triton.jit
def total(w, at, stride, N: tl.constexpr):
    """The sum of N values, one after the other."""
    found = nothing(at)
    for _ in range(N):
        found += tl.load(w + at)
        at += stride
    return found


@triton.jit
def _products(x, w, at, stride, factor, N: tl.constexpr, NMAX: tl.constexpr):
    """The sums of w x l and w l l for the codes l that `factor` gives."""
    xl, ll = nothing(at), nothing(at)
    for _ in range(N):
        v, weight = tl.load(x + at), tl.load(w + at)
        code = held(factor * v, -NMAX, NMAX - 1).to(tl.float32)
        xl += weight * v * code
        ll += weight * code * code
        at += stride
    return xl, ll


@triton.jit
def signed(x, w, at, stride, N: tl.constexpr, NMAX: tl.constexpr):
    """(scale, factor): codes held(factor * x, -NMAX, NMAX - 1) with the scale that fits them best; (0, 0) where all are below EPSILON."""
    top = greatest(x, at, stride, N)
    factor = tl.div_rn(-NMAX * 1.0, top)
    xl, ll = _products(x, w, at, stride, factor, N, NMAX)
    scale = tl.where(ll != 0.0, tl.div_rn(xl, ll), 0.0)
    best = scale * xl
    k = nothing(at) - 9.0
    for _ in range(19):  # k = 0 is the first try again: rounding could let it win over a later one
        tried = tl.div_rn((k * 0.1 + NMAX) * -1.0, top)
        xl, ll = _products(x, w, at, stride, tried, N, NMAX)
        fitted = tl.div_rn(xl, ll)
        won = (k != 0.0) & (ll > 0.0) & (xl * xl > best * ll)
        factor, scale, best = tl.where(won, tried, factor), tl.where(won, fitted, scale), tl.where(won, fitted * xl, best)
        k += 1.0
    dead = tl.abs(top) < EPSILON
    return tl.where(dead, 0.0, scale), tl.where(dead, 0.0, factor)


@triton.jit
def nibble(codes, i):
    """The lowest four bits but 4 i."""
    return ((codes >> (4 * i)) & 15).to(tl.int32)


@triton.jit
def descent(x, at, stride, N: tl.constexpr, NMAX: tl.constexpr):
    """(scale, codes): codes from 0 to 2 NMAX - 1, each moved while that betters the fit, five times; as nibbles of an int64, the first lowest."""
    top = greatest(x, at, stride, N)
    factor = tl.div_rn(-NMAX * 1.0, top)
    xl, ll, codes, place = nothing(at), nothing(at), tl.zeros(at.shape, tl.int64), at
    for i in range(N):
        v = tl.load(x + place)
        code = held(factor * v, -NMAX, NMAX - 1)
        codes |= (code + NMAX).to(tl.int64) << (4 * i)
        code = code.to(tl.float32)
        xl += v * v * v * code
        ll += v * v * code * code
        place += stride
    for _ in range(5):
        place = at
        for i in range(N):
            v, old = tl.load(x + place), (nibble(codes, i) - NMAX).to(tl.float32)
            a = xl - v * v * v * old
            b = ll - v * v * old * old
            code = held(tl.div_rn(v * b, a), -NMAX, NMAX - 1)
            new = code.to(tl.float32)
            tried = (a > 0.0) & (new != old)
            a += v * v * v * new
            b += v * v * new * new
            won = tried & (b > 0.0) & (a * a * ll > xl * xl * b)
            change = ((code + NMAX) ^ nibble(codes, i)).to(tl.int64) << (4 * i)
            codes ^= tl.where(won, change, 0)
            xl, ll = tl.where(won, a, xl), tl.where(won, b, ll)
            place += stride
    dead = tl.abs(top) < EPSILON
    return tl.where(dead, 0.0, tl.div_rn(xl, ll)), tl.where(dead, 0, codes)


@triton.jit
def _misfit(x, w, at, stride, factor, base, scale, low, N: tl.constexpr, NMAX: tl.constexpr, ABSOLUTE: tl.constexpr):
    """The error of the codes held(factor * (x - base), 0, NMAX) with `scale` and `low`."""
    total = nothing(at)
    for _ in range(N):
        v = tl.load(x + at)
        code = held(factor * (v - base), 0, NMAX).to(tl.float32)
        e = scale * code + low - v
        total += tl.load(w + at) * (tl.abs(e) if ABSOLUTE else e * e)
        at += stride
    return total


@triton.jit
def _moments(x, w, at, stride, factor, base, N: tl.constexpr, NMAX: tl.constexpr):
    """The sums of w l, w l l and w l x for the codes l."""
    a, b, c = nothing(at), nothing(at), nothing(at)
    for _ in range(N):
        v = tl.load(x + at)
        code = held(factor * (v - base), 0, NMAX).to(tl.float32)
        wl = tl.load(w + at) * code
        a += wl
        b += wl * code
        c += wl * v
        at += stride
    return a, b, c


@triton.jit
def _extent(x, w, at, stride, N: tl.constexpr):
    """(least value, greatest value, sum of w, sum of w x)."""
    low = tl.load(x + at)
    high, sw = low, tl.load(w + at)
    sx = sw * low
    for _ in range(N - 1):
        at += stride
        v, weight = tl.load(x + at), tl.load(w + at)
        low, high = tl.where(v < low, v, low), tl.where(v > high, v, high)
        sw += weight
        sx += weight * v
    return low, high, sw, sx


@triton.jit
def minimum(
    x, w, at, stride,
    N: tl.constexpr, NMAX: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, STEPS: tl.constexpr, ABSOLUTE: tl.constexpr,
):  # fmt: skip
    """(scale, minimum, factor, base, sum of w): codes held(factor * (x - base), 0, NMAX); the factor is 0 where all values are one."""
    low, high, sw, sx = _extent(x, w, at, stride, N)
    low = tl.where(low > 0.0, 0.0, low)
    dead, least, base = high <= low, low, low
    factor = tl.div_rn(NMAX * 1.0, high - low)
    scale = tl.div_rn(1.0, factor)
    best = _misfit(x, w, at, stride, factor, low, scale, low, N, NMAX, ABSOLUTE)
    k = nothing(at)
    for _ in range(STEPS + 1):
        tried = tl.div_rn(k * STEP + START + NMAX, high - low)
        a, b, c = _moments(x, w, at, stride, tried, low, N, NMAX)
        d = sw * b - a * a
        s, m = tl.div_rn(sw * c - sx * a, d), tl.div_rn(b * sx - a * c, d)
        above = m > 0.0
        s, m = tl.where(above, tl.div_rn(c, b), s), tl.where(above, 0.0, m)
        error = _misfit(x, w, at, stride, tried, low, s, m, N, NMAX, ABSOLUTE)
        won = (d > 0.0) & (error < best)
        factor, base, best = tl.where(won, tried, factor), tl.where(won, low, base), tl.where(won, error, best)
        scale, low = tl.where(won, s, scale), tl.where(won, m, low)
        k += 1.0
    return tl.where(dead, 0.0, scale), tl.where(dead, least, low), tl.where(dead, 0.0, factor), base, sw


@triton.jit
def _column(codes, i, N: tl.constexpr):
    """Column i of [SIZE, N] integers."""
    return tl.sum(tl.where(tl.arange(0, N)[None, :] == i, codes, 0), 1)


@triton.jit
def _placed(codes, i, column, chosen, N: tl.constexpr):
    """[SIZE, N] with another column i in the rows that are chosen."""
    return tl.where((tl.arange(0, N)[None, :] == i) & chosen[:, None], column[:, None], codes)


@triton.jit
def _lack(x, w, at, factor, N: tl.constexpr, NMAX: tl.constexpr, FIRST: tl.constexpr):
    """The error of the codes that `factor` gives, held only at NMAX, or (FIRST) in a byte."""
    total = nothing(at)
    for i in range(N):
        v = tl.load(x + at + i)
        code = nearest(factor * v)
        code = code & 255 if FIRST else tl.minimum(code, NMAX)
        e = v - tl.div_rn(1.0, factor) * code.to(tl.float32)
        total += tl.load(w + at + i) * e * e
    return total


@triton.jit
def positive(x, w, at, N: tl.constexpr, NMAX: tl.constexpr, SIZE: tl.constexpr):
    """(scale, codes [SIZE, N]): N neighbours from `at` on, scales of at least 0, and the one that fits codes 0 to NMAX best."""
    most = nothing(at)
    for i in range(N):
        v = tl.load(x + at + i)
        most = tl.where(v > most, v, most)
    factor = tl.div_rn(NMAX * 1.0, most)
    best = _lack(x, w, at, factor, N, NMAX, True)
    k = nothing(at) - 4.0
    for _ in range(9):
        tried = tl.div_rn(k * 0.1 + NMAX, most)
        error = _lack(x, w, at, tried, N, NMAX, False)
        won = (k != 0.0) & (error < best)
        best, factor = tl.where(won, error, best), tl.where(won, tried, factor)
        k += 1.0
    xl, ll, codes = nothing(at), nothing(at), tl.zeros((SIZE, N), tl.int32)
    for i in range(N):
        v, weight = tl.load(x + at + i), tl.load(w + at + i)
        code = tl.minimum(nearest(factor * v), NMAX)
        codes = _placed(codes, i, code & 255, most == most, N)
        xl += weight * v * code.to(tl.float32)
        ll += weight * code.to(tl.float32) * code.to(tl.float32)
    xl, ll, codes = _settled(x, w, at, xl, ll, codes, N, NMAX)
    dead = most < EPSILON
    return tl.where((ll > 0.0) & (most >= EPSILON), tl.div_rn(xl, ll), 0.0), tl.where(dead[:, None], 0, codes)


@triton.jit
def _settled(x, w, at, xl, ll, codes, N: tl.constexpr, NMAX: tl.constexpr):
    """Each code moved while that betters the fit, five times over; a sweep without a change makes the next ones idle."""
    for _ in range(5):
        for i in range(N):
            v, weight, stored = tl.load(x + at + i), tl.load(w + at + i), _column(codes, i, N)
            old = stored.to(tl.float32)
            a = xl - weight * v * old
            b = ll - weight * old * old
            code = tl.minimum(nearest(tl.div_rn(v * b, a)), NMAX)
            tried = (a > 0.0) & (b > 0.0) & (code != stored)
            new = code.to(tl.float32)
            a += weight * v * new
            b += weight * new * new
            won = tried & (a * a * ll > xl * xl * b)
            codes = _placed(codes, i, code & 255, won, N)
            xl, ll = tl.where(won, a, xl), tl.where(won, b, ll)
    return xl, ll, codes
