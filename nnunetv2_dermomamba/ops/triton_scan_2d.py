# mypy: disable-error-code="no-untyped-def"
"""The Triton scan of a map in four directions, channels last, with its dt, B and C projections: three ways by width.

Up to 16 channels the fused kernels of this file; up to 128 ``triton_scan_2d_rows``; more through the 1D scan.

The fused kernels write no direction's copy, no B, C or dt tensor and no state but one a chunk to device memory: a
program projects a block of positions into its own small scratch, walks it (``triton_common``) and adds into ``y``. The
backward pass walks a chunk forward again and keeps that chunk's states in the scratch. A direction and its reverse
share a program; row-major and column-major write two maps, so that sums need no atomics and repeat bit for bit. A
block's channels are one tile of the tensor cores: weights are loaded once a work item and their gradients stay in
registers.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunetv2_dermomamba.ops.composed import cross_merge, cross_scan
from nnunetv2_dermomamba.ops.triton_common import (
    BACKWARD_REGISTERS,
    MAX_BLOCK,
    ceil_div,
    chunk_count,
    combine,
    launch,
    load_decay,
    saved_index,
    softplus,
    softplus_slope,
    sum_over_segments,
    tile_for,
    turned_cells,
    walk_back,
    walk_index,
    walk_output,
    walk_states,
    walk_summary,
)
from nnunetv2_dermomamba.ops.triton_map import SMALL, dot, fold, load_map, load_turned, map_position, unfold
from nnunetv2_dermomamba.ops.triton_scan_1d import scan_1d_backward, scan_1d_forward, states_shape_1d
from nnunetv2_dermomamba.ops.triton_scan_2d_rows import rows_backward, rows_chunks, rows_forward

NARROW = 16
"""Channels up to which these kernels measured faster than those of ``triton_scan_2d_rows``: one tensor core's tile."""


@triton.jit
def _positions(
    q, j, length, padded, height, width, column, reverse,
    S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """Map positions of a sub-block's ``S SUB`` rows in a direction's own order, and which of them exist."""
    r = tl.arange(0, S * SUB)
    step = q * (S * T) + j * SUB + r // SUB * T + r % SUB
    path = tl.where(reverse > 0, padded - 1 - step, step)
    return map_position(path, height, width, column, IS_SMALL), path < length


@triton.jit
def _cells(col, per_segment: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr):
    """``turned_cells`` as ``[S SUB, columns]``: a ``tl.trans`` would hide from the compiler that steps are adjacent."""
    r = tl.arange(0, S * SUB)[:, None]
    return r // 4 % (SUB // 4) * (S * per_segment * 4) + (col[None, :] * S + r // SUB) * 4 + r % 4


@triton.jit
def _project(
    x_ptr, weight, m_weight, bias_ptr, delta_row, w_row, m_row, position, valid,
    d: tl.constexpr, DP: tl.constexpr, MP: tl.constexpr, KD: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Rows of delta and w = delta x, and of the ``MP`` projections by ``m_weight``, of one sub-block."""
    EXACT: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    k = tl.arange(0, DP)
    x = load_map(x_ptr, position, valid, tl.arange(0, KD), d)
    raw = dot(x, weight, tl.zeros([S * SUB, DP], tl.float32), A_EXACT=EXACT)
    projected = dot(x, m_weight, tl.zeros([S * SUB, MP], tl.float32), A_EXACT=EXACT)
    raw += tl.load(bias_ptr + k, mask=k < d, other=0.0)[None, :]
    delta = tl.where(valid[:, None] & (k < d)[None, :], softplus(raw), 0.0)
    cell = _cells(k, DP, S, SUB)
    tl.store(delta_row + cell, delta)
    tl.store(w_row + cell, delta * load_map(x_ptr, position, valid, k, d))
    tl.store(m_row + _cells(tl.arange(0, MP), MP, S, SUB), projected)


UNSPECIALIZED = ["items", "length", "padded", "height", "width", "per_map", "chunks"]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def summary_2d_kernel(
    x_ptr, dy_ptr, weight_ptr, bias_ptr, A_ptr, state_ptr, total_ptr, scratch_ptr,
    items, length, padded, height, width, per_map, chunks, d: tl.constexpr, N: tl.constexpr, ADJOINT: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr,
    KD: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """Summary of every chunk of all four directions, stored where its successor (ADJOINT: predecessor) will read it."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    v_row = delta_row + P * DP
    m_row = v_row + P * DP
    col = tl.arange(0, DP)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        direction = item % 4
        q = item // 4 % per_map
        batch = (item // 4 // per_map).to(tl.int64)
        weight = weight_ptr + direction * (KD + 2 * NP) * KD
        A2 = load_decay(A_ptr + direction * d * N, channel, n, d, N)
        state = tl.zeros_like(A2)
        total = channel * 0.0
        delta_weight = load_turned(weight, 0, DP, KD, KD)
        m_weight = load_turned(weight + (KD + NP if ADJOINT else KD) * KD, 0, NP, KD, KD)
        for step in range(T // SUB):
            j = T // SUB - 1 - step if ADJOINT else step
            position, valid = _positions(
                q, j, length, padded, height, width, direction % 2, direction // 2, S, T, SUB, IS_SMALL
            )
            _project(
                x_ptr + batch * length * d, delta_weight, m_weight, bias_ptr + direction * d,
                delta_row, v_row, m_row, position, valid, d, DP, NP, KD, S, SUB
            )  # fmt: skip
            if ADJOINT:
                tl.debug_barrier()
                dy = load_map(dy_ptr + batch * length * d, position, valid, col, d)
                tl.store(v_row + _cells(col, DP, S, SUB), dy)
            tl.debug_barrier()
            state, total = walk_summary(
                delta_row, v_row, m_row, state, total, A2, segment, channel, n, ADJOINT, DP, NP, S, SUB
            )
            tl.debug_barrier()
        chunk = q * S + segment + (-1 if ADJOINT else 1)
        keep = (chunk >= 0) & (chunk < chunks) & (channel < d)
        at = ((batch * 4 + direction) * chunks + chunk) * d + channel
        tl.store(total_ptr + at, total, mask=keep)
        tl.store(state_ptr + at * N + n, state, mask=keep & (n < N))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_2d_kernel(
    x_ptr, weight_ptr, bias_ptr, A_ptr, D_ptr, start_ptr, y_ptr, scratch_ptr,
    items, length, padded, height, width, per_map, chunks, d: tl.constexpr, N: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr,
    KD: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """A path and its reverse: ``y`` of the row-major paths, and of the column-major ones behind it."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    w_row = delta_row + P * DP
    bc_row = w_row + P * DP
    col = tl.arange(0, DP)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        batch = (item // 2 // per_map).to(tl.int64)
        column = item % 2
        x_map = x_ptr + batch * length * d
        y_map = y_ptr + (column * (items // 2 // per_map) + batch) * length * d
        for reverse in range(2):
            direction = column + 2 * reverse
            weight = weight_ptr + direction * (KD + 2 * NP) * KD
            q = item // 2 % per_map
            q = tl.where(reverse > 0, per_map - 1 - q, q)
            A2 = load_decay(A_ptr + direction * d * N, channel, n, d, N)
            skip = tl.load(D_ptr + direction * d + col, mask=col < d, other=0.0)
            entry = ((batch * 4 + direction) * chunks + q * S + segment) * d + channel
            h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
            delta_weight = load_turned(weight, 0, DP, KD, KD)
            bc_weight = load_turned(weight + KD * KD, 0, 2 * NP, KD, KD)
            for j in range(T // SUB):
                position, valid = _positions(q, j, length, padded, height, width, column, reverse, S, T, SUB, IS_SMALL)
                _project(
                    x_map, delta_weight, bc_weight, bias_ptr + direction * d,
                    delta_row, w_row, bc_row, position, valid, d, DP, 2 * NP, KD, S, SUB
                )  # fmt: skip
                tl.debug_barrier()
                h = walk_output(
                    delta_row, w_row, bc_row, None, h, A2, segment, channel, n, None, DP, NP, R, NN, S, SUB, HOLD, False
                )
                tl.debug_barrier()
                y = tl.load(w_row + _cells(col, DP, S, SUB))
                y += skip[None, :] * load_map(x_map, position, valid, col, d)
                target = y_map + position[:, None] * d + col[None, :]
                mask = valid[:, None] & (col < d)[None, :]
                y += tl.load(target, mask=mask & (position * 0 + reverse > 0)[:, None], other=0.0)
                tl.store(target, y, mask=mask)
                tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_2d_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, A_ptr, D_ptr, start_ptr, adjoint_ptr,
    dx_ptr, dweight_ptr, dbias_ptr, dA_ptr, dD_ptr, scratch_ptr,
    items, length, padded, height, width, per_map, chunks, d: tl.constexpr, N: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr,
    KD: tl.constexpr, IS_SMALL: tl.constexpr
):  # fmt: skip
    """A path and its reverse: ``dx`` likewise, and the program's own partial sums of the parameters' gradients.

    A chunk is walked forward first, which leaves its states in the scratch.
    """
    EXACT: tl.constexpr = x_ptr.dtype.element_ty != tl.float32
    P: tl.constexpr = S * SUB
    # Rows of a map's sub-block that one thread loads: their sum costs nothing, the rest waits for the item's end.
    OWN: tl.constexpr = SUB * R * NN // (4 * NP) if SUB * R * NN > 4 * NP else 1
    STATES: tl.constexpr = S * DP * NP
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (3 * DP + 4 * NP) + T // HOLD * STATES)
    w_row = delta_row + P * DP
    dy_row = w_row + P * DP
    bc_row = dy_row + P * DP
    dbc_row = bc_row + P * 2 * NP
    save = dbc_row + P * 2 * NP
    col = tl.arange(0, DP)
    m = tl.arange(0, 2 * NP)
    k = tl.arange(0, KD)
    cell = _cells(col, DP, S, SUB)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    saved = saved_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        batch = (item // 2 // per_map).to(tl.int64)
        column = item % 2
        x_map = x_ptr + batch * length * d
        dy_map = dy_ptr + batch * length * d
        dx_map = dx_ptr + (column * (items // 2 // per_map) + batch) * length * d
        for reverse in range(2):
            direction = column + 2 * reverse
            part = tl.program_id(0).to(tl.int64) * 4 + direction
            weight = weight_ptr + direction * (KD + 2 * NP) * KD
            dweight = dweight_ptr + part * ((KD + 2 * NP) * KD)
            q = item // 2 % per_map
            q = tl.where(reverse > 0, per_map - 1 - q, q)
            A2 = load_decay(A_ptr + direction * d * N, channel, n, d, N)
            skip = tl.load(D_ptr + direction * d + col, mask=col < d, other=0.0)
            entry = ((batch * 4 + direction) * chunks + q * S + segment) * d + channel
            h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
            g = tl.load(adjoint_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
            dA = tl.zeros_like(A2)
            dbias = tl.zeros([P // OWN, DP], tl.float32)
            dD = tl.zeros([P // OWN, DP], tl.float32)
            dw = tl.zeros([KD, KD], tl.float32)
            dm = tl.zeros([2 * NP, KD], tl.float32)
            delta_weight = load_turned(weight, 0, DP, KD, KD)
            b_weight = load_turned(weight + KD * KD, 0, NP, KD, KD)
            for j in range(T // SUB):
                position, valid = _positions(q, j, length, padded, height, width, column, reverse, S, T, SUB, IS_SMALL)
                _project(
                    x_map, delta_weight, b_weight, bias_ptr + direction * d,
                    delta_row, w_row, bc_row, position, valid, d, DP, NP, KD, S, SUB
                )  # fmt: skip
                tl.debug_barrier()
                h = walk_states(
                    delta_row, w_row, bc_row, save + j * (SUB // HOLD) * STATES, h, A2, segment, channel, n, saved,
                    DP, NP, S, SUB, HOLD
                )  # fmt: skip
                tl.debug_barrier()
            bc_weight = load_turned(weight + KD * KD, 0, 2 * NP, KD, KD)
            for back in range(T // SUB):
                j = T // SUB - 1 - back
                position, valid = _positions(q, j, length, padded, height, width, column, reverse, S, T, SUB, IS_SMALL)
                _project(
                    x_map, delta_weight, bc_weight, bias_ptr + direction * d,
                    delta_row, w_row, bc_row, position, valid, d, DP, 2 * NP, KD, S, SUB
                )  # fmt: skip
                tl.store(dy_row + cell, load_map(dy_map, position, valid, col, d))
                tl.debug_barrier()
                g, dA = walk_back(
                    delta_row, w_row, bc_row, dy_row, dbc_row, save + j * (SUB // HOLD) * STATES, g, dA, A2,
                    segment, channel, n, saved, DP, NP, R, NN, S, SUB, HOLD, False
                )  # fmt: skip
                tl.debug_barrier()

                # Gradients of the pre-activations over w, those of x that bypass the projections over dy.
                delta = tl.load(delta_row + cell)
                by_input = tl.load(w_row + cell)
                by_decay = tl.load(dy_row + cell)
                x = load_map(x_map, position, valid, col, d)
                dy = load_map(dy_map, position, valid, col, d)
                ddelta = tl.where(valid[:, None], (x * by_input + by_decay) * softplus_slope(delta), 0.0)
                dbias += tl.sum(ddelta.reshape(OWN, P // OWN, DP), axis=0)
                dD += tl.sum((dy * x).reshape(OWN, P // OWN, DP), axis=0)
                tl.store(w_row + cell, ddelta)
                tl.store(dy_row + cell, delta * by_input + skip[None, :] * dy)
                tl.debug_barrier()

                inside = (k < DP)[None, :]
                dx = tl.load(dy_row + _cells(k, DP, S, SUB), mask=inside, other=0.0)
                ddelta = tl.load(w_row + _cells(k, DP, S, SUB), mask=inside, other=0.0)
                dbc = tl.load(dbc_row + _cells(m, 2 * NP, S, SUB))
                dx = dot(ddelta, tl.load(weight + k[:, None] * KD + k[None, :]), dx)
                dx = dot(dbc, tl.load(weight + (KD + m)[:, None] * KD + k[None, :]), dx)
                dx_at = dx_map + position[:, None] * d + k[None, :]
                mask = valid[:, None] & (k < d)[None, :]
                dx += tl.load(dx_at, mask=mask & (position * 0 + reverse > 0)[:, None], other=0.0)
                tl.store(dx_at, dx, mask=mask)

                x = load_map(x_map, position, valid, k, d)
                turned = tl.load(w_row + turned_cells(k, DP, S, SUB), mask=(k < DP)[:, None], other=0.0)
                dw = dot(turned, x, dw, B_EXACT=EXACT)
                dm = dot(tl.load(dbc_row + turned_cells(m, 2 * NP, S, SUB)), x, dm, B_EXACT=EXACT)
                tl.debug_barrier()
            dw_at = dweight + k[:, None] * KD + k[None, :]
            dm_at = dweight + (KD + m)[:, None] * KD + k[None, :]
            tl.store(dw_at, tl.load(dw_at) + dw)
            tl.store(dm_at, tl.load(dm_at) + dm)
            dA, head, state = sum_over_segments(dA, DP, NP, R, NN, S)
            dA_at = dA_ptr + (part * DP + head) * NP + state
            tl.store(dA_at, tl.load(dA_at) + dA)
            total_at = part * DP + col
            tl.store(dbias_ptr + total_at, tl.load(dbias_ptr + total_at) + tl.sum(dbias, axis=0))
            tl.store(dD_ptr + total_at, tl.load(dD_ptr + total_at) + tl.sum(dD, axis=0))


class _Plan:
    """Sizes and constants of one call."""

    def __init__(self, batch: int, height: int, width: int, channels: int, state: int) -> None:
        self.length = height * width
        self.tile = tile_for(max(8, channels), max(16, state), self.length)  # what a tl.dot wants
        self.per_map = ceil_div(self.length, self.tile.span)
        self.chunks = chunk_count(self.length, self.tile)
        self.items = batch * self.per_map
        padded = self.per_map * self.tile.span
        self.sizes = (self.length, padded, height, width, self.per_map, self.chunks)
        self.weights = (NARROW, self.tile.NP)  # columns and rows of B (and of C) of a direction's folded weights
        self.constants = {
            **self.tile.constants(),
            "d": channels,
            "N": state,
            "KD": NARROW,
            "IS_SMALL": padded < SMALL,
        }


def _plan(x: Tensor, A: Tensor) -> _Plan:
    batch, height, width, d = x.shape
    return _Plan(batch, height, width, d, A.shape[1])


def states_shape_2d(x: Tensor, rank: int, state: int) -> list[int]:
    """Shape of ``states``: (batch, 4, chunks, d, state), what enters each chunk; the 1D scan's for wide maps."""
    batch, height, width, d = x.shape
    if d > MAX_BLOCK:
        return states_shape_1d(x.new_empty(batch, 4 * d, height * width), state, 4)
    chunks = rows_chunks(x, state) if d > NARROW else _Plan(batch, height, width, d, state).chunks
    return [batch, 4, chunks, d, state]


def _summaries(plan: _Plan, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, A: Tensor, adjoint: bool) -> Tensor:
    shape = (x.shape[0], 4, plan.chunks, x.shape[3], A.shape[1])
    if plan.chunks == 1:
        return A.new_zeros(shape)
    state, total = A.new_empty(shape), A.new_empty(shape[:4])
    tile, items = plan.tile, 4 * plan.items
    scratch, grid, options = launch(A, items, tile, tile.forward_scratch, tile.forward_registers)
    summary_2d_kernel[grid](
        x, dy, weight, bias, A, state, total, scratch, items, *plan.sizes, ADJOINT=adjoint, **plan.constants, **options
    )
    combine(state, total, A, 4, adjoint)
    return state


def scan_2d_forward(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Four-direction selective scan of a map with its projections, of contiguous tensors.

    Args:
        x: (B, H, W, d) map, channels last, float16, bfloat16 or float32.
        x_proj_weight: (4, R + 2 N, d): rows give dt (R), B (N) and C (N) of each direction; float32, as all below.
        dt_projs_weight: (4, d, R).
        dt_projs_bias: (4, d), added before the softplus.
        A: (4 d, N), negative.
        Ds: (4 d,).
        keep: whether a backward pass will want states.

    Returns:
        y (B, H, W, d) in float32, and the states that the backward pass starts from (``states_shape_2d``), or none.
    """
    d = x.shape[3]
    forward = _fused_forward if d <= NARROW else rows_forward if d <= MAX_BLOCK else _wide_forward
    with torch.cuda.device_of(x):
        y, states = forward(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    return y, states if keep else states.new_empty(0)


def scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``scan_2d_forward`` for ``dy`` (B, H, W, d).

    Returns:
        Gradients of x, x_proj_weight, dt_projs_weight, dt_projs_bias, A and Ds, all in float32.
    """
    d = x.shape[3]
    backward = _fused_backward if d <= NARROW else rows_backward if d <= MAX_BLOCK else _wide_backward
    with torch.cuda.device_of(x):
        return backward(dy, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, states)


def _fused_forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> tuple[Tensor, Tensor]:
    plan = _plan(x, A)
    tile = plan.tile
    y = A.new_empty(2, *x.shape)
    weight = fold(x_proj_weight, dt_projs_weight, *plan.weights)
    states = _summaries(plan, x, x, weight, dt_projs_bias, A, False)
    items = 2 * plan.items
    scratch, grid, options = launch(A, items, tile, tile.forward_scratch, tile.forward_registers)
    forward_2d_kernel[grid](
        x, weight, dt_projs_bias, A, Ds, states, y, scratch, items, *plan.sizes, **plan.constants, **options
    )
    return y[0] + y[1], states


def _fused_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(x, A)
    tile, d, state = plan.tile, x.shape[3], A.shape[1]
    dx = A.new_empty(2, *x.shape)
    weight = fold(x_proj_weight, dt_projs_weight, *plan.weights)
    adjoints = _summaries(plan, x, dy, weight, dt_projs_bias, A, True)
    items = 2 * plan.items
    floats = tile.backward_scratch + math.prod(tile.saved_states)
    scratch, grid, options = launch(A, items, tile, floats, BACKWARD_REGISTERS)
    widths = (weight[0].numel(), tile.DP, tile.DP * tile.NP, tile.DP)
    parts = [A.new_zeros(grid[0], 4, width) for width in widths]
    backward_2d_kernel[grid](
        dy, x, weight, dt_projs_bias, A, Ds, states, adjoints, dx, *parts, scratch,
        items, *plan.sizes, **plan.constants, **options
    )  # fmt: skip
    dweight, dbias, dA, dD = (part.sum(0) for part in parts)
    dprojections = unfold(dweight.view_as(weight), x_proj_weight, dt_projs_weight, *plan.weights)
    dA = dA.unflatten(1, (tile.DP, tile.NP))[:, :d, :state].flatten(0, 1).contiguous()
    return dx[0] + dx[1], *dprojections, dbias[:, :d].contiguous(), dA, dD[:, :d].flatten()


def _wide_inputs(x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, state: int) -> tuple[Tensor, ...]:
    """Direction copies, dt and 1D inputs of a map with more channels than a program holds."""
    rank = dt_projs_weight.shape[2]
    xs = cross_scan(x.float())
    dt, B, C = torch.einsum("bkdl,kcd->bkcl", xs, x_proj_weight).split([rank, state, state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_projs_weight)
    return xs, dt, delta.flatten(1, 2).contiguous(), B.contiguous(), C.contiguous()


def _wide_forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        xs, _, delta, B, C = _wide_inputs(x, x_proj_weight, dt_projs_weight, A.shape[1])
        y, states = scan_1d_forward(xs.flatten(1, 2), delta, A, B, C, Ds, dt_projs_bias.flatten(), True)
        return cross_merge(y.unflatten(1, xs.shape[1:3]), *x.shape[1:3]).contiguous(), states


def _wide_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        xs, dt, delta, B, C = _wide_inputs(x, x_proj_weight, dt_projs_weight, A.shape[1])
        dys = cross_scan(dy.float()).flatten(1, 2)
        du, ddelta, dA, dB, dC, dD, dbias = scan_1d_backward(
            dys, xs.flatten(1, 2), delta, A, B, C, Ds, dt_projs_bias.flatten(), True, states
        )
        ddelta = ddelta.unflatten(1, xs.shape[1:3])
        rows = torch.cat([torch.einsum("bkdl,kdr->bkrl", ddelta, dt_projs_weight), dB, dC], dim=2)
        dxs = du.unflatten(1, xs.shape[1:3]) + torch.einsum("bkcl,kcd->bkdl", rows, x_proj_weight)
        dx = cross_merge(dxs, *x.shape[1:3]).contiguous()
        dweight = torch.einsum("bkcl,bkdl->kcd", rows, xs)
        dlift = torch.einsum("bkdl,bkrl->kdr", ddelta, dt)
        return dx, dweight, dlift, dbias.view_as(dt_projs_bias), dA, dD
