"""ggml's encodings, value by value in numpy's float32 scalars, slow and plain: each gives the values that are stored."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

f = np.float32
EPSILON = f(1e-15)
IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def rnd(v) -> int:
    """To the nearest integer by adding 1.5 * 2^23; wraps beyond 2^22."""
    return int((f(v) + f(12582912)).view(np.int32) & 0x7FFFFF) - 0x400000


def held(v: int, low: int, high: int) -> int:
    return max(low, min(high, v))


def stored(v) -> np.float32:
    return f(np.float16(v))


def peak(x):
    """The first value of the greatest magnitude."""
    top = f(0)
    for v in x:
        if abs(v) > abs(top):
            top = v
    return top


def signed(nmax: int, x, w):
    """Search A: (scale, codes)."""
    top = peak(x)
    if abs(top) < EPSILON:
        return f(0), [0] * len(x)

    def sums(factor):
        xl, ll, codes = f(0), f(0), []
        for v, weight in zip(x, w, strict=True):
            code = held(rnd(factor * v), -nmax, nmax - 1)
            codes.append(code + nmax)
            xl += weight * v * f(code)
            ll += weight * f(code) * f(code)
        return xl, ll, codes

    xl, ll, codes = sums(f(-nmax) / top)
    scale = xl / ll if ll != 0 else f(0)
    best = scale * xl
    for k in range(-9, 10):
        if k:
            xl, ll, tried = sums(-(f(nmax) + f(0.1) * f(k)) / top)
            if ll > 0 and xl * xl > best * ll:
                scale, codes = xl / ll, tried
                best = scale * xl
    return scale, codes


def minimum(nmax: int, start: float, step: float, steps: int, x, w):
    """Search B with squared errors: (scale, -minimum, codes)."""
    low, high = min(x), max(x)
    sw, sx = f(0), f(0)
    for v, weight in zip(x, w, strict=True):
        sw += weight
        sx += weight * v
    low = min(low, f(0))
    if high == low:
        return f(0), -low, [0] * len(x)

    def misfit(scale, base, codes):
        total = f(0)
        for v, weight, code in zip(x, w, codes, strict=True):
            e = scale * f(code) + base - v
            total += weight * (e * e)
        return total

    def coded(factor):
        return [held(rnd(factor * (v - low)), 0, nmax) for v in x]

    factor = f(nmax) / (high - low)
    codes = coded(factor)
    scale = f(1) / factor
    best = misfit(scale, low, codes)
    for k in range(steps + 1):
        tried = coded((f(start) + f(step) * f(k) + f(nmax)) / (high - low))
        a, b, c = f(0), f(0), f(0)
        for v, weight, code in zip(x, w, tried, strict=True):
            a += weight * f(code)
            b += weight * f(code) * f(code)
            c += weight * f(code) * v
        d = sw * b - a * a
        if d > 0:
            s, m = (sw * c - sx * a) / d, (b * sx - a * c) / d
            if m > 0:
                s, m = c / b, f(0)
            error = misfit(s, m, tried)
            if error < best:
                scale, low, codes, best = s, m, tried, error
    return scale, -low, codes


def squares(x):
    total = f(0)
    for v in x:
        total += v * v
    return total


def q6_k(x, q=None):
    """A super-block of 256."""
    parts = [x[i : i + 16] for i in range(0, 256, 16)]
    weights = [[v * v for v in part] for part in parts] if q is None else [q[i : i + 16] for i in range(0, 256, 16)]
    found = [signed(32, part, w) for part, w in zip(parts, weights, strict=True)]
    top = peak([scale for scale, _ in found])
    if abs(top) < EPSILON:
        return np.zeros(256, f)
    factor = f(-128) / top
    d, values = stored(f(1) / factor), []
    for part, (scale, codes) in zip(parts, found, strict=True):
        step = d * f(min(127, rnd(factor * scale)))
        for v, code in zip(part, codes, strict=True):
            values.append(step * f(held(rnd(v / step), -32, 31) if step else code - 32))
    return np.array(values, f)


def q4_k(x):
    """A super-block of 256, without importance."""
    found = []
    for i in range(0, 256, 32):
        part = x[i : i + 32]
        mean = np.sqrt(squares(part) / f(32))
        found.append((part, *minimum(15, -1, 0.1, 20, part, [mean + abs(v) for v in part])))

    def small(numbers):
        top = max(*numbers, f(0))
        factor = f(63) / top if top > 0 else f(0)
        return stored(top / f(63)), [min(63, rnd(factor * v)) for v in numbers]

    d, scales = small([scale for _, scale, _, _ in found])
    lift, lows = small([low for _, _, low, _ in found])
    values = []
    for (part, _, _, codes), ls, lm in zip(found, scales, lows, strict=True):
        step, base = d * f(ls), lift * f(lm)
        values += [step * f(held(rnd((v + base) / step), 0, 15) if step else code) - base for v, code in zip(part, codes, strict=True)]
    return np.array(values, f)


def near(v) -> int:
    """The nearest of IQ4's values, the greater of two, as ggml compares."""
    for low, high in pairwise(IQ4):
        if v < high:
            return low if v <= IQ4[0] or v - f(low) < f(high) - v else high
    return IQ4[-1]


def iq4_nl(x, q=None):
    """A block of 32."""
    mean = squares(x) * f(2 / 32)
    w = [v * v for v in x] if q is None else [weight * np.sqrt(mean + v * v) for weight, v in zip(q, x, strict=True)]
    top = peak(x)
    d = f(0)
    if abs(top) >= EPSILON:
        best = f(0)
        for k in (None, *range(-7, 8)):
            factor = f(1) / (-top / f(-127)) if k is None else f(k - 127) / top
            a, b = f(0), f(0)
            for v, weight in zip(x, w, strict=True):
                value = f(near(factor * v))
                a += weight * value * v
                b += weight * value * value
            if b > 0 and (k is None or a * a > best * b):
                d = a / b
                best = d * a
    factor = f(1) / d if d else f(0)
    return np.array([stored(d) * f(near(factor * v)) for v in x], f)
