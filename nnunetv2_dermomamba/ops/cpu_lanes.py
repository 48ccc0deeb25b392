"""Vectors of eight floats as a Numba type, so that a kernel says itself what is vectorised.

LLVM's own vectoriser needs long rows: it leaves rows of 8 channels to scalar code, and sums over 16 states cost it more
than the products. A vector here is an LLVM ``<8 x float>`` (or double): one AVX register, two of SSE or NEON; locals of
this type live in registers. They have ``+``, ``-``, ``*`` and the functions below; arrays hold them as runs of eight in
the last axis. A pair is a vector of twice eight, one register of AVX-512: two states of the same eight channels, say.
"""

from __future__ import annotations

import operator

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

LANES = 8
f4 = np.float32


class Lanes(types.Type):
    """Numba's type of a vector; ``element`` is float32 or float64, ``width`` ``LANES`` or twice that."""

    def __init__(self, element, width=LANES):
        self.element = element
        self.width = width
        super().__init__(name=f"lanes({element}, {width})")


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.element).get_value_type(), fe_type.width))


def _pointer(context, builder, array_type, array, row, column, width=LANES):
    """Pointer to the vector that starts at (row, column) of a contiguous 2D array."""
    struct = context.make_array(array_type)(context, builder, array)
    columns = builder.extract_value(struct.shape, 1)
    element = builder.gep(struct.data, [builder.add(builder.mul(row, columns), column)])
    vector = ir.VectorType(context.get_value_type(array_type.dtype), width)
    return builder.bitcast(element, vector.as_pointer())


def _is_rows(array):
    return isinstance(array, types.Array) and array.ndim == 2 and array.layout == "C"


@intrinsic
def load(typing, array, row, column):
    """Elements ``column`` to ``column + 7`` of a row."""
    if not _is_rows(array):
        return None

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype)(array, types.intp, types.intp), generate


@intrinsic
def store(typing, array, row, column, vector):
    """Write a vector to elements ``column`` to ``column + 7`` of a row."""
    if not _is_rows(array) or vector != Lanes(array.dtype):
        return None

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments[:3])
        builder.store(arguments[3], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), generate


@intrinsic
def load_pair(typing, array, row, column):
    """Elements ``column`` to ``column + 15`` of a row; where rows have eight, two rows."""
    if not _is_rows(array):
        return None

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments, 2 * LANES)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return Lanes(array.dtype, 2 * LANES)(array, types.intp, types.intp), generate


@intrinsic
def store_pair(typing, array, row, column, vector):
    """The inverse of ``load_pair``."""
    if not _is_rows(array) or vector != Lanes(array.dtype, 2 * LANES):
        return None

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments[:3], 2 * LANES)
        builder.store(arguments[3], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, vector), generate


def _shuffled(builder, vector, order):
    """Elements ``order`` of a vector."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(order)), order)
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


@intrinsic
def splat_pair(typing, array, row, column):
    """Two adjacent elements, eight times each."""
    if not _is_rows(array):
        return None

    def generate(context, builder, signature, arguments):
        pointer = _pointer(context, builder, signature.args[0], *arguments, 2)
        both = builder.load(pointer, align=array.dtype.bitwidth // 8)
        return _shuffled(builder, both, [0] * LANES + [1] * LANES)

    return Lanes(array.dtype, 2 * LANES)(array, types.intp, types.intp), generate


@intrinsic
def twice(typing, vector):
    """A vector and itself behind it."""

    def generate(context, builder, signature, arguments):
        return _shuffled(builder, arguments[0], [*range(LANES)] * 2)

    return Lanes(vector.element, 2 * LANES)(vector), generate


@intrinsic
def folded(typing, pair):
    """The two halves of a pair, added."""

    def generate(context, builder, signature, arguments):
        halves = [_shuffled(builder, arguments[0], [*range(start, start + LANES)]) for start in (0, LANES)]
        return builder.fadd(*halves)

    return Lanes(pair.element)(pair), generate


@intrinsic
def _fill(typing, vector, value):
    """As many times ``value`` as ``vector`` has elements."""

    def generate(context, builder, signature, arguments):
        kind = context.get_value_type(signature.return_type)
        first = builder.insert_element(ir.Constant(kind, ir.Undefined), arguments[1], ir.Constant(ir.IntType(32), 0))
        return _shuffled(builder, first, [0] * vector.width)

    return vector(vector, vector.element), generate


@intrinsic
def splat(typing, value):
    """A vector of eight times the same float."""
    if not isinstance(value, types.Float):
        return None

    def generate(context, builder, signature, arguments):
        vector = context.get_value_type(signature.return_type)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[0], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros)

    return Lanes(value)(value), generate


def _reduction(combine):
    """Code of a reduction of eight elements by a tree: each half is combined with the other."""

    def generate(context, builder, signature, arguments):
        value = arguments[0]
        for half in (4, 2, 1):
            halves = [_shuffled(builder, value, [*range(start, start + half)]) for start in (0, half)]
            value = combine(builder, *halves)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return generate


def _larger(builder, a, b):
    """The larger of each two; a NaN in ``a`` stays."""
    return builder.select(builder.fcmp_unordered("ugt", a, b), a, b)


@intrinsic
def total(typing, vector):
    """Sum of the eight."""
    return vector.element(vector), _reduction(lambda builder, a, b: builder.fadd(a, b))


@intrinsic
def largest(typing, vector):
    """Maximum of the eight, unless there is a NaN."""
    return vector.element(vector), _reduction(_larger)


def _merged(builder, a, b, order):
    """Elements of two vectors added in pairs, as one vector; ``order`` is that of the first addends, and the gap."""
    first, gap = order
    indices = ir.VectorType(ir.IntType(32), LANES)
    parts = [builder.shuffle_vector(a, b, ir.Constant(indices, [i + shift for i in first])) for shift in (0, gap)]
    return builder.fadd(*parts)


# Instructions that work within halves of a register.
_SUMS = (((0, 8, 1, 9, 4, 12, 5, 13), 2), ((0, 1, 8, 9, 4, 5, 12, 13), 2), ((0, 1, 2, 3, 8, 9, 10, 11), 4))


@intrinsic
def totals(typing, array, row):
    """The totals of eight rows of eight as one vector."""
    if not _is_rows(array):
        return None

    def generate(context, builder, signature, arguments):
        zero = context.get_constant(types.intp, 0)
        vectors = []
        for i in range(LANES):
            position = builder.add(arguments[1], context.get_constant(types.intp, i))
            pointer = _pointer(context, builder, signature.args[0], arguments[0], position, zero)
            vectors.append(builder.load(pointer, align=array.dtype.bitwidth // 8))
        for order in _SUMS:
            vectors = [_merged(builder, a, b, order) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
        return vectors[0]

    return Lanes(array.dtype)(array, types.intp), generate


def _binary(instruction):
    """An intrinsic for one of LLVM's instructions on two vectors."""

    @intrinsic
    def apply(typing, a, b):
        def generate(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, b), generate

    return apply


def _operator(python, instruction):
    apply = _binary(instruction)

    @overload(python)
    def _(a, b):
        if isinstance(a, Lanes) and a == b:
            return lambda a, b: apply(a, b)
        return None


for _python, _instruction in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul")):
    _operator(_python, _instruction)


@intrinsic
def at_least(typing, vector, bound):
    """Elements or ``bound``, whichever is larger; a NaN in ``vector`` stays."""

    def generate(context, builder, signature, arguments):
        return _larger(builder, *arguments)

    return vector(vector, vector), generate


def _function(name):
    """An intrinsic for one of LLVM's functions of a vector."""

    @intrinsic
    def apply(typing, vector):
        def generate(context, builder, signature, arguments):
            kind = arguments[0].type
            function_name = f"llvm.{name}.v{vector.width}f{vector.element.bitwidth}"
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind]), function_name)
            return builder.call(function, arguments)

        return vector(vector), generate

    return apply


_exp2_each, _round = _function("exp2"), _function("rint")


@intrinsic
def _scale(typing, vector, exponent):
    """``vector * 2**exponent`` for whole exponents, by adding to the exponent's bits; the result must be normal."""

    def generate(context, builder, signature, arguments):
        integers = ir.VectorType(ir.IntType(32), vector.width)
        bits = builder.shl(builder.fptosi(arguments[1], integers), ir.Constant(integers, [23] * vector.width))
        return builder.bitcast(builder.add(builder.bitcast(arguments[0], integers), bits), arguments[0].type)

    return vector(vector, vector), generate


def exp2_lanes(t):
    """2**t for a vector of t <= 0."""
    raise NotImplementedError("for Numba's compiled code only")


@overload(exp2_lanes, inline="always")
def _exp2_overload(t):
    """In float32 2**round(t) by the exponent's bits and a polynomial of 2**f on [-0.5, 0.5] (minimax, exact at 0).

    Relative error below 2e-7. Below -126 it is 2**-126.
    """
    if t.element == numba.float64:
        return lambda t: _exp2_each(t)

    def exp2_float32(t):
        bounded = at_least(t, _fill(t, f4(-126.0)))
        r = _round(bounded)
        f = bounded - r
        p = _fill(t, f4(1.3264727252689482e-3))
        p = p * f + _fill(t, f4(9.6715127857777e-3))
        p = p * f + _fill(t, f4(5.5507337444710265e-2))
        p = p * f + _fill(t, f4(0.24022242083111806))
        p = p * f + _fill(t, f4(0.6931469775976777))
        p = p * f + _fill(t, f4(1.0))
        return _scale(p, r)

    return exp2_float32
