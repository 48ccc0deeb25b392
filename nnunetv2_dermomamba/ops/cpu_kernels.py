"""Numba kernels of the selective scan for the CPU: one tile of positions at a time, everything else in cache.

Why tiles: projections, step sizes and states of a tile of ``T`` positions fit into the level-2 cache, so that no B, C,
dt or state tensor of full length exists. Vectors (``cpu_lanes``) run over channels: no sum over states crosses lanes,
and eight channels suffice, as in the network's first stage.

``state`` is N, rounded up to an even number: a vector of 16 is two states of eight channels. Rows of a tile are
[B (N), C (N), dt (R), padding]. Channels are padded to whole vectors of eight: tiles are (T, d), vectors of channels
(1, d), and what there is for every state (A, h and their gradients) is (d / 8 * N, 8), a vector of eight channels after
the other.

Within a tile, rows are in walking order: a reversed or column-major direction is only another way to gather rows.
The kernels release the GIL and run on a thread pool (``cpu_threads``). Compiled code is cached on disk by Numba.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
from numba import njit
from numba.extending import overload

from .cpu_lanes import (
    LANES,
    exp2_lanes,
    folded,
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

LOG2_E = math.log2(math.e)
# Everything but nnan and ninf: a NaN in an image must stay a NaN.
_FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
_OPTIONS: dict[str, Any] = {"nogil": True, "cache": True, "fastmath": _FASTMATH, "error_model": "numpy"}
f4 = np.float32
FEW = 16
"""Channels up to which ``products_backward`` is the faster."""
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
    """In float32 e times a polynomial of degree 8, so that small results stay relatively exact.

    With the least relative error on [0, 1], 3e-8 (``triton_common.softplus`` has the same).
    """
    if e != numba.float32:
        return lambda e: np.log1p(e)

    def log1p_float32(e):
        p = f4(0.0052326927)
        p = p * e + f4(-0.0295052325)
        p = p * e + f4(0.0782259417)
        p = p * e + f4(-0.136632449)
        p = p * e + f4(0.191060064)
        p = p * e + f4(-0.248429821)
        p = p * e + f4(0.333190968)
        p = p * e + f4(-0.499994931)
        p = p * e + f4(1.0)
        return e * p

    return log1p_float32


@njit(**_OPTIONS)
def softplus_tile(raw, delta, steps):
    """Delta = softplus(raw) for the first ``steps`` rows of contiguous tiles."""
    log2_e = raw.dtype.type(LOG2_E)
    # as one long row: rows of few channels are shorter than the vector loop
    raw_row, delta_row = raw.reshape(raw.size), delta.reshape(raw.size)
    for i in range(steps * raw.shape[1]):
        v = raw_row[i]
        delta_row[i] = max(v, raw.dtype.type(0.0)) + _log1p(_exp2(-abs(v) * log2_e))


@njit(**_OPTIONS)
def softplus_backward_tile(raw, ddelta, steps):
    """Multiplies ddelta by the derivative of softplus at raw."""
    one, log2_e = raw.dtype.type(1.0), raw.dtype.type(LOG2_E)
    raw_row, ddelta_row = raw.reshape(raw.size), ddelta.reshape(raw.size)
    for i in range(steps * raw.shape[1]):
        v = raw_row[i]
        e = _exp2(-abs(v) * log2_e)
        ddelta_row[i] *= (one if v >= 0 else e) / (one + e)


@njit(**_OPTIONS)
def rows_per_product(a, b):
    """Rows of ``a`` (T, k) to multiply by ``b`` (k, m) at once, so that OpenBLAS stays on this thread."""
    return max(1, BLAS_LIMIT // (a.shape[1] * b.shape[1]))


@njit(inline="always")
def _four_rows(a, b, out, t, j):
    """``products`` of four rows and eight columns."""
    zero = splat(b.dtype.type(0.0))
    r0, r1, r2, r3 = zero, zero, zero, zero
    for i in range(b.shape[0]):
        column = load(b, i, j)
        r0 = r0 + splat(a[t, i]) * column
        r1 = r1 + splat(a[t + 1, i]) * column
        r2 = r2 + splat(a[t + 2, i]) * column
        r3 = r3 + splat(a[t + 3, i]) * column
    store(out, t, j, r0)
    store(out, t + 1, j, r1)
    store(out, t + 2, j, r2)
    store(out, t + 3, j, r3)


@njit(inline="always")
def _four_wide_rows(a, b, out, t, j):
    """``products`` of four rows and 32 columns: sums in registers, twice as many as an addition takes cycles."""
    zero = twice(splat(b.dtype.type(0.0)))
    r0, r1, r2, r3, s0, s1, s2, s3 = zero, zero, zero, zero, zero, zero, zero, zero
    for i in range(b.shape[0]):
        left, right = load_pair(b, i, j), load_pair(b, i, j + 16)
        a0, a1 = twice(splat(a[t, i])), twice(splat(a[t + 1, i]))
        a2, a3 = twice(splat(a[t + 2, i])), twice(splat(a[t + 3, i]))
        r0, s0 = r0 + a0 * left, s0 + a0 * right
        r1, s1 = r1 + a1 * left, s1 + a1 * right
        r2, s2 = r2 + a2 * left, s2 + a2 * right
        r3, s3 = r3 + a3 * left, s3 + a3 * right
    store_pair(out, t, j, r0)
    store_pair(out, t + 1, j, r1)
    store_pair(out, t + 2, j, r2)
    store_pair(out, t + 3, j, r3)
    store_pair(out, t, j + 16, s0)
    store_pair(out, t + 1, j + 16, s1)
    store_pair(out, t + 2, j + 16, s2)
    store_pair(out, t + 3, j + 16, s3)


@njit(**_OPTIONS)
def products(a, b, out, steps):
    """Out = a b of the first ``steps`` rows, rounded up to fours; columns of b are whole vectors.

    For tiles of this size a library's calls take longer than the products.
    """
    wide = b.shape[1] // 32 * 32
    for t in range(0, steps, 4):
        for j in range(0, wide, 32):
            _four_wide_rows(a, b, out, t, j)
        for j in range(wide, b.shape[1], LANES):
            _four_rows(a, b, out, t, j)


@njit(inline="always")
def walk_start(position, height, width, column):
    """Where the row-major or column-major walk of a map is at a position: (line, place in it, its length, stride).

    The flattened map's row is ``place * stride + line``; a row-major walk is one line of all rows.
    """
    if column:
        return position // height, position % height, height, width
    return 0, position, height * width, 1


@njit(inline="always")
def walk_on(line, place, length, step):
    """``line`` and ``place`` a step (1 or -1) further."""
    place += step
    if place == length:
        return line + 1, 0
    if place < 0:
        return line - 1, length - 1
    return line, place


@njit(**_OPTIONS)
def gather_rows(source, tile, first, step, steps, height, width, column):
    """Rows of a (H W, d) map along a walk that starts at ``first`` and goes by ``step`` (1 or -1)."""
    whole = source.shape[1] // LANES * LANES
    line, place, length, stride = walk_start(first, height, width, column)
    for t in range(steps):
        row = place * stride + line
        for c in range(0, whole, LANES):
            store(tile, t, c, load(source, row, c))
        for i in range(whole, source.shape[1]):
            tile[t, i] = source[row, i]
        line, place = walk_on(line, place, length, step)


@njit(**_OPTIONS)
def scatter_rows(tile, target, first, step, steps, height, width, column, add):
    """Inverse of ``gather_rows``; ``add``: to what is there."""
    whole = target.shape[1] // LANES * LANES
    line, place, length, stride = walk_start(first, height, width, column)
    for t in range(steps):
        row = place * stride + line
        for c in range(0, whole, LANES):
            store(target, row, c, load(target, row, c) + load(tile, t, c) if add else load(tile, t, c))
        for i in range(whole, target.shape[1]):
            target[row, i] = target[row, i] + tile[t, i] if add else tile[t, i]
        line, place = walk_on(line, place, length, step)


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


@njit(**_OPTIONS)
def scale_tile(x, D, y, steps):
    """Y = D x."""
    for t in range(steps):
        for c in range(0, x.shape[1], LANES):
            store(y, t, c, load(D, 0, c) * load(x, t, c))


@njit(**_OPTIONS)
def add_products(a, b, sums, steps):
    """Adds the sum over ``steps`` rows of a b to sums (1, d)."""
    for c in range(0, a.shape[1], LANES):
        column = load(sums, 0, c)
        for t in range(steps):
            column = column + load(a, t, c) * load(b, t, c)
        store(sums, 0, c, column)


@njit(**_OPTIONS)
def add_rows(a, sums, steps):
    """Adds the sum over ``steps`` rows of a to sums (1, d)."""
    for c in range(0, a.shape[1], LANES):
        column = load(sums, 0, c)
        for t in range(steps):
            column = column + load(a, t, c)
        store(sums, 0, c, column)


@njit(**_OPTIONS)
def scan_eight_states(state, c, first, n, x, rows, delta, A2, h, y, steps):
    """``scan_tile`` of eight channels, whose states from the ``n``-th on stay in registers, two to a vector."""
    h0, h1 = load_pair(h, first, 0), load_pair(h, first + 2, 0)
    h2, h3 = load_pair(h, first + 4, 0), load_pair(h, first + 6, 0)
    a0, a1 = load_pair(A2, first, 0), load_pair(A2, first + 2, 0)
    a2, a3 = load_pair(A2, first + 4, 0), load_pair(A2, first + 6, 0)
    for t in range(steps):
        step = twice(load(delta, t, c))
        drive = step * twice(load(x, t, c))
        h0 = exp2_lanes(step * a0) * h0 + drive * splat_pair(rows, t, n)
        h1 = exp2_lanes(step * a1) * h1 + drive * splat_pair(rows, t, n + 2)
        h2 = exp2_lanes(step * a2) * h2 + drive * splat_pair(rows, t, n + 4)
        h3 = exp2_lanes(step * a3) * h3 + drive * splat_pair(rows, t, n + 6)
        out = h0 * splat_pair(rows, t, state + n) + h1 * splat_pair(rows, t, state + n + 2)
        out = out + (h2 * splat_pair(rows, t, state + n + 4) + h3 * splat_pair(rows, t, state + n + 6))
        store(y, t, c, load(y, t, c) + folded(out))
    store_pair(h, first, 0, h0)
    store_pair(h, first + 2, 0, h1)
    store_pair(h, first + 4, 0, h2)
    store_pair(h, first + 6, 0, h3)


@njit(**_OPTIONS)
def scan_tile(state, x, rows, delta, A2, h, y, steps):
    """Walk a tile forward: updates the states ``h`` and adds <C, h> to ``y``."""
    for block in range(x.shape[1] // LANES):
        c, first = block * LANES, block * state
        eights = state // 8 * 8
        for n in range(0, eights, 8):
            scan_eight_states(state, c, first + n, n, x, rows, delta, A2, h, y, steps)
        if eights == state:
            continue
        for t in range(steps):
            step = twice(load(delta, t, c))
            drive = step * twice(load(x, t, c))
            for n in range(eights, state, 2):
                decay = exp2_lanes(step * load_pair(A2, first + n, 0))
                hn = decay * load_pair(h, first + n, 0) + drive * splat_pair(rows, t, n)
                store_pair(h, first + n, 0, hn)
                store(y, t, c, load(y, t, c) + folded(hn * splat_pair(rows, t, state + n)))


@njit(**_OPTIONS)
def record_block(state, block, x, rows, delta, A2, h, before, decay, steps):
    """Walk eight channels of a tile forward, keeping the state before each step and each step's decay, (T N, 8)."""
    c, first = block * LANES, block * state
    for t in range(steps):
        step = twice(load(delta, t, c))
        drive = step * twice(load(x, t, c))
        for n in range(0, state, 2):
            a, hn = exp2_lanes(step * load_pair(A2, first + n, 0)), load_pair(h, first + n, 0)
            store_pair(decay, t * state + n, 0, a)
            store_pair(before, t * state + n, 0, hn)
            store_pair(h, first + n, 0, a * hn + drive * splat_pair(rows, t, n))


@njit(**_OPTIONS)
def backward_block(state, block, dy, x, rows, delta, A, before, decay, g, dx, ddelta, dbc, dA, steps):
    """Walk them backward with the adjoint states ``g``; adds to dx, ddelta, dA and, after block 0, dbc."""
    c, first = block * LANES, block * state
    for t in range(steps - 1, -1, -1):
        step, u = load(delta, t, c), load(x, t, c)
        steps_n, drive, dout = twice(step), twice(step * u), twice(load(dy, t, c))
        ddrive = dstep = twice(splat(x.dtype.type(0.0)))
        for n in range(0, state, 2):
            a, b = load_pair(decay, t * state + n, 0), splat_pair(rows, t, n)
            carried = a * load_pair(before, t * state + n, 0)
            gn = load_pair(g, first + n, 0) + dout * splat_pair(rows, t, state + n)
            in_b, in_c = 2 * state * t + n, 2 * state * t + state + n
            db, dc = gn * drive, dout * (carried + drive * b)
            if block > 0:
                db, dc = db + load_pair(dbc, in_b, 0), dc + load_pair(dbc, in_c, 0)
            store_pair(dbc, in_b, 0, db)
            store_pair(dbc, in_c, 0, dc)
            ddrive = ddrive + gn * b
            dlog = gn * carried
            dstep = dstep + dlog * load_pair(A, first + n, 0)
            store_pair(dA, first + n, 0, load_pair(dA, first + n, 0) + dlog * steps_n)
            store_pair(g, first + n, 0, gn * a)
        store(dx, t, c, load(dx, t, c) + folded(ddrive) * step)
        store(ddelta, t, c, load(ddelta, t, c) + folded(ddrive) * u + folded(dstep))


@njit(**_OPTIONS)
def scan_tile_backward(state, dy, x, rows, delta, A, A2, h, before, decay, g, dbc, dx, ddelta, drows, dA, steps):
    """Gradients of ``scan_tile``: adds to dx and dA; writes ddelta and drows' B and C; ``h`` as it was before."""
    ddelta[:] = 0
    for block in range(x.shape[1] // LANES):
        record_block(state, block, x, rows, delta, A2, h, before, decay, steps)
        backward_block(state, block, dy, x, rows, delta, A, before, decay, g, dx, ddelta, dbc, dA, steps)
    whole = 2 * state // LANES * LANES
    for t in range(steps):
        for j in range(0, whole, LANES):
            store(drows, t, j, totals(dbc, 2 * state * t + j))
        for j in range(whole, 2 * state):
            drows[t, j] = total(load(dbc, 2 * state * t + j, 0))


@njit(**_OPTIONS)
def project_tile(state, x, w_in, w_delta, bias, rows, raw, steps):
    """Rows [B, C, dt] and the step sizes before the softplus (T, d) of a tile."""
    products(x, w_in, rows, steps)
    for t in range(steps):
        for c in range(0, x.shape[1], LANES):
            value = load(bias, 0, c)
            for r in range(w_delta.shape[0]):
                value = value + splat(rows[t, 2 * state + r]) * load(w_delta, r, c)
            store(raw, t, c, value)


@njit(**_OPTIONS)
def products_backward(drows, x, w_in, dx, dw_in, steps):
    """Gradients of ``x w_in`` for few channels, where calls of a library take longer than the products."""
    for t in range(steps):
        for i in range(x.shape[1]):
            factor, dxi = splat(x[t, i]), splat(x.dtype.type(0.0))
            for j in range(0, w_in.shape[1], LANES):
                drow = load(drows, t, j)
                dxi = dxi + drow * load(w_in, i, j)
                store(dw_in, i, j, load(dw_in, i, j) + factor * drow)
            dx[t, i] += total(dxi)


@njit(**_OPTIONS)
def project_tile_backward(state, drows, draw, x, rows, w_in, w_delta, dx, dw_in, dw_delta, dbias, steps):
    """Adds the gradients of ``project_tile``'s inputs and weights; ``drows`` holds those of B and C on entry."""
    for t in range(steps):
        for r in range(w_delta.shape[0]):
            dt, ddt = splat(rows[t, 2 * state + r]), splat(x.dtype.type(0.0))
            for c in range(0, x.shape[1], LANES):
                ddt = ddt + load(draw, t, c) * load(w_delta, r, c)
                store(dw_delta, r, c, load(dw_delta, r, c) + load(draw, t, c) * dt)
            drows[t, 2 * state + r] = total(ddt)
    add_rows(draw, dbias, steps)
    if x.shape[1] <= FEW:
        products_backward(drows, x, w_in, dx, dw_in, steps)
        return
    block = rows_per_product(x, w_in)
    for start in range(0, steps, block):
        end = min(start + block, steps)
        dx[start:end] += np.dot(drows[start:end], w_in.T)
        dw_in += np.dot(x[start:end].T, drows[start:end])


@njit(**_OPTIONS)
def forward_2d(state, x, height, width, k, tile, w_in, w_delta, bias, A2, D, states, y):
    """One direction of an image: x (H W, d'); fills states (chunks, d / 8 * N, 8), writes y (H W, d').

    d' is d without the padding. Where k > 1 it adds to y.
    """
    length, dim = x.shape[0], w_in.shape[0]
    kind = x.dtype
    xt, yt = np.zeros((tile, dim), kind), np.empty((tile, dim), kind)
    raw, delta = np.empty((tile, dim), kind), np.empty((tile, dim), kind)
    rows = np.empty((tile, w_in.shape[1]), kind)
    h = np.zeros(states.shape[1:], kind)
    column, step = k % 2 == 1, 1 if k < 2 else -1
    for chunk in range(states.shape[0]):
        start = chunk * tile
        steps = min(tile, length - start)
        first = start if step == 1 else length - 1 - start
        states[chunk] = h
        gather_rows(x, xt, first, step, steps, height, width, column)
        project_tile(state, xt, w_in, w_delta, bias, rows, raw, steps)
        softplus_tile(raw, delta, steps)
        scale_tile(xt, D, yt, steps)
        scan_tile(state, xt, rows, delta, A2, h, yt, steps)
        scatter_rows(yt, y, first, step, steps, height, width, column, k >= 2)


@njit(**_OPTIONS)
def backward_2d(state, dy, x, height, width, k, tile, w_in, w_delta, bias, A, A2, D, states,
                dx, dw_in, dw_delta, dbias, dA, dD):  # fmt: skip
    """Gradients of ``forward_2d``: adds to all arguments in the second line; writes dx where k < 2."""
    length, dim = x.shape[0], w_in.shape[0]
    kind = x.dtype
    xt, dyt, dxt = np.zeros((tile, dim), kind), np.zeros((tile, dim), kind), np.empty((tile, dim), kind)
    raw, delta, ddelta = np.empty((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
    rows, drows = np.empty((tile, w_in.shape[1]), kind), np.zeros((tile, w_in.shape[1]), kind)
    before, decay = np.empty((tile * state, LANES), kind), np.empty((tile * state, LANES), kind)
    dbc = np.empty((tile * 2 * state, LANES), kind)
    h, g = np.empty(A.shape, kind), np.zeros(A.shape, kind)
    column, step = k % 2 == 1, 1 if k < 2 else -1
    for chunk in range(states.shape[0] - 1, -1, -1):
        start = chunk * tile
        steps = min(tile, length - start)
        first = start if step == 1 else length - 1 - start
        h[:] = states[chunk]
        gather_rows(x, xt, first, step, steps, height, width, column)
        gather_rows(dy, dyt, first, step, steps, height, width, column)
        project_tile(state, xt, w_in, w_delta, bias, rows, raw, steps)
        softplus_tile(raw, delta, steps)
        scale_tile(dyt, D, dxt, steps)
        add_products(dyt, xt, dD, steps)
        scan_tile_backward(state, dyt, xt, rows, delta, A, A2, h, before, decay, g, dbc, dxt, ddelta, drows, dA, steps)
        softplus_backward_tile(raw, ddelta, steps)
        project_tile_backward(state, drows, ddelta, xt, rows, w_in, w_delta, dxt, dw_in, dw_delta, dbias, steps)
        scatter_rows(dxt, dx, first, step, steps, height, width, column, k >= 2)


@njit(**_OPTIONS)
def step_sizes(raw, delta, bias, softplus, steps):
    """Step sizes of the 1D op: bias added, softplus where asked for."""
    for t in range(steps):
        for c in range(0, raw.shape[1], LANES):
            value = load(raw, t, c) + load(bias, 0, c)
            store(raw, t, c, value)
            store(delta, t, c, value)
    if softplus:
        softplus_tile(raw, delta, steps)


@njit(**_OPTIONS)
def forward_1d(state, u, delta_in, A2, B, C, D, bias, softplus, tile, states, y):
    """One sample, one group: u, delta_in (d', L), B, C (N, L); fills states, adds to y (d', L)."""
    length, dim = u.shape[1], D.shape[1]
    kind = u.dtype
    xt, yt = np.zeros((tile, dim), kind), np.empty((tile, dim), kind)
    raw, delta = np.zeros((tile, dim), kind), np.empty((tile, dim), kind)
    rows = np.zeros((tile, 2 * state), kind)
    h = np.zeros(states.shape[1:], kind)
    for chunk in range(states.shape[0]):
        start = chunk * tile
        steps = min(tile, length - start)
        states[chunk] = h
        transpose_in(u, xt, start, steps)
        transpose_in(delta_in, raw, start, steps)
        transpose_in(B, rows[:, :state], start, steps)
        transpose_in(C, rows[:, state:], start, steps)
        step_sizes(raw, delta, bias, softplus, steps)
        scale_tile(xt, D, yt, steps)
        scan_tile(state, xt, rows, delta, A2, h, yt, steps)
        transpose_out(yt, y, start, steps)


@njit(**_OPTIONS)
def backward_1d(state, dy, u, delta_in, A, A2, B, C, D, bias, softplus, tile, states,
                du, ddelta_out, dA, dB, dC, dD, dbias):  # fmt: skip
    """Gradients of ``forward_1d``: adds to all arguments in the second line."""
    length, dim = u.shape[1], D.shape[1]
    kind = u.dtype
    xt, dyt, dxt = np.zeros((tile, dim), kind), np.zeros((tile, dim), kind), np.empty((tile, dim), kind)
    raw, delta, ddelta = np.zeros((tile, dim), kind), np.empty((tile, dim), kind), np.empty((tile, dim), kind)
    rows, drows = np.zeros((tile, 2 * state), kind), np.empty((tile, 2 * state), kind)
    before, decay = np.empty((tile * state, LANES), kind), np.empty((tile * state, LANES), kind)
    dbc = np.empty((tile * 2 * state, LANES), kind)
    h, g = np.empty(A.shape, kind), np.zeros(A.shape, kind)
    for chunk in range(states.shape[0] - 1, -1, -1):
        start = chunk * tile
        steps = min(tile, length - start)
        h[:] = states[chunk]
        transpose_in(u, xt, start, steps)
        transpose_in(dy, dyt, start, steps)
        transpose_in(delta_in, raw, start, steps)
        transpose_in(B, rows[:, :state], start, steps)
        transpose_in(C, rows[:, state:], start, steps)
        step_sizes(raw, delta, bias, softplus, steps)
        scale_tile(dyt, D, dxt, steps)
        add_products(dyt, xt, dD, steps)
        scan_tile_backward(state, dyt, xt, rows, delta, A, A2, h, before, decay, g, dbc, dxt, ddelta, drows, dA, steps)
        if softplus:
            softplus_backward_tile(raw, ddelta, steps)
        add_rows(ddelta, dbias, steps)
        transpose_out(dxt, du, start, steps)
        transpose_out(ddelta, ddelta_out, start, steps)
        transpose_out(drows[:, :state], dB, start, steps)
        transpose_out(drows[:, state:], dC, start, steps)
