"""Numba's vectors of eight against NumPy."""

import numpy as np
import pytest
from numba import njit
from tolerances import NEGLIGIBLE

from nnunetv2_dermomamba.ops.cpu_lanes import LANES, exp2_lanes, load, splat, store, total, totals


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
