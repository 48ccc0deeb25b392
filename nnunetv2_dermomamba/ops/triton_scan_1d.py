# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the 1D selective scan, mamba-ssm's op: three forward launches, three backward.

Each tensor is read once per launch in its own layout, time fastest, which is also that of the walk's rows.
See ``triton_common`` for the walk, ``docs/selective_scan.md`` for the floor and the measured times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunetv2_dermomamba.ops.triton_common import (
    BACKWARD_REGISTERS,
    FORWARD_REGISTERS,
    MAX_BLOCK,
    Tile,
    ceil_div,
    cells,
    chunk_count,
    combine,
    launch,
    load_decay,
    saved_index,
    softplus,
    softplus_slope,
    sum_over_segments,
    tile_for,
    walk_back,
    walk_index,
    walk_output,
    walk_summary,
)


@triton.jit
def _item(item, programs_per_row, blocks, group_dim, DP: tl.constexpr):
    """(batch, group, block of channels, first channel, channels) and the position block of a work item."""
    q = item % programs_per_row
    rest = item // programs_per_row
    block = rest % blocks
    return q, block, rest // blocks, block * DP, tl.minimum(DP, group_dim - block * DP)


@triton.jit
def _sub_block(q, j, rows: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr):
    """Index of each of ``rows S`` rows, the segments of one side by side, and positions ``[rows S, SUB]``."""
    row = tl.arange(0, rows * S)
    position = (q * (S * T) + j * SUB + row % S * T)[:, None] + tl.arange(0, SUB)[None, :]
    return row // S, position


@triton.jit
def _load_delta(delta_ptr, bias_ptr, channel, at, mask, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    delta = tl.load(delta_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(bias_ptr + channel)[:, None]
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(mask, delta, 0.0)


@triton.jit
def _copy_states(
    source_ptr, row_ptr, base, length, N, q, j,
    per_segment: tl.constexpr, NP: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """B or C of a sub-block, (N, length) in memory, to its rows of the scratch."""
    n, position = _sub_block(q, j, NP, S, T, SUB)
    mask = (n < N)[:, None] & (position < length)
    tile = tl.load(source_ptr + base + n.to(tl.int64)[:, None] * length + position, mask=mask, other=0.0)
    cell = cells(tl.arange(0, NP * S)[:, None], tl.arange(0, SUB)[None, :], S * per_segment)
    tl.store(row_ptr + cell, tile.to(tl.float32))


@triton.jit(do_not_specialize=["items", "chunks", "programs_per_row"])
def summary_kernel(
    v_ptr, delta_ptr, A_ptr, M_ptr, bias_ptr, state_ptr, total_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, programs_per_row, chunks,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """Summary of every chunk, stored where its successor (ADJOINT: predecessor) will read it."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    v_row = delta_row + P * DP
    m_row = v_row + P * DP
    cell = cells(tl.arange(0, DP * S)[:, None], tl.arange(0, SUB)[None, :], DP * S)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, _, row, first, d = _item(item, programs_per_row, blocks, group_dim, DP)
        batch = (row // groups).to(tl.int64)
        first += (row % groups) * group_dim
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        state = tl.zeros_like(A2)
        total = channel * 0.0
        for step in range(T // SUB):
            j = T // SUB - 1 - step if ADJOINT else step
            c, position = _sub_block(q, j, DP, S, T, SUB)
            mask = (c < d)[:, None] & (position < length)
            at = (batch * dim + first + c)[:, None] * length + position
            delta = _load_delta(delta_ptr, bias_ptr, first + tl.minimum(c, d - 1), at, mask, HAS_BIAS, SOFTPLUS)
            v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
            if not ADJOINT:
                v *= delta
            tl.store(delta_row + cell, delta)
            tl.store(v_row + cell, v)
            _copy_states(M_ptr, m_row, row.to(tl.int64) * N * length, length, N, q, j, NP, NP, S, T, SUB)
            tl.debug_barrier()
            state, total = walk_summary(
                delta_row, v_row, m_row, state, total, A2, segment, channel, n, ADJOINT, DP, NP, S, SUB
            )
            tl.debug_barrier()
        chunk = q * S + segment + (-1 if ADJOINT else 1)
        keep = (chunk >= 0) & (chunk < chunks) & (channel < d)
        entry = (batch * chunks + chunk) * dim + first + channel
        tl.store(total_ptr + entry, total, mask=keep)
        tl.store(state_ptr + entry * N + n, state, mask=keep & (n < N))


@triton.jit(do_not_specialize=["items", "chunks", "programs_per_row"])
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, start_ptr, saved_ptr, y_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, programs_per_row, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """``y`` from the states that enter the chunks."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    w_row = delta_row + P * DP
    bc_row = w_row + P * DP
    cell = cells(tl.arange(0, DP * S)[:, None], tl.arange(0, SUB)[None, :], DP * S)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    saved = saved_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, block, row, first, d = _item(item, programs_per_row, blocks, group_dim, DP)
        batch = (row // groups).to(tl.int64)
        first += (row % groups) * group_dim
        place = (row.to(tl.int64) * blocks + block) * programs_per_row + q
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        entry = (batch * chunks + q * S + segment) * dim + first + channel
        h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
        for j in range(T // SUB):
            c, position = _sub_block(q, j, DP, S, T, SUB)
            mask = (c < d)[:, None] & (position < length)
            at = (batch * dim + first + c)[:, None] * length + position
            delta = _load_delta(delta_ptr, bias_ptr, first + tl.minimum(c, d - 1), at, mask, HAS_BIAS, SOFTPLUS)
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(delta_row + cell, delta)
            tl.store(w_row + cell, delta * u)
            _copy_states(B_ptr, bc_row, row.to(tl.int64) * N * length, length, N, q, j, 2 * NP, NP, S, T, SUB)
            _copy_states(
                C_ptr, bc_row + NP * S * 4, row.to(tl.int64) * N * length, length, N, q, j, 2 * NP, NP, S, T, SUB
            )
            tl.debug_barrier()
            save = saved_ptr + (place * (T // HOLD) + j * (SUB // HOLD)) * (S * DP * NP)
            h = walk_output(
                delta_row, w_row, bc_row, save, h, A2, segment, channel, n, saved, DP, NP, R, NN, S, SUB, HOLD
            )
            tl.debug_barrier()
            y = tl.load(w_row + cell)
            if HAS_D:
                y += tl.load(D_ptr + first + c, mask=c < d, other=0.0)[:, None] * u
            tl.store(y_ptr + at, y, mask=mask)
            tl.debug_barrier()


@triton.jit(do_not_specialize=["items", "chunks", "programs_per_row"])
def backward_kernel(
    dy_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, saved_ptr, adjoint_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, programs_per_row, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """Gradients from the saved states and the adjoints that enter the chunks.

    Those of A, D and the bias are partial, one row a (batch, position block); those of B and C one a block of channels.
    """
    P: tl.constexpr = S * SUB
    PARTS: tl.constexpr = DP // R // 8 if DP // R > 8 else 1
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (3 * DP + 2 * NP + PARTS * 2 * NP))
    w_row = delta_row + P * DP
    dy_row = w_row + P * DP
    bc_row = dy_row + P * DP
    dbc_row = bc_row + P * 2 * NP
    cell = cells(tl.arange(0, DP * S)[:, None], tl.arange(0, SUB)[None, :], DP * S)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    saved = saved_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, block, row, first, d = _item(item, programs_per_row, blocks, group_dim, DP)
        batch = (row // groups).to(tl.int64)
        first += (row % groups) * group_dim
        place = (row.to(tl.int64) * blocks + block) * programs_per_row + q
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        entry = (batch * chunks + q * S + segment) * dim + first + channel
        g = tl.load(adjoint_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
        dA = tl.zeros_like(A2)
        dD = tl.zeros([S * DP], tl.float32)
        dbias = tl.zeros([S * DP], tl.float32)
        for back in range(T // SUB):
            j = T // SUB - 1 - back
            c, position = _sub_block(q, j, DP, S, T, SUB)
            mask = (c < d)[:, None] & (position < length)
            at = (batch * dim + first + c)[:, None] * length + position
            delta = _load_delta(delta_ptr, bias_ptr, first + tl.minimum(c, d - 1), at, mask, HAS_BIAS, SOFTPLUS)
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(delta_row + cell, delta)
            tl.store(w_row + cell, delta * u)
            tl.store(dy_row + cell, dy)
            _copy_states(B_ptr, bc_row, row.to(tl.int64) * N * length, length, N, q, j, 2 * NP, NP, S, T, SUB)
            _copy_states(
                C_ptr, bc_row + NP * S * 4, row.to(tl.int64) * N * length, length, N, q, j, 2 * NP, NP, S, T, SUB
            )
            tl.debug_barrier()
            save = saved_ptr + (place * (T // HOLD) + j * (SUB // HOLD)) * (S * DP * NP)
            g, dA = walk_back(
                delta_row, w_row, bc_row, dy_row, dbc_row, save, g, dA, A2, segment, channel, n, saved,
                DP, NP, R, NN, S, SUB, HOLD
            )  # fmt: skip
            tl.debug_barrier()
            delta = tl.load(delta_row + cell)
            by_input = tl.load(w_row + cell)
            by_decay = tl.load(dy_row + cell)
            u = tl.load(u_ptr + at, mask=mask, other=0.0).to(tl.float32)
            du = delta * by_input
            if HAS_D:
                dy = tl.load(dy_ptr + at, mask=mask, other=0.0).to(tl.float32)
                du += tl.load(D_ptr + first + c, mask=c < d, other=0.0)[:, None] * dy
                dD += tl.sum(dy * u, axis=1)
            ddelta = u * by_input + by_decay
            if SOFTPLUS:
                ddelta *= softplus_slope(delta)
            if HAS_BIAS:
                dbias += tl.sum(tl.where(mask, ddelta, 0.0), axis=1)
            tl.store(du_ptr + at, du, mask=mask)
            tl.store(ddelta_ptr + at, ddelta, mask=mask)
            m, bc_position = _sub_block(q, j, NP, S, T, SUB)
            part_cell = cells(tl.arange(0, NP * S)[:, None], tl.arange(0, SUB)[None, :], PARTS * 2 * NP * S)
            db = tl.zeros([S * NP, SUB], tl.float32)
            dc = tl.zeros([S * NP, SUB], tl.float32)
            for i in tl.static_range(PARTS):
                db += tl.load(dbc_row + i * (2 * NP * S * 4) + part_cell)
                dc += tl.load(dbc_row + (i * 2 + 1) * (NP * S * 4) + part_cell)
            sequences = (items // programs_per_row // blocks).to(tl.int64)
            bc_at = ((block * sequences + row) * N + m)[:, None] * length + bc_position
            bc_mask = (m < N)[:, None] & (bc_position < length)
            tl.store(dB_ptr + bc_at, db, mask=bc_mask)
            tl.store(dC_ptr + bc_at, dc, mask=bc_mask)
            tl.debug_barrier()
        part = batch * programs_per_row + q
        dA, head, state = sum_over_segments(dA, DP, NP, R, NN, S)
        tl.store(dA_ptr + (part * dim + first + head) * N + state, dA, mask=(head < d) & (state < N))
        head = tl.arange(0, DP)
        if HAS_D:
            dD = tl.sum(tl.reshape(dD, [DP, S]), axis=1)
            tl.store(dD_ptr + part * dim + first + head, dD, mask=head < d)
        if HAS_BIAS:
            dbias = tl.sum(tl.reshape(dbias, [DP, S]), axis=1)
            tl.store(dbias_ptr + part * dim + first + head, dbias, mask=head < d)


class _Plan:
    """Sizes of one call, in the order in which every kernel takes them."""

    def __init__(self, batch: int, dim: int, length: int, groups: int, state: int) -> None:
        self.group_dim = dim // groups
        self.tile: Tile = tile_for(min(self.group_dim, MAX_BLOCK), state, length)
        self.blocks = ceil_div(self.group_dim, self.tile.DP)
        self.per_row = ceil_div(length, self.tile.span)
        self.chunks = chunk_count(length, self.tile)
        self.items = batch * groups * self.blocks * self.per_row
        sizes = (self.items, length, dim, self.group_dim, state, groups, self.blocks, self.per_row, self.chunks)
        self.sizes = sizes


def _plan(u: Tensor, B: Tensor) -> _Plan:
    return _Plan(u.shape[0], u.shape[1], u.shape[2], B.shape[1], B.shape[2])


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (work items, points in time, states)."""
    batch, dim, length = u.shape
    plan = _Plan(batch, dim, length, groups, state)
    return [plan.items, *plan.tile.saved_states]


def _summaries(
    v: Tensor, delta: Tensor, A: Tensor, M: Tensor, bias: Tensor | None, softplus: bool, adjoint: bool
) -> Tensor:
    plan, tile = _plan(delta, M), _plan(delta, M).tile
    batch, dim, _ = delta.shape
    shape = (batch, plan.chunks, dim, A.shape[1])
    if plan.chunks == 1:
        return A.new_zeros(shape)
    state = A.new_empty(shape)
    total = A.new_empty(shape[:3])
    scratch, grid, options = launch(A, plan.items, tile, tile.forward_scratch, FORWARD_REGISTERS)
    summary_kernel[grid](
        v, delta, A, M, bias, state, total, scratch, *plan.sizes,
        HAS_BIAS=bias is not None, SOFTPLUS=softplus, ADJOINT=adjoint, **tile.constants(), **options
    )  # fmt: skip
    combine(state, total, A, 1, adjoint)
    return state


def scan_1d_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """1D selective scan of contiguous tensors.

    Args:
        u: (batch, dim, length), float16, bfloat16 or float32.
        delta: as ``u``.
        A: (dim, state), float32.
        B: (batch, groups, state, length), types as ``u``.
        C: as ``B``.
        D: (dim,) float32, or None.
        delta_bias: (dim,) float32, or None.
        delta_softplus: whether ``softplus`` follows the bias.

    Returns:
        y (batch, dim, length) in float32, and the states saved for the backward pass (``states_shape_1d``).
    """
    plan, tile = _plan(u, B), _plan(u, B).tile
    y = torch.empty_like(u, dtype=torch.float32)
    with torch.cuda.device_of(u):
        starts = _summaries(u, delta, A, B, delta_bias, delta_softplus, False)
        states = A.new_empty(states_shape_1d(u, A.shape[1], B.shape[1]))
        scratch, grid, options = launch(A, plan.items, tile, tile.forward_scratch, FORWARD_REGISTERS)
        forward_kernel[grid](
            u, delta, A, B, C, D, delta_bias, starts, states, y, scratch, *plan.sizes,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, **tile.constants(), **options
        )  # fmt: skip
    return y, states


def scan_1d_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``scan_1d_forward`` for ``dy`` (batch, dim, length).

    Returns:
        Gradients of u, delta, A, B, C, D and delta_bias in float32; zeros for a D or delta_bias of None.
    """
    plan, tile = _plan(u, B), _plan(u, B).tile
    batch, dim, _ = u.shape
    parts = batch * plan.per_row
    with torch.cuda.device_of(u):
        adjoints = _summaries(dy, delta, A, C, delta_bias, delta_softplus, True)
        du, ddelta = (torch.empty_like(u, dtype=torch.float32) for _ in range(2))
        dA = A.new_empty(parts, *A.shape)
        dB, dC = (A.new_empty(plan.blocks, *B.shape) for _ in range(2))
        dD = None if D is None else A.new_empty(parts, dim)
        dbias = None if delta_bias is None else A.new_empty(parts, dim)
        scratch, grid, options = launch(A, plan.items, tile, tile.backward_scratch, BACKWARD_REGISTERS)
        backward_kernel[grid](
            dy, u, delta, A, B, C, D, delta_bias, states, adjoints,
            du, ddelta, dA, dB, dC, dD, dbias, scratch, *plan.sizes,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, **tile.constants(), **options
        )  # fmt: skip
        missing = A.new_zeros(1, dim)
    dB, dC = (m[0] if plan.blocks == 1 else m.sum(0) for m in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, *((missing if m is None else m).sum(0) for m in (dD, dbias))
