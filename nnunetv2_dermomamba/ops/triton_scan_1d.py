# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the 1D selective scan, mamba-ssm's op.

A work item is ``S`` adjacent chunks of one (sample, group, block of channels). Its program brings a sub-block of every
row (a channel's or a state's ``SUB`` positions) into its scratch, in whole sectors and once, and walks it there: read
by the walk itself, rows a sequence apart would cost a line of cache for every 16 bytes.
See ``triton_common`` for the walk, ``docs/selective_scan.md`` for the floor and the measured times.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

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
    walk_summary,
)

UNSPECIALIZED = ["items", "per_row", "chunks"]


@triton.jit
def _load(ptr, row, rows, position, length, EXACT: tl.constexpr):
    """``[rows, positions]`` in float32, 0 where there is nothing. EXACT: that is nowhere, so nothing is compared."""
    at = row[:, None] * length + position[None, :]
    if EXACT:
        return tl.load(ptr + at).to(tl.float32)
    return tl.load(ptr + at, mask=(row < rows)[:, None] & (position < length)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, row, rows, position, length, value, EXACT: tl.constexpr):
    at = row[:, None] * length + position[None, :]
    if EXACT:
        tl.store(ptr + at, value)
    else:
        tl.store(ptr + at, value, mask=(row < rows)[:, None] & (position < length)[None, :])


@triton.jit
def _step_sizes(delta_ptr, bias, k, d, position, length, SOFTPLUS: tl.constexpr, EXACT: tl.constexpr):
    """``softplus(delta + bias)``, ``[channels, positions]``; 0, a step that changes nothing, where there is none."""
    delta = _load(delta_ptr, k, d, position, length, EXACT) + bias[:, None]
    if SOFTPLUS:
        delta = softplus(delta)
    if not EXACT:
        delta = tl.where((k < d)[:, None] & (position < length)[None, :], delta, 0.0)
    return delta


@triton.jit
def _bias(bias_ptr, first, k, d, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias_ptr + first + k, mask=k < d, other=0.0)
    return k * 0.0


@triton.jit
def _unpack(item, per_row, blocks, group_dim, groups, DP: tl.constexpr):
    """Position block, block of channels, (sample, group), sample, first channel and number of channels of an item."""
    q = item % per_row
    block = item // per_row % blocks
    sequence = item // per_row // blocks
    batch = (sequence // groups).to(tl.int64)
    first = sequence % groups * group_dim + block * DP
    return q, block, sequence.to(tl.int64), batch, first, tl.minimum(DP, group_dim - block * DP)


@triton.jit
def _positions(q, j, S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr):
    """Positions of a sub-block's ``S SUB`` rows."""
    r = tl.arange(0, S * SUB)
    return q * (S * T) + j * SUB + r // SUB * T + r % SUB


@triton.jit(do_not_specialize=UNSPECIALIZED)
def summary_kernel(
    v_ptr, delta_ptr, bias_ptr, A_ptr, M_ptr, state_ptr, total_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, per_row, chunks, ADJOINT: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Summary of every chunk, stored where its successor (ADJOINT: predecessor) will read it.

    ``v`` is u, ``M`` is B; ADJOINT: dy and C.
    """
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    v_row = delta_row + P * DP
    m_row = v_row + P * DP
    k = tl.arange(0, DP)
    m = tl.arange(0, NP)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, _, sequence, batch, first, d = _unpack(item, per_row, blocks, group_dim, groups, DP)
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        base = (batch * dim + first) * length
        m_base = sequence * N * length
        bias = _bias(bias_ptr, first, k, d, HAS_BIAS)
        state = tl.zeros_like(A2)
        total = channel * 0.0
        for step in range(T // SUB):
            position = _positions(q, T // SUB - 1 - step if ADJOINT else step, S, T, SUB)
            delta = _step_sizes(delta_ptr + base, bias, k, d, position, length, SOFTPLUS, EXACT)
            v = _load(v_ptr + base, k, d, position, length, EXACT)
            b = _load(M_ptr + m_base, m, N, position, length, EXACT)
            tl.store(delta_row + turned_cells(k, DP, S, SUB), delta)
            tl.store(v_row + turned_cells(k, DP, S, SUB), v if ADJOINT else delta * v)
            tl.store(m_row + turned_cells(m, NP, S, SUB), b)
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


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    u_ptr, delta_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, start_ptr, saved_ptr, y_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, per_row, chunks, HAS_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """``y`` from the states that enter the chunks; saves the states before every ``HOLD`` positions."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    w_row = delta_row + P * DP
    bc_row = w_row + P * DP
    k = tl.arange(0, DP)
    m = tl.arange(0, NP)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    saved = saved_index(DP, NP, R, NN, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, block, sequence, batch, first, d = _unpack(item, per_row, blocks, group_dim, groups, DP)
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        base = (batch * dim + first) * length
        m_base = sequence * N * length
        bias = _bias(bias_ptr, first, k, d, HAS_BIAS)
        if HAS_D:
            skip = tl.load(D_ptr + first + k, mask=k < d, other=0.0)
        entry = (batch * chunks + q * S + segment) * dim + first + channel
        h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
        save = saved_ptr + ((sequence * blocks + block) * per_row + q) * (T // HOLD) * (S * DP * NP)
        for j in range(T // SUB):
            position = _positions(q, j, S, T, SUB)
            delta = _step_sizes(delta_ptr + base, bias, k, d, position, length, SOFTPLUS, EXACT)
            u = _load(u_ptr + base, k, d, position, length, EXACT)
            b = _load(B_ptr + m_base, m, N, position, length, EXACT)
            c = _load(C_ptr + m_base, m, N, position, length, EXACT)
            tl.store(delta_row + turned_cells(k, DP, S, SUB), delta)
            tl.store(w_row + turned_cells(k, DP, S, SUB), delta * u)
            tl.store(bc_row + turned_cells(m, 2 * NP, S, SUB), b)
            tl.store(bc_row + NP * S * 4 + turned_cells(m, 2 * NP, S, SUB), c)
            tl.debug_barrier()
            h = walk_output(
                delta_row, w_row, bc_row, save + j * (SUB // HOLD) * (S * DP * NP), h, A2, segment, channel, n,
                saved, DP, NP, R, NN, S, SUB, HOLD, True
            )  # fmt: skip
            tl.debug_barrier()
            y = tl.load(w_row + turned_cells(k, DP, S, SUB))
            if HAS_D:
                y += skip[:, None] * u
            _store(y_ptr + base, k, d, position, length, y, EXACT)
            tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def backward_kernel(
    dy_ptr, u_ptr, delta_ptr, bias_ptr, A_ptr, B_ptr, C_ptr, D_ptr, saved_ptr, adjoint_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, per_row, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Gradients from the saved states and the adjoints that enter the chunks.

    Those of A, D and the bias are partial, one row a (sample, position block); those of B and C one a block of
    channels.
    """
    P: tl.constexpr = S * SUB
    PARTS: tl.constexpr = DP // R // 8 if DP // R > 8 else 1
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (3 * DP + 2 * NP + PARTS * 2 * NP))
    w_row = delta_row + P * DP
    dy_row = w_row + P * DP
    bc_row = dy_row + P * DP
    dbc_row = bc_row + P * 2 * NP
    k = tl.arange(0, DP)
    m = tl.arange(0, NP)
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    saved = saved_index(DP, NP, R, NN, S)
    sequences = (items // per_row // blocks).to(tl.int64)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, block, sequence, batch, first, d = _unpack(item, per_row, blocks, group_dim, groups, DP)
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        base = (batch * dim + first) * length
        m_base = sequence * N * length
        dm_base = (block * sequences + sequence) * N * length
        bias = _bias(bias_ptr, first, k, d, HAS_BIAS)
        if HAS_D:
            skip = tl.load(D_ptr + first + k, mask=k < d, other=0.0)
        entry = (batch * chunks + q * S + segment) * dim + first + channel
        g = tl.load(adjoint_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
        save = saved_ptr + ((sequence * blocks + block) * per_row + q) * (T // HOLD) * (S * DP * NP)
        dA = tl.zeros_like(A2)
        dD = tl.zeros([DP], tl.float32)
        dbias = tl.zeros([DP], tl.float32)
        for back in range(T // SUB):
            j = T // SUB - 1 - back
            position = _positions(q, j, S, T, SUB)
            delta = _step_sizes(delta_ptr + base, bias, k, d, position, length, SOFTPLUS, EXACT)
            u = _load(u_ptr + base, k, d, position, length, EXACT)
            b = _load(B_ptr + m_base, m, N, position, length, EXACT)
            c = _load(C_ptr + m_base, m, N, position, length, EXACT)
            dy = _load(dy_ptr + base, k, d, position, length, EXACT)
            tl.store(delta_row + turned_cells(k, DP, S, SUB), delta)
            tl.store(w_row + turned_cells(k, DP, S, SUB), delta * u)
            tl.store(dy_row + turned_cells(k, DP, S, SUB), dy)
            tl.store(bc_row + turned_cells(m, 2 * NP, S, SUB), b)
            tl.store(bc_row + NP * S * 4 + turned_cells(m, 2 * NP, S, SUB), c)
            tl.debug_barrier()
            g, dA = walk_back(
                delta_row, w_row, bc_row, dy_row, dbc_row, save + j * (SUB // HOLD) * (S * DP * NP), g, dA, A2,
                segment, channel, n, saved, DP, NP, R, NN, S, SUB, HOLD, True
            )  # fmt: skip
            tl.debug_barrier()
            delta = tl.load(delta_row + turned_cells(k, DP, S, SUB))
            by_input = tl.load(w_row + turned_cells(k, DP, S, SUB))
            by_decay = tl.load(dy_row + turned_cells(k, DP, S, SUB))
            u = _load(u_ptr + base, k, d, position, length, EXACT)
            du = delta * by_input
            if HAS_D:
                dy = _load(dy_ptr + base, k, d, position, length, EXACT)
                du += skip[:, None] * dy
                dD += tl.sum(dy * u, axis=1)
            ddelta = u * by_input + by_decay
            if SOFTPLUS:
                ddelta *= softplus_slope(delta)
            if HAS_BIAS:
                if not EXACT:
                    ddelta = tl.where((position < length)[None, :], ddelta, 0.0)
                dbias += tl.sum(ddelta, axis=1)
            _store(du_ptr + base, k, d, position, length, du, EXACT)
            _store(ddelta_ptr + base, k, d, position, length, ddelta, EXACT)
            db = tl.zeros([NP, P], tl.float32)
            dc = tl.zeros([NP, P], tl.float32)
            for i in tl.static_range(PARTS):
                part = dbc_row + i * (2 * NP * S * 4) + turned_cells(m, PARTS * 2 * NP, S, SUB)
                db += tl.load(part)
                dc += tl.load(part + NP * S * 4)
            _store(dB_ptr + dm_base, m, N, position, length, db, EXACT)
            _store(dC_ptr + dm_base, m, N, position, length, dc, EXACT)
            tl.debug_barrier()
        part = batch * per_row + q
        dA, head, state = sum_over_segments(dA, DP, NP, R, NN, S)
        tl.store(dA_ptr + (part * dim + first + head) * N + state, dA, mask=(head < d) & (state < N))
        if HAS_D:
            tl.store(dD_ptr + part * dim + first + k, dD, mask=k < d)
        if HAS_BIAS:
            tl.store(dbias_ptr + part * dim + first + k, dbias, mask=k < d)


class _Plan:
    """Sizes and constants of one call, in the order in which every kernel takes them."""

    def __init__(self, batch: int, dim: int, length: int, groups: int, state: int) -> None:
        group_dim = dim // groups
        self.tile = tile_for(min(group_dim, MAX_BLOCK), state, length, stretch=2)
        self.blocks = ceil_div(group_dim, self.tile.DP)
        self.per_row = ceil_div(length, self.tile.span)
        self.chunks = chunk_count(length, self.tile)
        self.items = batch * groups * self.blocks * self.per_row
        self.sizes = (self.items, length, dim, group_dim, state, groups, self.blocks, self.per_row, self.chunks)
        if max(self.tile.DP, self.tile.NP) * self.per_row * self.tile.span >= 2**31:  # offsets have 32 bits
            raise ValueError(
                f"a sequence of {length} positions is too long for the triton backend at {group_dim} channels a group; "
                "choose another: backend='mamba-ssm' or 'torch'"
            )
        whole = length % self.tile.span == 0 and group_dim % self.tile.DP == 0 and state == self.tile.NP
        self.constants = {**self.tile.constants(), "EXACT": whole}


def _plan(u: Tensor, B: Tensor) -> _Plan:
    return _Plan(u.shape[0], u.shape[1], u.shape[2], B.shape[1], B.shape[2])


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (work items, points in time, states)."""
    batch, dim, length = u.shape
    plan = _Plan(batch, dim, length, groups, state)
    return [plan.items, *plan.tile.saved_states]


def _summaries(
    v: Tensor, delta: Tensor, bias: Tensor | None, A: Tensor, M: Tensor, softplus: bool, adjoint: bool
) -> Tensor:
    plan = _plan(delta, M)
    tile = plan.tile
    shape = (delta.shape[0], plan.chunks, *A.shape)
    if plan.chunks == 1:
        return A.new_zeros(shape)
    state, total = A.new_empty(shape), A.new_empty(shape[:3])
    scratch, grid, options = launch(A, plan.items, tile, tile.forward_scratch, tile.forward_registers)
    summary_kernel[grid](
        v, delta, bias, A, M, state, total, scratch, *plan.sizes,
        ADJOINT=adjoint, HAS_BIAS=bias is not None, SOFTPLUS=softplus, **plan.constants, **options
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
        starts = _summaries(u, delta, delta_bias, A, B, delta_softplus, False)
        states = A.new_empty(states_shape_1d(u, A.shape[1], B.shape[1]))
        scratch, grid, options = launch(A, plan.items, tile, tile.forward_scratch, tile.forward_registers)
        forward_kernel[grid](
            u, delta, delta_bias, A, B, C, D, starts, states, y, scratch, *plan.sizes,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, **plan.constants, **options
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
        adjoints = _summaries(dy, delta, delta_bias, A, C, delta_softplus, True)
        du, ddelta = (torch.empty_like(u, dtype=torch.float32) for _ in range(2))
        dA = A.new_empty(parts, *A.shape)
        dB, dC = (A.new_empty(plan.blocks, *B.shape) for _ in range(2))
        dD = None if D is None else A.new_empty(parts, dim)
        dbias = None if delta_bias is None else A.new_empty(parts, dim)
        scratch, grid, options = launch(A, plan.items, tile, tile.backward_scratch, BACKWARD_REGISTERS)
        backward_kernel[grid](
            dy, u, delta, delta_bias, A, B, C, D, states, adjoints, du, ddelta, dA, dB, dC, dD, dbias, scratch,
            *plan.sizes,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, **plan.constants, **options
        )  # fmt: skip
        missing = A.new_zeros(1, dim)
    dB, dC = (m[0] if len(m) == 1 else m.sum(0) for m in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, *((missing if m is None else m).sum(0) for m in (dD, dbias))
