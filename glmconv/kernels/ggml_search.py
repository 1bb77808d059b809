"""ggml's searches for scales, sixteen sub-blocks at once: a lane's sums run in the order of ggml's scalar loops, so the bits are ggml's.

Source: ggml-quants.c of libggml 0.25.3 (make_qx_quants, make_q3_quants, make_qkx2_quants and make_qkx3_quants, make_qp_quants); equal to the vectors
in tests/vectors/ggml. `x` and `w` are arrays of lanes [n, LANES], the values and their weights; `t` is one of scratch.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glmconv.kernels.floats import bits, f32, i32, u8, u32
from glmconv.kernels.jit import inner
from glmconv.kernels.lanes import LANES, load, magnitudes, roots, splat, store, where, whole

EPSILON = np.float32(1e-15)


@inner
def nearest(v: Any) -> Any:
    """The nearest integer, ties to even, as ggml has it: beyond 2^22 it wraps."""
    return i32(i32(u32(bits(v + f32(12582912)) & u32(0x7F_FFFF))) - i32(0x40_0000))


@inner
def gather(flat: Any, first: int, n: int, period: int, x: Any) -> None:
    """Sub-blocks of n values from number `first` on, one into each lane, of `flat` repeated from every `period` values on; what is beyond is 0."""
    total = len(flat) // n
    for lane in range(LANES):
        at = (first + lane) * n
        if period:
            at %= period
        if at < total * n:
            for i in range(n):
                x[i, lane] = flat[at + i]
        else:
            for i in range(n):
                x[i, lane] = f32(0)


@inner
def scatter(t: Any, n: int, codes: Any) -> None:
    """Lanes of small numbers to bytes, lane after lane."""
    for lane in range(LANES):
        for i in range(n):
            codes[lane * n + i] = u8(i32(t[i, lane]))


@inner
def squares(flat: Any) -> Any:
    """The sum of squares, one after the other."""
    total = f32(0)
    for i in range(len(flat)):
        total += flat[i] * flat[i]
    return total


@inner
def weigh(x: Any, w: Any, n: int, mean: Any) -> Any:
    """The importance in `w`, times sqrt(mean + x * x); returns the sums."""
    total = splat(f32(0))
    for i in range(n):
        v = load(x, i)
        weight = load(w, i) * roots(mean + v * v)
        store(w, i, weight)
        total += weight
    return total


@inner
def peaks(x: Any, n: int) -> Any:
    """(the first value of the greatest magnitude, that magnitude)."""
    top, peak = splat(f32(0)), splat(f32(0))
    for i in range(n):
        v = load(x, i)
        more = magnitudes(v) > peak
        top, peak = where(more, v, top), where(more, magnitudes(v), peak)
    return top, peak


@inner
def signed(x: Any, w: Any, t: Any, n: int, nmax: int) -> Any:
    """(scale, factor): codes whole(factor * x, -nmax, nmax - 1) + nmax with the scale that fits them best; (0, 0) where all are below EPSILON."""
    top, peak = peaks(x, n)
    for i in range(n):
        store(t, i, load(w, i) * load(x, i))
    factor = f32(-nmax) / top
    scale, best = splat(f32(0)), splat(f32(0))
    for k in range(-10, 10):  # -10 stands for the first try, whose sums are taken whatever they are
        if k != 0:
            tried = factor if k == -10 else f32(-(f32(nmax) + f32(0.1) * f32(k))) / top
            xl, ll = splat(f32(0)), splat(f32(0))
            for i in range(n):
                code = whole(tried * load(x, i), -nmax, nmax - 1)
                xl += load(t, i) * code
                ll += load(w, i) * code * code
            fitted = xl / ll
            if k == -10:
                scale = where(ll != f32(0), fitted, scale)
                best = scale * xl
            else:
                won = (ll > f32(0)) & (xl * xl > best * ll)
                factor, scale, best = where(won, tried, factor), where(won, fitted, scale), where(won, fitted * xl, best)
    dead = peak < EPSILON
    return where(dead, f32(0), scale), where(dead, f32(0), factor)


@inner
def descent(x: Any, t: Any, n: int, nmax: int) -> Any:
    """(scale, alive): codes in `t`, from -nmax to nmax - 1, each moved while that betters the fit, five times over."""
    top, peak = peaks(x, n)
    factor = f32(-nmax) / top
    xl, ll = splat(f32(0)), splat(f32(0))
    for i in range(n):
        v = load(x, i)
        code = whole(factor * v, -nmax, nmax - 1)
        store(t, i, code)
        xl += v * v * v * code
        ll += v * v * code * code
    for _ in range(5):
        for i in range(n):
            v, old = load(x, i), load(t, i)
            a = xl - v * v * v * old
            b = ll - v * v * old * old
            new = whole(v * b / a, -nmax, nmax - 1)
            tried = (a > f32(0)) & (new != old)
            a += v * v * v * new
            b += v * v * new * new
            won = tried & (b > f32(0)) & (a * a * ll > xl * xl * b)
            store(t, i, where(won, new, old))
            xl, ll = where(won, a, xl), where(won, b, ll)
    alive = peak >= EPSILON
    return where(alive, xl / ll, f32(0)), where(alive, splat(f32(1)), f32(0))


@inner
def _misfit(x: Any, w: Any, t: Any, n: int, scale: Any, low: Any, absolute: Any) -> Any:
    total = splat(f32(0))
    for i in range(n):
        e = scale * load(t, i) + low - load(x, i)
        total += load(w, i) * (magnitudes(e) if absolute else e * e)
    return total


@inner
def minimum(x: Any, w: Any, t: Any, n: int, nmax: int, rule: Any) -> Any:
    """(scale, -minimum, factor, base): codes whole(factor * (x - base), 0, nmax); the factor is 0 where all values are one.

    rule: (start, step, steps, whether the error is absolute instead of squared)
    """
    start, step, steps, absolute = rule
    low, high, sw = load(x, 0), load(x, 0), load(w, 0)
    sx = sw * low
    for i in range(1, n):
        v = load(x, i)
        low, high = where(v < low, v, low), where(v > high, v, high)
        sw += load(w, i)
        sx += load(w, i) * v
    low = where(low > f32(0), f32(0), low)
    dead, least = high <= low, low
    factor, base = f32(nmax) / (high - low), low
    scale = f32(1) / factor
    for i in range(n):
        store(t, i, whole(factor * (load(x, i) - low), 0, nmax))
    best = _misfit(x, w, t, n, scale, low, absolute)
    for k in range(steps + 1):
        tried = f32(f32(start + step * f32(k)) + f32(nmax)) / (high - low)
        a, b, c = splat(f32(0)), splat(f32(0)), splat(f32(0))
        for i in range(n):
            v = load(x, i)
            code = whole(tried * (v - low), 0, nmax)
            store(t, i, code)
            wl = load(w, i) * code
            a += wl
            b += wl * code
            c += wl * v
        d = sw * b - a * a
        s, m = (sw * c - sx * a) / d, (b * sx - a * c) / d
        above = m > f32(0)
        s, m = where(above, c / b, s), where(above, f32(0), m)
        error = _misfit(x, w, t, n, s, m, absolute)
        won = (d > f32(0)) & (error < best)
        factor, base, best = where(won, tried, factor), where(won, low, base), where(won, error, best)
        scale, low = where(won, s, scale), where(won, m, low)
    return where(dead, f32(0), scale), f32(-1) * where(dead, least, low), where(dead, f32(0), factor), base


@inner
def positive(x: Any, w: Any, n: int, nmax: int, codes: Any) -> Any:
    """Scales of at least 0, few: the scale that fits codes 0 to nmax best; scalar."""
    most = f32(0)
    for i in range(n):
        most = x[i] if x[i] > most else most
    if most < EPSILON:
        codes[:n] = u8(0)
        return f32(0)
    factor = f32(nmax) / most
    best = f32(0)
    for i in range(n):
        e = x[i] - f32(f32(1) / factor) * f32(u8(nearest(factor * x[i])))
        best += w[i] * e * e
    for k in range(-4, 5):
        if k != 0:
            tried = (f32(0.1) * f32(k) + f32(nmax)) / most
            error = f32(0)
            for i in range(n):
                e = x[i] - f32(f32(1) / tried) * f32(min(i32(nmax), nearest(tried * x[i])))
                error += w[i] * e * e
            if error < best:
                best, factor = error, tried
    xl, ll = f32(0), f32(0)
    for i in range(n):
        code = min(i32(nmax), nearest(factor * x[i]))
        codes[i] = u8(code)
        xl += w[i] * x[i] * f32(code)
        ll += w[i] * f32(code) * f32(code)
    return _settled(x, w, n, nmax, codes, xl, ll)


@inner
def _settled(x: Any, w: Any, n: int, nmax: int, codes: Any, xl: Any, ll: Any) -> Any:
    """Each code moved while that betters the fit; the scale."""
    for _ in range(5):
        changed = False
        for i in range(n):
            old = f32(codes[i])
            a = xl - w[i] * x[i] * old
            b = ll - w[i] * old * old
            if a > f32(0) and b > f32(0):
                code = min(i32(nmax), nearest(x[i] * b / a))
                if code != i32(codes[i]):
                    a += w[i] * x[i] * f32(code)
                    b += w[i] * f32(code) * f32(code)
                    if a * a * ll > xl * xl * b:
                        codes[i] = u8(code)
                        xl, ll, changed = a, b, True
        if not changed:
            break
    return xl / ll if ll > f32(0) else f32(0)
