"""Numba kernels of the selective scan for the CPU: one tile of positions at a time, everything else in cache.

Why tiles: projections, step sizes and states of a tile of ``T`` positions fit into the level-2 cache, so that no B, C,
dt or state tensor of full length exists, and each short loop below is a shape that LLVM turns into vector instructions.
The innermost loops run over the state axis, whose length is compiled in (``kernels(state)``) for that reason.

Within a tile, rows are in walking order: a reversed or column-major direction is only another way to gather rows.
The kernels release the GIL; ``cpu_scan`` runs them on a thread pool. Compiled code is cached on disk by Numba.
"""

from __future__ import annotations

import math
from functools import cache
from types import SimpleNamespace
from typing import Any

import numba
import numpy as np
from numba import njit
from numba.extending import overload

LOG2_E = math.log2(math.e)
# Everything but nnan and ninf: a NaN in an image must stay a NaN.
_FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": _FASTMATH, "error_model": "numpy"}
f4 = np.float32
# OpenBLAS shares products of more multiplications between threads of its own, which then spin beside PyTorch's
# (interface/gemm.c: SMP_THRESHOLD_MIN * GEMM_MULTITHREAD_THRESHOLD).
BLAS_LIMIT = 2**18


def _exp2(t: float) -> float:
    """2**t for t <= 0."""
    return 2.0**t


@overload(_exp2, inline="always")
def _exp2_overload(t):
    """In float32 a polynomial that vectorises: 2**r by the exponent bits, 2**f on [-0.5, 0.5] by its Taylor series.

    Relative error below 2e-7 (the seventh term is 1.5e-5 * 0.5**7). Below 2**-126.5 it is 0.
    """
    if t != numba.float32:
        return lambda t: np.exp2(t)

    def exp2_float32(t):
        r = np.floor(max(t, f4(-127.0)) + f4(0.5))
        f = max(t, f4(-127.0)) - r
        p = f4(1.540353039338161e-4)  # ln(2)**k / k!, k from 6 down to 0
        p = p * f + f4(1.333355814642844e-3)
        p = p * f + f4(9.618129107628477e-3)
        p = p * f + f4(5.550410866482158e-2)
        p = p * f + f4(2.402265069591007e-1)
        p = p * f + f4(6.931471805599453e-1)
        p = p * f + f4(1.0)
        return p * np.int32((np.int32(r) + np.int32(127)) << np.int32(23)).view(np.float32)  # r = -127 gives 0

    return exp2_float32


def _log1p(e: float) -> float:
    """log(1 + e) for e in [0, 1]."""
    return math.log1p(e)


@overload(_log1p, inline="always")
def _log1p_overload(e):
    """In float32 ``2 atanh(s)``, s = e / (2 + e) <= 1/3: relatively exact for small e too; tenth term below 1e-10."""
    if e != numba.float32:
        return lambda e: np.log1p(e)

    def log1p_float32(e):
        s = e / (f4(2.0) + e)
        q = s * s
        p = f4(1.0 / 17.0)
        p = p * q + f4(1.0 / 15.0)
        p = p * q + f4(1.0 / 13.0)
        p = p * q + f4(1.0 / 11.0)
        p = p * q + f4(1.0 / 9.0)
        p = p * q + f4(1.0 / 7.0)
        p = p * q + f4(1.0 / 5.0)
        p = p * q + f4(1.0 / 3.0)
        p = p * q + f4(1.0)
        return f4(2.0) * s * p

    return log1p_float32


@njit(**_OPTIONS)
def softplus_tile(raw, delta, slope, steps):
    """Delta = softplus(raw), slope = its derivative, for the first ``steps`` rows of contiguous tiles."""
    log2_e = raw.dtype.type(LOG2_E)
    one = raw.dtype.type(1.0)
    # as one long row: rows of few channels are shorter than the vector loop
    raw_row, delta_row, slope_row = raw.reshape(raw.size), delta.reshape(raw.size), slope.reshape(raw.size)
    for i in range(steps * raw.shape[1]):
        v = raw_row[i]
        e = _exp2(-abs(v) * log2_e)
        delta_row[i] = max(v, raw.dtype.type(0.0)) + _log1p(e)
        slope_row[i] = (one if v >= 0 else e) / (one + e)


@njit(**_OPTIONS)
def rows_per_product(a, b):
    """Rows of ``a`` (T, k) to multiply by ``b`` (k, m) at once, so that OpenBLAS stays on this thread."""
    return max(1, BLAS_LIMIT // (a.shape[1] * b.shape[1]))


@njit(**_OPTIONS)
def product(a, b, out):
    """Out = a b, on this thread."""
    block = rows_per_product(a, b)
    for start in range(0, a.shape[0], block):
        np.dot(a[start : start + block], b, out[start : start + block])


@njit(inline="always")
def row_of(position, height, width, column):
    """Row of the flattened map at a position of the row-major or column-major walk."""
    return (position % height) * width + position // height if column else position


@njit(**_OPTIONS)
def gather_rows(source, tile, first, step, steps, height, width, column):
    """Rows of a (H W, d) map along a walk that starts at ``first`` and goes by ``step`` (1 or -1)."""
    for t in range(steps):
        row = row_of(first + t * step, height, width, column)
        for i in range(source.shape[1]):
            tile[t, i] = source[row, i]


@njit(**_OPTIONS)
def scatter_rows(tile, target, first, step, steps, height, width, column, add):
    """Inverse of ``gather_rows``; ``add``: to what is there."""
    for t in range(steps):
        row = row_of(first + t * step, height, width, column)
        if add:
            for i in range(target.shape[1]):
                target[row, i] += tile[t, i]
        else:
            for i in range(target.shape[1]):
                target[row, i] = tile[t, i]


@njit(**_OPTIONS)
def transpose_in(source, tile, first, steps):
    """(channels, length) -> rows of a tile."""
    for i in range(source.shape[0]):
        for t in range(steps):
            tile[t, i] = source[i, first + t]


@njit(**_OPTIONS)
def transpose_out(tile, target, first, steps):
    """Rows of a tile -> (channels, length), adding."""
    for i in range(target.shape[0]):
        for t in range(steps):
            target[i, first + t] += tile[t, i]


@cache
def kernels(state: int, padded_rank: int = 0) -> SimpleNamespace:
    """The kernels for a number of states per channel (and, for the 2D scan, a padded dt rank), compiled in.

    Both are lengths of innermost loops. Rows of a tile are [B (N), C (N), dt (padded_rank)].
    """
    row_length = 2 * state + padded_rank

    @njit(**_OPTIONS)
    def scan_tile(x, rows, delta, A2, h, y, steps):
        """Walk a tile forward: updates the states ``h`` (d, N) and adds <C, h> to ``y`` (T, d)."""
        for t in range(steps):
            for i in range(x.shape[1]):
                step = delta[t, i]
                drive = step * x[t, i]
                total = x.dtype.type(0.0)
                for n in range(state):
                    hn = _exp2(step * A2[i, n]) * h[i, n] + drive * rows[t, n]
                    h[i, n] = hn
                    total += hn * rows[t, state + n]
                y[t, i] += total

    @njit(**_OPTIONS)
    def record_tile(x, rows, delta, A2, h, before, decay, steps):
        """Walk a tile forward, keeping the state before each step and each step's decay, (T, d, N)."""
        for t in range(steps):
            for i in range(x.shape[1]):
                step = delta[t, i]
                drive = step * x[t, i]
                for n in range(state):
                    a = _exp2(step * A2[i, n])
                    decay[t, i, n] = a
                    before[t, i, n] = h[i, n]
                    h[i, n] = a * h[i, n] + drive * rows[t, n]

    @njit(**_OPTIONS)
    def backward_tile(dy, x, rows, delta, A, before, decay, g, dx, ddelta, drows, dA, steps):
        """Walk a tile backward with the adjoint states ``g`` (d, N); adds to dx, ddelta, drows and dA."""
        for t in range(steps - 1, -1, -1):
            for i in range(x.shape[1]):
                step = delta[t, i]
                drive = step * x[t, i]
                dout = dy[t, i]
                ddrive = x.dtype.type(0.0)
                dstep = x.dtype.type(0.0)
                for n in range(state):
                    a = decay[t, i, n]
                    hb = before[t, i, n]
                    gn = g[i, n] + dout * rows[t, state + n]
                    drows[t, state + n] += dout * (a * hb + drive * rows[t, n])
                    drows[t, n] += gn * drive
                    ddrive += gn * rows[t, n]
                    dlog = gn * hb * a
                    dstep += dlog * A[i, n]
                    dA[i, n] += dlog * step
                    g[i, n] = gn * a
                dx[t, i] += ddrive * step
                ddelta[t, i] += ddrive * x[t, i] + dstep

    @njit(**_OPTIONS)
    def project_tile(x, w_in, w_delta, bias, rows, raw, steps):
        """Rows [B, C, dt] (T, row_length) and the step sizes before the softplus (T, d) of a tile."""
        product(x, w_in, rows)  # the whole tile: rows beyond ``steps`` are stale but finite
        for t in range(steps):
            for i in range(x.shape[1]):
                total = bias[i]
                for r in range(w_delta.shape[1]):
                    total += rows[t, 2 * state + r] * w_delta[i, r]
                raw[t, i] = total

    @njit(**_OPTIONS)
    def project_tile_backward(drows, draw, x, rows, w_in, w_delta, dx, dw_in, dw_delta, dbias, steps):
        """Adds the gradients of ``project_tile``'s inputs and weights; ``drows`` holds those of B and C on entry."""
        dim, rank = w_delta.shape
        for t in range(steps):
            for r in range(rank):
                ddt = x.dtype.type(0.0)
                for i in range(dim):
                    ddt += draw[t, i] * w_delta[i, r]
                    dw_delta[i, r] += draw[t, i] * rows[t, 2 * state + r]
                drows[t, 2 * state + r] = ddt
            for i in range(dim):
                dbias[i] += draw[t, i]
        block = rows_per_product(x, w_in)
        for start in range(0, steps, block):
            end = min(start + block, steps)
            dx[start:end] += np.dot(drows[start:end], w_in.T)
            dw_in += np.dot(x[start:end].T, drows[start:end])

    @njit(**_OPTIONS)
    def forward_2d(x, height, width, k, tile, w_in, w_delta, bias, A2, D, states, y):
        """One direction of an image: x (H W, d); fills states (chunks, d, N), writes y (H W, d), where k > 1 adds."""
        length, dim = x.shape
        kind = x.dtype
        xt, yt = np.zeros((tile, dim), kind), np.empty((tile, dim), kind)
        raw, delta, slope = np.empty((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        rows = np.empty((tile, row_length), kind)
        h = np.zeros((dim, state), kind)
        column, step = k % 2 == 1, 1 if k < 2 else -1
        for chunk in range(states.shape[0]):
            start = chunk * tile
            steps = min(tile, length - start)
            first = start if step == 1 else length - 1 - start
            states[chunk] = h
            gather_rows(x, xt, first, step, steps, height, width, column)
            project_tile(xt, w_in, w_delta, bias, rows, raw, steps)
            softplus_tile(raw, delta, slope, steps)
            for t in range(steps):
                for i in range(dim):
                    yt[t, i] = D[i] * xt[t, i]
            scan_tile(xt, rows, delta, A2, h, yt, steps)
            scatter_rows(yt, y, first, step, steps, height, width, column, k >= 2)

    @njit(**_OPTIONS)
    def backward_2d(dy, x, height, width, k, tile, w_in, w_delta, bias, A, A2, D, states,
                    dx, dw_in, dw_delta, dbias, dA, dD):  # fmt: skip
        """Gradients of ``forward_2d``: adds to all arguments in the second line; writes dx where k < 2."""
        length, dim = x.shape
        kind = x.dtype
        xt, dyt, dxt = np.zeros((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        raw, delta, slope = np.empty((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        ddelta = np.empty((tile, dim), kind)
        rows, drows = np.empty((tile, row_length), kind), np.empty((tile, row_length), kind)
        before, decay = np.empty((tile, dim, state), kind), np.empty((tile, dim, state), kind)
        h, g = np.empty((dim, state), kind), np.zeros((dim, state), kind)
        column, step = k % 2 == 1, 1 if k < 2 else -1
        for chunk in range(states.shape[0] - 1, -1, -1):
            start = chunk * tile
            steps = min(tile, length - start)
            first = start if step == 1 else length - 1 - start
            h[:] = states[chunk]
            gather_rows(x, xt, first, step, steps, height, width, column)
            gather_rows(dy, dyt, first, step, steps, height, width, column)
            project_tile(xt, w_in, w_delta, bias, rows, raw, steps)
            softplus_tile(raw, delta, slope, steps)
            record_tile(xt, rows, delta, A2, h, before, decay, steps)
            drows[:] = 0
            ddelta[:] = 0
            for t in range(steps):
                for i in range(dim):
                    dxt[t, i] = D[i] * dyt[t, i]
                    dD[i] += dyt[t, i] * xt[t, i]
            backward_tile(dyt, xt, rows, delta, A, before, decay, g, dxt, ddelta, drows, dA, steps)
            for t in range(steps):
                for i in range(dim):
                    ddelta[t, i] *= slope[t, i]
            project_tile_backward(drows, ddelta, xt, rows, w_in, w_delta, dxt, dw_in, dw_delta, dbias, steps)
            scatter_rows(dxt, dx, first, step, steps, height, width, column, k >= 2)

    @njit(**_OPTIONS)
    def step_sizes(raw, delta, slope, bias, softplus, steps):
        """Step sizes of the 1D op: bias added, softplus where asked for."""
        for t in range(steps):
            for i in range(raw.shape[1]):
                raw[t, i] += bias[i]
                delta[t, i] = raw[t, i]
                slope[t, i] = 1
        if softplus:
            softplus_tile(raw, delta, slope, steps)

    @njit(**_OPTIONS)
    def forward_1d(u, delta_in, A2, B, C, D, bias, softplus, tile, states, y):
        """One sample, one group: u, delta_in (d, L), B, C (N, L); fills states (chunks, d, N), adds to y (d, L)."""
        dim, length = u.shape
        kind = u.dtype
        xt, yt = np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        raw, delta, slope = np.empty((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        rows = np.empty((tile, row_length), kind)
        h = np.zeros((dim, state), kind)
        for chunk in range(states.shape[0]):
            start = chunk * tile
            steps = min(tile, length - start)
            states[chunk] = h
            transpose_in(u, xt, start, steps)
            transpose_in(delta_in, raw, start, steps)
            transpose_in(B, rows[:, :state], start, steps)
            transpose_in(C, rows[:, state:], start, steps)
            step_sizes(raw, delta, slope, bias, softplus, steps)
            for t in range(steps):
                for i in range(dim):
                    yt[t, i] = D[i] * xt[t, i]
            scan_tile(xt, rows, delta, A2, h, yt, steps)
            transpose_out(yt, y, start, steps)

    @njit(**_OPTIONS)
    def backward_1d(dy, u, delta_in, A, A2, B, C, D, bias, softplus, tile, states,
                    du, ddelta_out, dA, dB, dC, dD, dbias):  # fmt: skip
        """Gradients of ``forward_1d``: adds to all arguments in the second line."""
        dim, length = u.shape
        kind = u.dtype
        xt, dyt, dxt = np.zeros((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        raw, delta, slope = np.empty((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
        ddelta = np.empty((tile, dim), kind)
        rows, drows = np.empty((tile, row_length), kind), np.empty((tile, row_length), kind)
        before, decay = np.empty((tile, dim, state), kind), np.empty((tile, dim, state), kind)
        h, g = np.empty((dim, state), kind), np.zeros((dim, state), kind)
        for chunk in range(states.shape[0] - 1, -1, -1):
            start = chunk * tile
            steps = min(tile, length - start)
            h[:] = states[chunk]
            transpose_in(u, xt, start, steps)
            transpose_in(dy, dyt, start, steps)
            transpose_in(delta_in, raw, start, steps)
            transpose_in(B, rows[:, :state], start, steps)
            transpose_in(C, rows[:, state:], start, steps)
            step_sizes(raw, delta, slope, bias, softplus, steps)
            record_tile(xt, rows, delta, A2, h, before, decay, steps)
            drows[:] = 0
            ddelta[:] = 0
            for t in range(steps):
                for i in range(dim):
                    dxt[t, i] = D[i] * dyt[t, i]
                    dD[i] += dyt[t, i] * xt[t, i]
            backward_tile(dyt, xt, rows, delta, A, before, decay, g, dxt, ddelta, drows, dA, steps)
            for t in range(steps):
                for i in range(dim):
                    ddelta[t, i] *= slope[t, i]
                    dbias[i] += ddelta[t, i]
            transpose_out(dxt, du, start, steps)
            transpose_out(ddelta, ddelta_out, start, steps)
            transpose_out(drows[:, :state], dB, start, steps)
            transpose_out(drows[:, state:], dC, start, steps)

    return SimpleNamespace(
        forward_2d=forward_2d, backward_2d=backward_2d, forward_1d=forward_1d, backward_1d=backward_1d
    )
