# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the 1D selective scan, mamba-ssm's op: three forward launches, three backward.

Each tensor is read once per launch in its own layout (position fastest) and transposed into the walk's rows on the way.
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
    Tile,
    ceil_div,
    chunk_count,
    combine,
    launch,
    load_decay,
    softplus,
    softplus_slope,
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
def _load_delta(delta_ptr, bias_ptr, base, c, position, channel, mask, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr):
    delta = tl.load(delta_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(bias_ptr + channel, mask=c, other=0.0)[:, None]
    if SOFTPLUS:
        delta = softplus(delta)
    return tl.where(mask, delta, 0.0)


@triton.jit
def _copy_rows(source_ptr, row_ptr, base, length, N, position, P: tl.constexpr, NP: tl.constexpr):
    """B or C of ``P`` positions, (N, length) in memory, to rows."""
    p = tl.arange(0, P)
    n = tl.arange(0, NP)
    mask = (n < N)[:, None] & (position < length)[None, :]
    tile = tl.load(source_ptr + base + n.to(tl.int64)[:, None] * length + position[None, :], mask=mask, other=0.0)
    tl.store(row_ptr + p[:, None] * (2 * NP) + n[None, :], tl.trans(tile.to(tl.float32)))


@triton.jit
def summary_kernel(
    v_ptr, delta_ptr, A_ptr, M_ptr, bias_ptr, state_ptr, total_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, programs_per_row, chunks,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, ADJOINT: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Summary of every chunk, stored where its successor (ADJOINT: predecessor) will read it."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    v_row = delta_row + P * DP
    m_row = v_row + P * DP
    p = tl.arange(0, P)
    cc = tl.arange(0, DP)
    channel, segment, n = walk_index(DP, NP, R, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, _, row, first, d = _item(item, programs_per_row, blocks, group_dim, DP)
        batch = (row // groups).to(tl.int64)
        first += (row % groups) * group_dim
        c = cc < d
        base = (batch * dim + first + cc)[:, None] * length
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        state = tl.zeros_like(A2)
        total = channel * 0.0
        for j in range(T // SUB):
            at_p = q * (S * T) + p // SUB * T + p % SUB + (T // SUB - 1 - j if ADJOINT else j) * SUB
            mask = c[:, None] & (at_p < length)[None, :]
            position = at_p[None, :]
            delta = _load_delta(delta_ptr, bias_ptr, base, c, position, first + cc, mask, HAS_BIAS, SOFTPLUS)
            v = tl.load(v_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
            if not ADJOINT:
                v *= delta
            tl.store(delta_row + p[:, None] * DP + cc[None, :], tl.trans(delta))
            tl.store(v_row + p[:, None] * DP + cc[None, :], tl.trans(v))
            _copy_rows(M_ptr, m_row, row.to(tl.int64) * N * length, length, N, at_p, P, NP)
            tl.debug_barrier()
            state, total = walk_summary(
                delta_row, v_row, m_row, state, total, A2, channel, segment, n, ADJOINT, DP, NP, SUB
            )
            tl.debug_barrier()
        chunk = q * S + segment + (-1 if ADJOINT else 1)
        inside = (chunk >= 0) & (chunk < chunks)
        at = (batch * chunks + chunk)[:, None] * dim + first + channel
        keep = inside[:, None] & (channel < d)
        tl.store(total_ptr + at, total, mask=keep)
        tl.store(
            state_ptr + at[:, :, None] * N + n[None, None, :], state, mask=keep[:, :, None] & (n < N)[None, None, :]
        )


@triton.jit
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, start_ptr, state_ptr, y_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, programs_per_row, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """``y`` from the states that enter the chunks."""
    P: tl.constexpr = S * SUB
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * (P * (2 * DP + 2 * NP))
    w_row = delta_row + P * DP
    bc_row = w_row + P * DP
    p = tl.arange(0, P)
    cc = tl.arange(0, DP)
    channel, segment, n = walk_index(DP, NP, R, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, _, row, first, d = _item(item, programs_per_row, blocks, group_dim, DP)
        batch = (row // groups).to(tl.int64)
        first += (row % groups) * group_dim
        c = cc < d
        base = (batch * dim + first + cc)[:, None] * length
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        keep = (channel < d)[:, :, None] & (n < N)[None, None, :]
        chunk = batch * chunks + q * S + segment
        at = (chunk[:, None] * dim + first + channel)[:, :, None] * N + n[None, None, :]
        h = tl.load(start_ptr + at, mask=keep, other=0.0)
        for j in range(T // SUB):
            at = ((chunk * (T // SUB) + j)[:, None] * dim + first + channel)[:, :, None] * N + n[None, None, :]
            tl.store(state_ptr + at, h, mask=keep)
            at_p = q * (S * T) + p // SUB * T + p % SUB + j * SUB
            mask = c[:, None] & (at_p < length)[None, :]
            position = at_p[None, :]
            delta = _load_delta(delta_ptr, bias_ptr, base, c, position, first + cc, mask, HAS_BIAS, SOFTPLUS)
            u = tl.load(u_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
            tl.store(delta_row + p[:, None] * DP + cc[None, :], tl.trans(delta))
            tl.store(w_row + p[:, None] * DP + cc[None, :], tl.trans(delta * u))
            _copy_rows(B_ptr, bc_row, row.to(tl.int64) * N * length, length, N, at_p, P, NP)
            _copy_rows(C_ptr, bc_row + NP, row.to(tl.int64) * N * length, length, N, at_p, P, NP)
            tl.debug_barrier()
            h = walk_output(delta_row, w_row, bc_row, h, A2, channel, segment, n, DP, NP, SUB)
            tl.debug_barrier()
            y = tl.trans(tl.load(w_row + p[:, None] * DP + cc[None, :]))
            if HAS_D:
                y += tl.load(D_ptr + first + cc, mask=c, other=0.0)[:, None] * u
            tl.store(y_ptr + base + position, y, mask=mask)
            tl.debug_barrier()


@triton.jit
def backward_kernel(
    dy_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, bias_ptr, state_ptr, adjoint_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr, scratch_ptr,
    items, length, dim, group_dim, N: tl.constexpr, groups, blocks, programs_per_row, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SUB: tl.constexpr,
    UNROLL: tl.constexpr
):  # fmt: skip
    """Gradients from the states and adjoints that enter the chunks.

    Those of A, D and the bias are partial, one row a (batch, position block); those of B and C one a block of channels.
    """
    P: tl.constexpr = S * SUB
    G: tl.constexpr = DP // R // 8 if DP // R > 8 else 1
    slot: tl.constexpr = P * (3 * DP + 2 * NP + (G * 2 * NP if G > 1 else 0)) + (SUB // UNROLL) * S * DP * NP
    delta_row = scratch_ptr + tl.program_id(0).to(tl.int64) * slot
    w_row = delta_row + P * DP
    dy_row = w_row + P * DP
    bc_row = dy_row + P * DP
    checkpoint = bc_row + P * 2 * NP
    dbc_row = checkpoint + (SUB // UNROLL) * S * DP * NP if G > 1 else bc_row
    p = tl.arange(0, P)
    cc = tl.arange(0, DP)
    nn = tl.arange(0, NP)
    channel, segment, n = walk_index(DP, NP, R, S)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        q, block, row, first, d = _item(item, programs_per_row, blocks, group_dim, DP)
        batch = (row // groups).to(tl.int64)
        first += (row % groups) * group_dim
        c = cc < d
        base = (batch * dim + first + cc)[:, None] * length
        A2 = load_decay(A_ptr + first * N, channel, n, d, N)
        keep = (channel < d)[:, :, None] & (n < N)[None, None, :]
        chunk = batch * chunks + q * S + segment
        at = (chunk[:, None] * dim + first + channel)[:, :, None] * N + n[None, None, :]
        g = tl.load(adjoint_ptr + at, mask=keep, other=0.0)
        dA = tl.zeros_like(A2)
        dD = tl.zeros([DP], tl.float32)
        dbias = tl.zeros([DP], tl.float32)
        for back in range(T // SUB):
            j = T // SUB - 1 - back
            at_p = q * (S * T) + p // SUB * T + p % SUB + j * SUB
            inside = at_p < length
            mask = c[:, None] & inside[None, :]
            position = at_p[None, :]
            delta = _load_delta(delta_ptr, bias_ptr, base, c, position, first + cc, mask, HAS_BIAS, SOFTPLUS)
            u = tl.load(u_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
            tl.store(delta_row + p[:, None] * DP + cc[None, :], tl.trans(delta))
            tl.store(w_row + p[:, None] * DP + cc[None, :], tl.trans(delta * u))
            tl.store(dy_row + p[:, None] * DP + cc[None, :], tl.trans(dy))
            _copy_rows(B_ptr, bc_row, row.to(tl.int64) * N * length, length, N, at_p, P, NP)
            _copy_rows(C_ptr, bc_row + NP, row.to(tl.int64) * N * length, length, N, at_p, P, NP)
            tl.debug_barrier()
            at = ((chunk * (T // SUB) + j)[:, None] * dim + first + channel)[:, :, None] * N + n[None, None, :]
            h = tl.load(state_ptr + at, mask=keep, other=0.0)
            g, dA = walk_back(
                delta_row, w_row, bc_row, dy_row, dbc_row, checkpoint, h, g, dA, A2, channel, segment, n,
                DP, NP, R, S, SUB, UNROLL
            )  # fmt: skip
            tl.debug_barrier()
            delta = tl.trans(tl.load(delta_row + p[:, None] * DP + cc[None, :]))
            by_input = tl.trans(tl.load(w_row + p[:, None] * DP + cc[None, :]))
            by_decay = tl.trans(tl.load(dy_row + p[:, None] * DP + cc[None, :]))
            u = tl.load(u_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
            du = delta * by_input
            if HAS_D:
                dy = tl.load(dy_ptr + base + position, mask=mask, other=0.0).to(tl.float32)
                du += tl.load(D_ptr + first + cc, mask=c, other=0.0)[:, None] * dy
                dD += tl.sum(dy * u, axis=1)
            ddelta = u * by_input + by_decay
            if SOFTPLUS:
                ddelta *= softplus_slope(delta)
            dbias += tl.sum(tl.where(mask, ddelta, 0.0), axis=1)
            tl.store(du_ptr + base + position, du, mask=mask)
            tl.store(ddelta_ptr + base + position, ddelta, mask=mask)
            db = tl.zeros([P, NP], tl.float32)
            dc = tl.zeros([P, NP], tl.float32)
            for i in tl.static_range(G):
                db += tl.load(dbc_row + (p * G + i)[:, None] * (2 * NP) + nn[None, :])
                dc += tl.load(dbc_row + NP + (p * G + i)[:, None] * (2 * NP) + nn[None, :])
            sequences = (items // programs_per_row // blocks).to(tl.int64)
            bc_at = ((block * sequences + row) * N + nn)[:, None] * length + position
            bc_keep = (nn < N)[:, None] & inside[None, :]
            tl.store(dB_ptr + bc_at, tl.trans(db), mask=bc_keep)
            tl.store(dC_ptr + bc_at, tl.trans(dc), mask=bc_keep)
            tl.debug_barrier()
        part = batch * programs_per_row + q
        dA = tl.sum(tl.reshape(dA, [S, DP // R, R, NP]), axis=0)
        head = tl.arange(0, DP // R)[:, None] + tl.arange(0, R)[None, :] * (DP // R)
        dA_at = (part * dim + first + head)[:, :, None] * N + n[None, None, :]
        tl.store(dA_ptr + dA_at, dA, mask=(head < d)[:, :, None] & (n < N)[None, None, :])
        if HAS_D:
            tl.store(dD_ptr + part * dim + first + cc, dD, mask=c)
        if HAS_BIAS:
            tl.store(dbias_ptr + part * dim + first + cc, dbias, mask=c)


class _Plan:
    """Sizes of one call, in the order in which every kernel takes them."""

    def __init__(self, batch: int, dim: int, length: int, groups: int, state: int) -> None:
        self.group_dim = dim // groups
        self.tile: Tile = tile_for(min(self.group_dim, MAX_BLOCK), state)
        self.blocks = ceil_div(self.group_dim, self.tile.DP)
        self.per_row = ceil_div(length, self.tile.span)
        self.chunks = chunk_count(length, self.tile)
        self.items = batch * groups * self.blocks * self.per_row
        sizes = (self.items, length, dim, self.group_dim, state, groups, self.blocks, self.per_row, self.chunks)
        self.sizes = sizes


def _plan(u: Tensor, B: Tensor) -> _Plan:
    return _Plan(u.shape[0], u.shape[1], u.shape[2], B.shape[1], B.shape[2])


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (batch, sub-blocks of the chunks, dim, state)."""
    batch, dim, length = u.shape
    plan = _Plan(batch, dim, length, groups, state)
    return [batch, plan.chunks * plan.tile.T // plan.tile.SUB, dim, state]


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
    scratch, grid, options = launch(A, plan.items, tile, tile.forward_scratch, tile.forward_registers)
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
        y (batch, dim, length) in float32, and the states that enter the chunks (``states_shape_1d``).
    """
    plan, tile = _plan(u, B), _plan(u, B).tile
    y = torch.empty_like(u, dtype=torch.float32)
    with torch.cuda.device_of(u):
        starts = _summaries(u, delta, A, B, delta_bias, delta_softplus, False)
        states = A.new_empty(states_shape_1d(u, A.shape[1], B.shape[1]))
        scratch, grid, options = launch(A, plan.items, tile, tile.forward_scratch, tile.forward_registers)
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
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus, UNROLL=tile.UNROLL,
            **tile.constants(), **options
        )  # fmt: skip
        missing = A.new_zeros(1, dim)
    dB, dC = (m[0] if plan.blocks == 1 else m.sum(0) for m in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, *((missing if m is None else m).sum(0) for m in (dD, dbias))
