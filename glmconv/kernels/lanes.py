"""Sixteen float32 side by side, as one value inside kernels: a search over sub-blocks runs sixteen of them at once, one in each lane.

numba vectorises a loop only if it can tell that no two arrays overlap, and keeps sums in memory meanwhile; a value of this type stays in registers.
Every operation is IEEE 754's in each lane, rounded to float32, none fused: a lane computes what a scalar would, to the bit.

Arrays of lanes are float32 [n, LANES], C order: column k belongs to lane k. `a op b` takes lanes or one float32 on either side.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core import config as numbas
from numba.core.typing.templates import AbstractTemplate, infer_global
from numba.extending import intrinsic, lower_builtin, models, register_model

config: Any = numbas  # its names are made when it is imported
LANES = 16
FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
MAGIC, MANTISSA, HALF = 0x4B40_0000, 0x7F_FFFF, 0x40_0000  # the bits of 12582912.0 = 1.5 * 2^23; its lower 23 are 2^22


class Lanes(types.Type):
    """LANES float32."""

    def __init__(self) -> None:
        super().__init__("Lanes")


class Mask(types.Type):
    """LANES booleans: what a comparison gives, and `where` takes."""

    def __init__(self) -> None:
        super().__init__("Mask")


lanes, mask = Lanes(), Mask()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, FLOATS)


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(1), LANES))


def emitted(function: Callable[..., Any]) -> Any:
    """A function for kernels whose LLVM code it writes itself."""
    return intrinsic(function)


def _all(builder: Any, value: Any) -> Any:
    """One scalar in every lane."""
    one = builder.insert_element(ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(INTS, [0] * LANES))


def _constant(value: int) -> Any:
    return ir.Constant(INTS, [value] * LANES)


def _operation(result: Any, emit: Callable[..., Any], *operands: Any) -> tuple[Any, Callable[..., Any]]:
    """What an intrinsic returns: `emit(builder, ...)` on the operands, each a float32 in every lane if it is a scalar."""
    return result(*operands), _generator(emit)


def _generator(emit: Callable[..., Any]) -> Callable[..., Any]:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return emit(builder, *(_all(builder, a) if kind == types.float32 else a for a, kind in zip(arguments, signature.args, strict=True)))

    return generate


def _operator(symbol: Any, result: Any, emit: Callable[..., Any]) -> None:
    """Make `symbol` known between lanes and lanes, lanes and float32; `&` and `|` between masks."""
    pairs = [(mask, mask)] if symbol in (operator.and_, operator.or_) else [(lanes, lanes), (lanes, types.float32), (types.float32, lanes)]

    class Operator(AbstractTemplate):
        key = symbol

        def generic(self, arguments: Any, keywords: Any) -> Any:
            return result(*arguments) if tuple(arguments) in pairs else None

    infer_global(symbol)(Operator)
    for pair in pairs:
        lower_builtin(symbol, *pair)(_generator(emit))


def _comparison(symbol: Any, sign: str) -> None:
    compare = "fcmp_unordered" if sign == "!=" else "fcmp_ordered"
    _operator(symbol, mask, lambda builder, a, b: getattr(builder, compare)(sign, a, b))


for _symbol, _name in (
    (operator.add, "fadd"), (operator.iadd, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv"),
):  # fmt: skip
    _operator(_symbol, lanes, lambda builder, a, b, name=_name: getattr(builder, name)(a, b))
for _symbol, _name in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">="), (operator.eq, "=="), (operator.ne, "!=")):
    _comparison(_symbol, _name)
_operator(operator.and_, mask, lambda builder, a, b: builder.and_(a, b))
_operator(operator.or_, mask, lambda builder, a, b: builder.or_(a, b))


@emitted
def load(typing: Any, array: Any, row: Any) -> Any:
    """Row `row` of an array of lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(_place(context, builder, signature, arguments), align=4)

    return lanes(array, row), generate


@emitted
def store(typing: Any, array: Any, row: Any, value: Any) -> Any:
    """Write row `row` of an array of lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _place(context, builder, signature, arguments), align=4)
        return context.get_dummy_value()

    return types.void(array, row, value), generate


def _place(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
    row = context.cast(builder, arguments[1], signature.args[1], types.intp)
    return builder.bitcast(builder.gep(data, [builder.mul(row, ir.Constant(row.type, LANES))]), FLOATS.as_pointer())


@emitted
def nibbles(typing: Any, array: Any, row: Any, shift: Any) -> Any:
    """Four bits, from bit `shift` on, of each of the LANES numbers in row `row` of uint32 [n, LANES]."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = builder.bitcast(_place(context, builder, signature, arguments), INTS.as_pointer())
        amount = _all(builder, context.cast(builder, arguments[2], signature.args[2], types.int32))
        return builder.sitofp(builder.and_(builder.lshr(builder.load(place, align=4), amount), _constant(15)), FLOATS)

    return lanes(array, row, shift), generate


@emitted
def least(typing: Any, value: Any) -> Any:
    """The bits of the least, and its first lane, as bits << 16 | lane; of values that are not negative. NaN is beyond Inf."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.bitcast(arguments[0], INTS)
        kind = ir.FunctionType(ir.IntType(32), [INTS])
        lowest = builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.umin.v{LANES}i32"), [bits])
        lane = _first(builder, builder.icmp_unsigned("==", bits, _all(builder, lowest)))
        wide = ir.IntType(64)
        return builder.or_(builder.shl(builder.zext(lowest, wide), ir.Constant(wide, 16)), lane)

    return types.int64(value), generate


@emitted
def first(typing: Any, chosen: Any) -> Any:
    """The first lane that is chosen; LANES if there is none."""
    return types.int64(chosen), lambda context, builder, signature, arguments: _first(builder, arguments[0])


def _first(builder: Any, chosen: Any) -> Any:
    short = ir.IntType(LANES)
    return builder.zext(builder.cttz(builder.bitcast(chosen, short), ir.Constant(ir.IntType(1), 0)), ir.IntType(64))


@emitted
def splat(typing: Any, value: Any) -> Any:
    """One float32 in every lane."""
    return _operation(lanes, lambda builder, a: a, value)


@emitted
def where(typing: Any, chosen: Any, yes: Any, no: Any) -> Any:
    """`yes` in the lanes that are chosen, `no` in the others."""
    return _operation(lanes, lambda builder, c, a, b: builder.select(c, a, b), chosen, yes, no)


@emitted
def magnitudes(typing: Any, value: Any) -> Any:
    """|value|."""

    def emit(builder: Any, a: Any) -> Any:
        return builder.bitcast(builder.and_(builder.bitcast(a, INTS), _constant(0x7FFF_FFFF)), FLOATS)

    return _operation(lanes, emit, value)


@emitted
def roots(typing: Any, value: Any) -> Any:
    """Square roots, correctly rounded."""

    def emit(builder: Any, a: Any) -> Any:
        kind = ir.FunctionType(FLOATS, [FLOATS])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.sqrt.v{LANES}f32"), [a])

    return _operation(lanes, emit, value)


@emitted
def whole(typing: Any, value: Any, low: Any, high: Any) -> Any:
    """To the nearest integer, ties to even, as ggml does it (the sum with MAGIC rounds; it wraps beyond 2^22), then held between two scalars."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        edges = [_all(builder, context.cast(builder, a, kind, types.int32)) for a, kind in zip(arguments[1:], signature.args[1:], strict=True)]
        total = builder.fadd(arguments[0], builder.bitcast(_constant(MAGIC), FLOATS))
        x = builder.sub(builder.and_(builder.bitcast(total, INTS), _constant(MANTISSA)), _constant(HALF))
        x = builder.select(builder.icmp_signed(">", x, edges[0]), x, edges[0])
        x = builder.select(builder.icmp_signed("<", x, edges[1]), x, edges[1])
        return builder.sitofp(x, FLOATS)

    return lanes(value, low, high), generate


def staircase(edges: Sequence[float], values: Sequence[float]) -> Any:
    """A function for kernels: the value between the two edges that a lane lies between, an edge itself belonging above; the last value for NaN.

    Differences of values must be exact, in any order of adding them.
    """
    if len(values) == LANES and permutes():
        return _search_of(edges, values)
    falls = [ir.Constant(FLOATS, [float(low - high)] * LANES) for low, high in pairwise(values)]
    zero, last = ir.Constant(FLOATS, [0.0] * LANES), ir.Constant(FLOATS, [float(values[-1])] * LANES)

    @emitted
    def step(typing: Any, value: Any) -> Any:
        def emit(builder: Any, v: Any) -> Any:
            below = [builder.fcmp_ordered("<", v, ir.Constant(FLOATS, [float(edge)] * LANES)) for edge in edges]
            terms = [last, *(builder.select(under, fall, zero) for under, fall in zip(below, falls, strict=True))]
            while len(terms) > 1:  # in pairs: a processor adds several at once
                pairs = [builder.fadd(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
                terms = pairs + terms[len(pairs) * 2 :]
            return terms[0]

        return _operation(lanes, emit, value)

    return step


def permutes() -> bool:
    """Whether numba compiles for a processor that looks up each lane of LANES in a register at once (AVX-512)."""
    if config.CPU_FEATURES is not None:
        return "+avx512f" in config.CPU_FEATURES.split(",")
    return bool(config.ENABLE_AVX and config.CPU_NAME is None and binding.get_host_cpu_features().get("avx512f"))


def _search_of(edges: Sequence[float], values: Sequence[float]) -> Any:
    """A staircase of LANES values in four comparisons: each halves what is left, with the edge in the middle of it looked up."""
    levels = (8, 4, 2, 1)
    middles = [ir.Constant(FLOATS, [float(edges[n // (2 * level) * 2 * level + level - 1]) for n in range(LANES)]) for level in levels]
    found = ir.Constant(FLOATS, [float(value) for value in values])

    @emitted
    def step(typing: Any, value: Any) -> Any:
        def emit(builder: Any, v: Any) -> Any:
            kind = ir.FunctionType(FLOATS, [FLOATS, INTS])
            look_up = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
            at = _constant(0)
            for level, middle in zip(levels, middles, strict=True):
                above = builder.fcmp_unordered(">=", v, builder.call(look_up, [middle, at]))
                at = builder.select(above, builder.or_(at, _constant(level)), at)
            return builder.call(look_up, [found, at])

        return _operation(lanes, emit, value)

    return step
