# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the four-direction scan of a map with more than 16 channels: projected once, walked from memory.

A product first turns a slice of the batch into rows ``[positions, 4, d + 2 N]``: delta, B and C of every position and
direction, in the map's own order. A chunk's program then walks its positions one by one and reads their rows as it
needs them; its neighbours in the map make the rows of the other directions come from the
cache. With many channels a position's row is a few whole lines of cache, and a projection costs more the wider it is,
so doing it once instead of once a pass is worth the rows' way through memory; with few it is not (``triton_scan_2d``).

A walk's tile is ``[LANES, R, NN]`` as in ``triton_common``, of one segment; but a lane's channels and its states are
adjacent, so that it loads four of a row at once. The gradients of a position's B and C replace them in its row where
one warp holds all channels, and that of its delta replaces delta once the walk is done: the rows then are a factor of
the weights' gradients and of dx. All sums have a fixed order and no kernel uses atomics: results repeat bit for bit.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from nnunetv2_dermomamba.ops.triton_common import (
    BACKWARD_REGISTERS,
    CHUNK,
    LN2,
    LONG,
    Tile,
    ceil_div,
    chunk_count,
    combine,
    exp2,
    load_decay,
    programs_at_once,
    resident_programs,
    softplus,
    softplus_slope,
    sum_over_lanes,
)
from nnunetv2_dermomamba.ops.triton_map import SMALL, dot, fold, load_map, load_turned, map_position, unfold

SLICE_BYTES = 2**28
"""Of the rows in memory at once. At 8 channels a quarter measured 1.5 times slower, four times as much 5 % faster."""
SHORT_CHUNK = 32  # T of maps of up to 4096 positions
SUB = 8  # steps that a walk's loop holds
HOLD = 4  # positions between two saved states; divides SUB
COLUMNS = 32  # of a factor that a product's program holds at once
UNSPECIALIZED = ["length", "padded", "height", "width", "chunks", "positions"]


@triton.jit
def _lanes(DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr):
    """Channel ``[LANES, R, 1]`` and state ``[LANES, 1, NN]`` of the walk's tile."""
    lane = tl.arange(0, DP // R * (NP // NN))
    channel = (lane // (NP // NN) * R)[:, None, None] + tl.arange(0, R)[None, :, None]
    return channel, (lane % (NP // NN) * NN)[:, None, None] + tl.arange(0, NN)[None, None, :]


@triton.jit
def _saved(DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr):
    """Where a lane's states lie among a chunk's, ``[R, DP / R, NP]``: those of adjacent lanes side by side."""
    LANES: tl.constexpr = DP // R * (NP // NN)
    lane = tl.arange(0, LANES)[:, None, None]
    return lane * NN + tl.arange(0, R)[None, :, None] * (LANES * NN) + tl.arange(0, NN)[None, None, :]


@triton.jit
def _position(step, length, padded, height, width, direction, IS_SMALL: tl.constexpr):
    """Map position of a direction's step, and whether it exists. IS_SMALL: offsets of it fit 32 bits."""
    path = tl.where(direction > 1, padded - 1 - step, step)
    position = map_position(path, height, width, direction % 2, IS_SMALL)
    return position if IS_SMALL else position.to(tl.int64), path < length


@triton.jit
def _load(ptr, keep, EXACT: tl.constexpr):
    """In float32, 0 where there is nothing. EXACT: that is nowhere, so nothing is compared."""
    if EXACT:
        return tl.load(ptr).to(tl.float32)
    return tl.load(ptr, mask=keep, other=0.0).to(tl.float32)


@triton.jit
def _unpack(item, chunks):
    """Sample, direction and chunk of a work item."""
    return (item // 4 // chunks).to(tl.int64), item % 4, item // 4 % chunks


@triton.jit(do_not_specialize=UNSPECIALIZED)
def summary_kernel(
    rows_ptr, v_ptr, A_ptr, state_ptr, total_ptr,
    length, padded, height, width, chunks, d: tl.constexpr, N: tl.constexpr, ADJOINT: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr,
    EXACT: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """Summary of every chunk, stored where its successor (ADJOINT: predecessor) will read it; ``v`` is x or dy."""
    ROW: tl.constexpr = d + 2 * N
    channel, n = _lanes(DP, NP, R, NN)
    batch, direction, q = _unpack(tl.program_id(0), chunks)
    rows = rows_ptr + batch * length * (4 * ROW) + direction * ROW
    v_map = v_ptr + batch * length * d + channel
    A2 = load_decay(A_ptr + direction * d * N, channel, n, d, N)
    state = tl.zeros_like(A2)
    total = channel * 0.0
    for j in range(T // SUB):
        for i in tl.static_range(SUB):
            step = q * T + (T - 1 - (j * SUB + i) if ADJOINT else j * SUB + i)
            p, valid = _position(step, length, padded, height, width, direction, IS_SMALL)
            row = rows + p * (4 * ROW)
            delta = _load(row + channel, valid & (channel < d), EXACT)
            v = _load(v_map + p * d, valid & (channel < d), EXACT)
            m = _load(row + (d + N if ADJOINT else d) + n, valid & (n < N), EXACT)
            if ADJOINT:  # noqa: SIM108
                state = (state + v * m) * exp2(delta * A2)
            else:
                state = state * exp2(delta * A2) + (delta * v) * m
            total += delta
    chunk = q + (-1 if ADJOINT else 1)
    keep = (chunk >= 0) & (chunk < chunks) & (channel < d)
    entry = ((batch * 4 + direction) * chunks + chunk) * d + channel
    tl.store(total_ptr + entry, total, mask=keep)
    tl.store(state_ptr + entry * N + n, state, mask=keep & (n < N))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    rows_ptr, x_ptr, A_ptr, start_ptr, y_ptr,
    length, padded, height, width, chunks, d: tl.constexpr, N: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr,
    EXACT: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """``<C, h>`` of a chunk as ``[positions, 4, d]``."""
    ROW: tl.constexpr = d + 2 * N
    NL: tl.constexpr = NP // NN
    channel, n = _lanes(DP, NP, R, NN)
    lane = tl.arange(0, DP // R * NL)[:, None, None]
    batch, direction, q = _unpack(tl.program_id(0), chunks)
    rows = rows_ptr + batch * length * (4 * ROW) + direction * ROW
    x_map = x_ptr + batch * length * d + channel
    y_map = y_ptr + batch * length * (4 * d) + direction * d + channel
    A2 = load_decay(A_ptr + direction * d * N, channel, n, d, N)
    entry = ((batch * 4 + direction) * chunks + q) * d + channel
    h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
    for j in range(T // SUB):
        for i in tl.static_range(SUB):
            p, valid = _position(q * T + j * SUB + i, length, padded, height, width, direction, IS_SMALL)
            row = rows + p * (4 * ROW)
            delta = _load(row + channel, valid & (channel < d), EXACT)
            x = _load(x_map + p * d, valid & (channel < d), EXACT)
            b = _load(row + d + n, valid & (n < N), EXACT)
            c = _load(row + (d + N) + n, valid & (n < N), EXACT)
            h = h * exp2(delta * A2) + (delta * x) * b
            y = sum_over_lanes(tl.sum(h * c, axis=2)[:, :, None], DP // R, NL, 1)
            keep = lane % NL == 0
            if not EXACT:
                keep = keep & valid & (channel < d)
            tl.store(y_map + p * (4 * d), y, mask=keep)


@triton.jit
def _advance(
    h, rows, x_map, A2, channel, n, step, length, padded, height, width, direction,
    d: tl.constexpr, N: tl.constexpr, EXACT: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """State after a step."""
    p, valid = _position(step, length, padded, height, width, direction, IS_SMALL)
    row = rows + p * (4 * (d + 2 * N))
    delta = _load(row + channel, valid & (channel < d), EXACT)
    x = _load(x_map + p * d, valid & (channel < d), EXACT)
    b = _load(row + d + n, valid & (n < N), EXACT)
    return h * exp2(delta * A2) + (delta * x) * b


@triton.jit(do_not_specialize=[*UNSPECIALIZED, "items"])
def backward_kernel(
    rows_ptr, x_ptr, dy_ptr, A_ptr, start_ptr, adjoint_ptr, scratch_ptr, by_input_ptr, by_decay_ptr, dbc_ptr, dA_ptr,
    items, length, padded, height, width, chunks, d: tl.constexpr, N: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr,
    HOLD: tl.constexpr, EXACT: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """Gradients of chunks' every position, from the states and the adjoints that enter at their two ends.

    With respect to w = delta x and, the decays' part only, to delta, ``[positions, 4, d]``; of B and C over B and C or,
    where several warps share a position, a partial sum of each for every one ``[positions, 4, PARTS, 2 N]``; of A,
    the chunk's, in the saved states' order. A chunk is walked forward first, which leaves its states in the scratch.
    """
    ROW: tl.constexpr = d + 2 * N
    NL: tl.constexpr = NP // NN
    G: tl.constexpr = DP // R
    E: tl.constexpr = G if G < 8 else 8
    PARTS: tl.constexpr = G // E
    DROW: tl.constexpr = 4 * ROW if PARTS == 1 else 4 * PARTS * 2 * N
    channel, n = _lanes(DP, NP, R, NN)
    lane = tl.arange(0, G * NL)[:, None, None]
    saved = _saved(DP, NP, R, NN)
    save = scratch_ptr + tl.program_id(0).to(tl.int64) * (T // HOLD * DP * NP) + saved
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        batch, direction, q = _unpack(item, chunks)
        rows = rows_ptr + batch * length * (4 * ROW) + direction * ROW
        x_map = x_ptr + batch * length * d + channel
        dy_map = dy_ptr + batch * length * d + channel
        out = batch * length * (4 * d) + direction * d + channel
        if PARTS == 1:  # nobody reads a position's B and C after its own step
            dbc_map = rows + d + n
        else:
            dbc_map = dbc_ptr + (batch * length * 4 + direction) * (PARTS * 2 * N) + lane // NL // E * (2 * N) + n
        A2 = load_decay(A_ptr + direction * d * N, channel, n, d, N)
        chunk = (batch * 4 + direction) * chunks + q
        entry = chunk * d + channel
        h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
        for j in range(T // SUB):
            for i in tl.static_range(SUB):
                if i % HOLD == 0:
                    tl.store(save + (j * (SUB // HOLD) + i // HOLD) * (DP * NP), h)
                step = q * T + j * SUB + i
                h = _advance(
                    h, rows, x_map, A2, channel, n, step, length, padded, height, width, direction, d, N, EXACT,
                    IS_SMALL
                )  # fmt: skip
        tl.debug_barrier()
        g = tl.load(adjoint_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
        dA = tl.zeros_like(A2)
        for back in range(T // HOLD):
            j = T // HOLD - 1 - back
            first = q * T + j * HOLD
            # The states of some steps, from the saved ones before them; then the steps in reverse.
            h = tl.load(save + j * (DP * NP))
            states = (h,)
            for i in tl.static_range(HOLD):
                h = _advance(
                    h, rows, x_map, A2, channel, n, first + i, length, padded, height, width, direction, d, N, EXACT,
                    IS_SMALL
                )  # fmt: skip
                states = states + (h,)  # noqa: RUF005  (kernels know no starred tuples)
            for i in tl.static_range(HOLD - 1, -1, -1):
                p, valid = _position(first + i, length, padded, height, width, direction, IS_SMALL)
                row = rows + p * (4 * ROW)
                delta = _load(row + channel, valid & (channel < d), EXACT)
                x = _load(x_map + p * d, valid & (channel < d), EXACT)
                dy = _load(dy_map + p * d, valid & (channel < d), EXACT)
                b = _load(row + d + n, valid & (n < N), EXACT)
                c = _load(row + (d + N) + n, valid & (n < N), EXACT)
                g += dy * c
                dc = sum_over_lanes(tl.sum(dy * states[i + 1], axis=1)[:, None, :], PARTS, E, NL)
                db = sum_over_lanes(tl.sum((delta * x) * g, axis=1)[:, None, :], PARTS, E, NL)
                by_input = sum_over_lanes(tl.sum(g * b, axis=2)[:, :, None], G, NL, 1)
                g *= exp2(delta * A2)
                r = g * states[i]
                dA += r * delta
                by_decay = sum_over_lanes(tl.sum(r * A2, axis=2)[:, :, None], G, NL, 1)
                keep = lane % NL == 0
                m_keep = lane // NL % E == 0
                if not EXACT:
                    keep = keep & valid & (channel < d)
                    m_keep = m_keep & valid & (n < N)
                tl.store(by_input_ptr + out + p * (4 * d), by_input, mask=keep)
                tl.store(by_decay_ptr + out + p * (4 * d), by_decay * LN2, mask=keep)
                tl.store(dbc_map + p * DROW, db, mask=m_keep)
                tl.store(dbc_map + p * DROW + N, dc, mask=m_keep)
        tl.store(dA_ptr + chunk * (DP * NP) + saved, dA)
        tl.debug_barrier()  # the next item's states go to the same scratch


@triton.jit(do_not_specialize=UNSPECIALIZED)
def project_kernel(
    x_ptr, weight_ptr, bias_ptr, rows_ptr, positions, d: tl.constexpr, N: tl.constexpr,
    KD: tl.constexpr, NP: tl.constexpr, COLUMNS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Rows of delta, B and C of ``P`` positions, all four directions."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    ROW: tl.constexpr = d + 2 * N
    position = (tl.program_id(0) * P + tl.arange(0, P)).to(tl.int64)
    valid = position < positions
    k = tl.arange(0, KD)
    m = tl.arange(0, 2 * NP)
    for i in tl.static_range(4):
        weight = weight_ptr + i * (KD + 2 * NP) * KD
        raw = tl.zeros([P, KD], tl.float32)
        bc = tl.zeros([P, 2 * NP], tl.float32)
        for first in range(0, KD, COLUMNS):
            x = load_map(x_ptr, position, valid, first + tl.arange(0, COLUMNS), d)
            raw = dot(x, load_turned(weight, first, KD, KD, COLUMNS), raw, A_EXACT=HALF)
            bc = dot(x, load_turned(weight + KD * KD, first, 2 * NP, KD, COLUMNS), bc, A_EXACT=HALF)
        raw += tl.load(bias_ptr + i * d + k, mask=k < d, other=0.0)[None, :]
        row = rows_ptr + (position * 4 + i)[:, None] * ROW
        tl.store(row + k[None, :], softplus(raw), mask=valid[:, None] & (k < d)[None, :])
        tl.store(row + _bc_column(m, d, N, NP)[None, :], bc, mask=valid[:, None] & (m % NP < N)[None, :])


@triton.jit
def _bc_column(m, d: tl.constexpr, N: tl.constexpr, NP: tl.constexpr):
    """Column in a row of the ``m``-th of the ``2 NP`` padded projections B and C."""
    return d + m // NP * N + m % NP


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_kernel(y_ptr, x_ptr, D_ptr, out_ptr, positions, d: tl.constexpr, DP: tl.constexpr, P: tl.constexpr):
    """The four directions' ``<C, h>`` and ``D x``, summed."""
    position = (tl.program_id(0) * P + tl.arange(0, P)).to(tl.int64)
    valid = position < positions
    k = tl.arange(0, DP)
    skip = tl.zeros([DP], tl.float32)
    y = tl.zeros([P, DP], tl.float32)
    for i in tl.static_range(4):
        y += load_map(y_ptr, position * 4 + i, valid, k, d)
        skip += tl.load(D_ptr + i * d + k, mask=k < d, other=0.0)
    y += skip[None, :] * load_map(x_ptr, position, valid, k, d)
    tl.store(out_ptr + position[:, None] * d + k[None, :], y, mask=valid[:, None] & (k < d)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def input_gradient_kernel(
    by_input_ptr, by_decay_ptr, dbc_ptr, rows_ptr, x_ptr, dy_ptr, D_ptr, weight_ptr, dx_ptr, dD_ptr,
    positions, d: tl.constexpr, N: tl.constexpr, KD: tl.constexpr, NP: tl.constexpr, PARTS: tl.constexpr,
    COLUMNS: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """dx, rows of the gradients of delta before its softplus and of B and C, and partial sums of the gradient of D."""
    ROW: tl.constexpr = d + 2 * N
    k = tl.arange(0, KD)
    m = tl.arange(0, 2 * NP)
    column = _bc_column(m, d, N, NP)[None, :]
    dD = tl.zeros([P, KD], tl.float32)
    skip = tl.zeros([KD], tl.float32)
    for direction in tl.static_range(4):
        skip += tl.load(D_ptr + direction * d + k, mask=k < d, other=0.0)
    for block in range(tl.program_id(0), tl.cdiv(positions, P), tl.num_programs(0)):
        position = (block * P + tl.arange(0, P)).to(tl.int64)
        valid = position < positions
        keep = valid[:, None] & (k < d)[None, :]
        m_keep = valid[:, None] & (m % NP < N)[None, :]
        x = load_map(x_ptr, position, valid, k, d)
        dy = load_map(dy_ptr, position, valid, k, d)
        dx = skip[None, :] * dy
        dD += dy * x
        for i in range(4):
            row = rows_ptr + (position * 4 + i)[:, None] * ROW
            delta = tl.load(row + k[None, :], mask=keep, other=0.0)
            by_input = load_map(by_input_ptr, position * 4 + i, valid, k, d)
            dx += delta * by_input
            draw = x * by_input + load_map(by_decay_ptr, position * 4 + i, valid, k, d)
            draw *= softplus_slope(delta)
            tl.store(row + k[None, :], draw, mask=keep)
            if PARTS == 1:
                bc = tl.load(row + column, mask=m_keep, other=0.0)
            else:
                bc = tl.zeros([P, 2 * NP], tl.float32)
                for part in tl.static_range(PARTS):
                    parts = dbc_ptr + ((position * 4 + i) * PARTS + part)[:, None] * (2 * N)
                    bc += tl.load(parts + column - d, mask=m_keep, other=0.0)
                tl.store(row + column, bc, mask=m_keep)
            weight = weight_ptr + i * (KD + 2 * NP) * KD
            dx = dot(bc, tl.load(weight + (KD + m)[:, None] * KD + k[None, :]), dx)
            if KD == COLUMNS:
                dx = dot(draw, tl.load(weight + k[:, None] * KD + k[None, :]), dx)
            else:  # a few columns at a time, read back
                tl.debug_barrier()
                for first in range(0, KD, COLUMNS):
                    c = first + tl.arange(0, COLUMNS)
                    block_draw = tl.load(row + c[None, :], mask=valid[:, None] & (c < d)[None, :], other=0.0)
                    dx = dot(block_draw, tl.load(weight + c[:, None] * KD + k[None, :]), dx)
        tl.store(dx_ptr + position[:, None] * d + k[None, :], dx, mask=keep)
    dD_at = dD_ptr + tl.program_id(0) * KD + k
    tl.store(dD_at, tl.load(dD_at) + tl.sum(dD, axis=0))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def weight_gradient_kernel(
    rows_ptr, x_ptr, dweight_ptr, dbias_ptr, positions, d: tl.constexpr, N: tl.constexpr,
    KD: tl.constexpr, NP: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Partial sums of the gradients of one direction's folded weights and bias."""
    HALF: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    ROW: tl.constexpr = d + 2 * N
    direction = tl.program_id(1)
    k = tl.arange(0, KD)
    m = tl.arange(0, 2 * NP)
    dw = tl.zeros([KD, KD], tl.float32)
    dm = tl.zeros([2 * NP, KD], tl.float32)
    dbias = tl.zeros([KD, P], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(positions, P), tl.num_programs(0)):
        position = (block * P + tl.arange(0, P)).to(tl.int64)
        valid = position < positions
        x = load_map(x_ptr, position, valid, k, d)
        row = rows_ptr + (position * 4 + direction)[None, :] * ROW
        draw = tl.load(row + k[:, None], mask=valid[None, :] & (k < d)[:, None], other=0.0)
        column = _bc_column(m, d, N, NP)[:, None]
        dbc = tl.load(row + column, mask=valid[None, :] & (m % NP < N)[:, None], other=0.0)
        dbias += draw
        dw = dot(draw, x, dw, B_EXACT=HALF)
        dm = dot(dbc, x, dm, B_EXACT=HALF)
    part = tl.program_id(0) * 4 + direction
    dbias_at = dbias_ptr + part * KD + k
    tl.store(dbias_at, tl.load(dbias_at) + tl.sum(dbias, axis=1))
    dweight = dweight_ptr + part * ((KD + 2 * NP) * KD)
    dw_at = dweight + k[:, None] * KD + k[None, :]
    dm_at = dweight + (KD + m)[:, None] * KD + k[None, :]
    tl.store(dw_at, tl.load(dw_at) + dw)
    tl.store(dm_at, tl.load(dm_at) + dm)


class _Plan:
    """Sizes and constants of one call."""

    def __init__(self, batch: int, height: int, width: int, channels: int, state: int) -> None:
        self.length = height * width
        DP, NP = triton.next_power_of_2(channels), triton.next_power_of_2(state)
        chunk = CHUNK if self.length > LONG else SHORT_CHUNK
        self.tile = Tile(DP, NP, min(4, DP), min(4, NP), 1, chunk, SUB, HOLD)
        self.chunks = chunk_count(self.length, self.tile)
        padded = self.chunks * chunk
        self.sizes = (self.length, padded, height, width, self.chunks)
        self.row = channels + 2 * state
        self.weights = (DP, max(8, NP))  # columns and rows of B (and of C) of a direction's folded weights, for tl.dot
        self.samples = min(batch, max(1, SLICE_BYTES // (16 * self.length * self.row)))
        self.slices = [slice(i, min(batch, i + self.samples)) for i in range(0, batch, self.samples)]
        names = ("DP", "NP", "R", "NN", "T", "SUB", "num_warps")
        self.walk = {
            **{name: getattr(self.tile, name) for name in names},
            "d": channels,
            "N": state,
            "EXACT": (padded, DP, NP) == (self.length, channels, state),
            "IS_SMALL": padded < SMALL and 4 * padded * max(self.row, self.tile.parts * 2 * state) < 2**31,
        }
        self.products = {"d": channels, "N": state, "KD": self.weights[0], "NP": self.weights[1]}

    def items(self, part: Tensor) -> tuple[int]:
        """Grid of the walks of some samples: a program for every chunk of every direction."""
        return (part.shape[0] * 4 * self.chunks,)


def _plan(x: Tensor, A: Tensor) -> _Plan:
    batch, height, width, d = x.shape
    return _Plan(batch, height, width, d, A.shape[1])


def rows_chunks(x: Tensor, state: int) -> int:
    """Chunks of a direction."""
    batch, height, width, d = x.shape
    return _Plan(batch, height, width, d, state).chunks


def _project(plan: _Plan, x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor) -> None:
    positions, block = x.shape[0] * plan.length, 64
    project_kernel[(ceil_div(positions, block),)](
        x, weight, bias, rows, positions, **plan.products, COLUMNS=COLUMNS, P=block, num_warps=4
    )


def _summaries(plan: _Plan, rows: Tensor, v: Tensor, A: Tensor, adjoint: bool, state: Tensor) -> None:
    """Fill ``state`` (samples, 4, chunks, d, N) with what enters each chunk."""
    if plan.chunks == 1:
        state.zero_()
        return
    total = A.new_empty(state.shape[:4])
    summary_kernel[plan.items(v)](rows, v, A, state, total, *plan.sizes, ADJOINT=adjoint, **plan.walk)
    combine(state, total, A, 4, adjoint)


def rows_forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> tuple[Tensor, Tensor]:
    """``triton_scan_2d.scan_2d_forward`` of a map with 17 to ``MAX_BLOCK`` channels, on the current device.

    Args:
        x: (B, H, W, d) map, channels last, contiguous, float16, bfloat16 or float32.
        x_proj_weight: (4, R + 2 N, d), float32, as all below.
        dt_projs_weight: (4, d, R).
        dt_projs_bias: (4, d).
        A: (4 d, N).
        Ds: (4 d,).

    Returns:
        y (B, H, W, d) in float32, and the states that enter the chunks (B, 4, chunks, d, N).
    """
    plan = _plan(x, A)
    d = x.shape[3]
    weight = fold(x_proj_weight, dt_projs_weight, *plan.weights)
    states = A.new_empty(x.shape[0], 4, plan.chunks, d, A.shape[1])
    y = A.new_empty(x.shape)
    rows = A.new_empty(plan.samples * plan.length, 4, plan.row)
    directions = A.new_empty(plan.samples * plan.length, 4, d)
    block = max(1, 2048 // plan.tile.DP)
    for samples in plan.slices:
        part = x[samples]
        positions = part.shape[0] * plan.length
        _project(plan, part, weight, dt_projs_bias, rows)
        _summaries(plan, rows, part, A, False, states[samples])
        forward_kernel[plan.items(part)](rows, part, A, states[samples], directions, *plan.sizes, **plan.walk)
        merge_kernel[(ceil_div(positions, block),)](directions, part, Ds, y[samples], positions, d, plan.tile.DP, block)
    return y, states


def rows_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``rows_forward`` for contiguous ``dy`` (B, H, W, d).

    Returns:
        Gradients of x, x_proj_weight, dt_projs_weight, dt_projs_bias, A and Ds, all in float32.
    """
    plan = _plan(x, A)
    tile, d, state = plan.tile, x.shape[3], A.shape[1]
    most = plan.samples * plan.length
    weight = fold(x_proj_weight, dt_projs_weight, *plan.weights)
    rows = A.new_empty(most, 4, plan.row)
    by_input, by_decay = A.new_empty(2, most, 4, d)
    dbc = rows if tile.parts == 1 else A.new_empty(most, 4, tile.parts, 2 * state)
    dA = A.new_empty(x.shape[0], 4, plan.chunks, tile.R, tile.DP // tile.R, tile.NP)
    adjoints = A.new_empty(plan.samples, *states.shape[1:])
    programs = resident_programs(A, tile, BACKWARD_REGISTERS)
    scratch = A.new_empty(programs * math.prod(tile.saved_states))
    dx = A.new_empty(x.shape)
    # Wider maps have larger partial sums of the weights' gradients, so fewer of them.
    block = 64 if d <= 32 else 32
    weight_programs = max(1, min(programs_at_once(A, 1) * 32 // tile.DP, ceil_div(most, block)))
    input_programs = min(programs_at_once(A, 2), ceil_div(most, 32))
    dweight = A.new_zeros(weight_programs, *weight.shape)
    dbias = A.new_zeros(weight_programs, 4, tile.DP)
    dD = A.new_zeros(input_programs, tile.DP)
    for samples in plan.slices:
        part, dpart = x[samples], dy[samples]
        positions = part.shape[0] * plan.length
        _project(plan, part, weight, dt_projs_bias, rows)
        _summaries(plan, rows, dpart, A, True, adjoints[: len(part)])
        (items,) = plan.items(part)
        backward_kernel[(min(items, programs),)](
            rows, part, dpart, A, states[samples], adjoints, scratch, by_input, by_decay, dbc, dA[samples],
            items, *plan.sizes, **plan.walk, HOLD=HOLD, maxnreg=BACKWARD_REGISTERS
        )  # fmt: skip
        input_gradient_kernel[(input_programs,)](
            by_input, by_decay, dbc, rows, part, dpart, Ds, weight, dx[samples], dD, positions,
            **plan.products, PARTS=tile.parts, COLUMNS=COLUMNS, P=32, num_warps=8 if d > 64 else 4, num_stages=1
        )  # fmt: skip
        weight_gradient_kernel[(weight_programs, 4)](
            rows, part, dweight, dbias, positions, **plan.products, P=block, num_warps=8 if d > 32 else 4, num_stages=2
        )
    dprojections = unfold(dweight.sum(0), x_proj_weight, dt_projs_weight, *plan.weights)
    dA = dA.sum((0, 2)).transpose(1, 2).flatten(1, 2)[:, :d, :state]
    return dx, *dprojections, dbias.sum(0)[:, :d].contiguous(), dA.reshape(A.shape), dD.sum(0)[:d].repeat(4)
