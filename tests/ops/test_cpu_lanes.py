"""Numba's vectors of eight against NumPy."""

import numpy as np
import pytest
from numba import njit
from tolerances import NEGLIGIBLE

from nnunetv2_dermomamba.ops.cpu_lanes import (
    LANES,
    exp2_lanes,
    folded,
    largest,
    load,
    load_pair,
    splat,
    splat_pair,
    store,
    store_pair,
    total,
    totals,
    twice,
)


@njit
def power(exponents, out):
    for t in range(exponents.shape[0]):
        for c in range(0, exponents.shape[1], LANES):
            store(out, t, c, exp2_lanes(load(exponents, t, c)))


@njit
def sum_rows(a, out):
    store(out, 0, 0, totals(a, 3))


@njit
def arithmetic(a, b, factor, out):
    for t in range(a.shape[0]):
        store(out, t, 1, load(a, t, 1) * load(b, t, 1) - splat(factor) + load(a, t, 0))
        out[t, 0] = total(load(b, t, 1))


@pytest.mark.parametrize(("kind", "tolerance"), [(np.float32, 2e-7), (np.float64, 1e-15)])
def test_powers_of_two(kind, tolerance):
    exponents = -np.geomspace(1e-12, 126, 4096).astype(kind).reshape(64, 64)
    result = np.empty_like(exponents)
    power(exponents, result)
    assert np.max(np.abs(result / np.exp2(exponents.astype(np.float64)) - 1)) < tolerance


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_powers_at_the_ends(kind):
    exponents = np.array([[0, -0.0, -126, -127, -150, -1e30, -np.inf, np.nan]], kind)
    result = np.empty_like(exponents)
    power(exponents, result)
    assert (result[0, :2] == 1).all()
    assert (result[0, 2:7] >= 0).all()
    assert (result[0, 2:7] < NEGLIGIBLE).all()
    assert np.isnan(result[0, 7])


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_arithmetic_at_any_column(kind):
    a, b = np.random.default_rng(0).standard_normal((2, 5, LANES + 1)).astype(kind)
    out = np.empty_like(a)
    arithmetic(a, b, kind(0.25), out)
    np.testing.assert_allclose(out[:, 1:], a[:, 1:] * b[:, 1:] - 0.25 + a[:, :-1], rtol=1e-5)
    np.testing.assert_allclose(out[:, 0], b[:, 1:].sum(1), rtol=1e-5)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_totals_of_eight_rows(kind):
    a = np.random.default_rng(0).standard_normal((3 + LANES, LANES)).astype(kind)
    out = np.empty((1, LANES), kind)
    sum_rows(a, out)
    np.testing.assert_allclose(out[0], a[3:].sum(1), rtol=1e-4)


@njit
def pair_arithmetic(a, factors, out, sums):
    for t in range(a.shape[0] - 1):
        wide = load_pair(a, t, 0) * splat_pair(factors, t, 1) + twice(load(a, t, 0))
        store_pair(out, 2 * t, 0, exp2_lanes(splat_pair(factors, t, 0) * load_pair(a, t, 0)))
        store(sums, t, 0, folded(wide))


@pytest.mark.parametrize(("kind", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_pairs_are_two_rows(kind, tolerance):
    generator = np.random.default_rng(0)
    a = -np.abs(generator.standard_normal((5, LANES))).astype(kind)
    factors = np.abs(generator.standard_normal((4, 3))).astype(kind)
    out, sums = np.zeros((8, LANES), kind), np.zeros((4, LANES), kind)
    pair_arithmetic(a, factors, out, sums)
    for t in range(4):
        rows = a[t : t + 2]
        np.testing.assert_allclose(out[2 * t : 2 * t + 2], np.exp2(factors[t, :2, None] * rows), rtol=tolerance)
        expected = (rows * factors[t, 1:, None] + a[t]).sum(0)
        np.testing.assert_allclose(sums[t], expected, rtol=tolerance, atol=tolerance)


@njit
def maximum_of_row(a, t):
    return largest(load(a, t, 0))


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_largest_wherever_it_is(kind):
    a = -1 - np.eye(LANES, dtype=kind)[::-1] * -0.5
    assert [maximum_of_row(a, t) for t in range(LANES)] == [-0.5] * LANES
