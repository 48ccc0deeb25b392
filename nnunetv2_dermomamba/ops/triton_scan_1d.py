# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the 1D selective scan, mamba-ssm's op: four forward launches, three backward.

A work item is ``S`` adjacent chunks of one (sample, group, block of channels). Its lanes load what they need straight
from the inputs, whose last axis is time: four steps of a channel or of a state in one load. Only the step sizes
(bias and softplus), which all states of a channel share, are computed beforehand, once for all passes.
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
    advance,
    ceil_div,
    channel_index,
    chunk_count,
    combine,
    gradients,
    load_decay,
    outputs,
    retreat,
    saved_index,
    softplus,
    softplus_slope,
    state_index,
    sum_of_steps,
    sum_over_segments,
    tile_for,
    walk_index,
)


@triton.jit
def step_sizes_kernel(
    delta_ptr, bias_ptr, out_ptr, length, dim, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """``softplus(delta + bias)`` in float32, of one channel's block of positions."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = position < length
    delta = tl.load(delta_ptr + row * length + position, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        delta += tl.load(bias_ptr + row % dim)
    if SOFTPLUS:
        delta = softplus(delta)
    tl.store(out_ptr + row * length + position, delta, mask=mask)


@triton.jit
def _item(per_row, blocks, group_dim, DP: tl.constexpr):
    """Position block, block of channels, (sample, group), first channel in its group, and channels of this program."""
    item = tl.program_id(0)
    q = item % per_row
    block = item // per_row % blocks
    return q, block, item // per_row // blocks, block * DP, tl.minimum(DP, group_dim - block * DP)


@triton.jit
def _load_steps(ptr, row, position, length, keep, EXACT: tl.constexpr):
    """Four steps of each row, ``[..., 4]`` in float32; 0 behind the sequence's end and in rows not to keep.

    EXACT: there is nothing of that kind, so nothing is compared.
    """
    at = row[:, :, :, None] * length + position
    if EXACT:
        return tl.load(ptr + at).to(tl.float32)
    mask = keep[:, :, :, None] & (position < length)
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load(ptr, mask):
    return (tl.load(ptr) if mask is None else tl.load(ptr, mask=mask, other=0.0)).to(tl.float32)


@triton.jit
def _steps(q, segment, S: tl.constexpr, T: tl.constexpr):
    """Positions ``[..., 1, 1, 4]`` of the first four steps of each segment."""
    return (q * (S * T) + segment * T)[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]


@triton.jit
def summary_kernel(
    v_ptr, delta_ptr, A_ptr, M_ptr, state_ptr, total_ptr,
    length, dim, group_dim, N: tl.constexpr, groups, blocks, per_row, chunks, ADJOINT: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, HOLD: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Summary of every chunk, stored where its successor (ADJOINT: predecessor) will read it.

    ``v`` is u, ``M`` is B; ADJOINT: dy and C.
    """
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    q, _, sequence, first, d = _item(per_row, blocks, group_dim, DP)
    batch = (sequence // groups).to(tl.int64)
    first += sequence % groups * group_dim
    A2 = load_decay(A_ptr + first * N, channel, n, d, N)
    base = (batch * dim + first) * length  # of 64 bits; offsets from it have 32
    m_base = sequence.to(tl.int64) * N * length
    start = _steps(q, segment, S, T)
    state = tl.zeros_like(A2)
    total = channel * 0.0
    for j in range(T // 4):
        position = start + ((T - 4 - j * 4) if ADJOINT else j * 4)
        delta = _load_steps(delta_ptr + base, channel, position, length, channel < d, EXACT)
        v = _load_steps(v_ptr + base, channel, position, length, channel < d, EXACT)
        m = _load_steps(M_ptr + m_base, n, position, length, n < N, EXACT)
        if ADJOINT:  # noqa: SIM108
            state = retreat(state, delta, v, m, A2)
        else:
            state = advance(state, delta, delta * v, m, A2)[3]
        total += sum_of_steps(delta)
    chunk = q * S + segment + (-1 if ADJOINT else 1)
    keep = (chunk >= 0) & (chunk < chunks) & (channel < d)
    entry = (batch * chunks + chunk) * dim + first + channel
    tl.store(total_ptr + entry, total, mask=keep)
    tl.store(state_ptr + entry * N + n, state, mask=keep & (n < N))


@triton.jit
def forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, start_ptr, saved_ptr, y_ptr,
    length, dim, group_dim, N: tl.constexpr, groups, blocks, per_row, chunks, HAS_D: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, HOLD: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """``y`` from the states that enter the chunks; saves the states before every ``HOLD`` positions."""
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    out_segment, out_channel = channel_index(DP, R, S)
    q, _, sequence, first, d = _item(per_row, blocks, group_dim, DP)
    batch = (sequence // groups).to(tl.int64)
    first += sequence % groups * group_dim
    A2 = load_decay(A_ptr + first * N, channel, n, d, N)
    base = (batch * dim + first) * length  # of 64 bits; offsets from it have 32
    m_base = sequence.to(tl.int64) * N * length
    start = _steps(q, segment, S, T)
    out_start = q * (S * T) + out_segment * T + tl.arange(0, 4)[None, None, :]
    if HAS_D:
        skip = tl.load(D_ptr + first + out_channel, mask=out_channel < d, other=0.0)
    entry = (batch * chunks + q * S + segment) * dim + first + channel
    h = tl.load(start_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
    save = saved_ptr + tl.program_id(0).to(tl.int64) * (T // HOLD) * (S * DP * NP) + saved_index(DP, NP, R, NN, S)
    for j in range(T // 4):
        if j % (HOLD // 4) == 0:
            tl.store(save + j // (HOLD // 4) * (S * DP * NP), h)
        position = start + j * 4
        delta = _load_steps(delta_ptr + base, channel, position, length, channel < d, EXACT)
        u = _load_steps(u_ptr + base, channel, position, length, channel < d, EXACT)
        b = _load_steps(B_ptr + m_base, n, position, length, n < N, EXACT)
        c = _load_steps(C_ptr + m_base, n, position, length, n < N, EXACT)
        states = advance(h, delta, delta * u, b, A2)
        h = states[3]
        y = outputs(states, c, S * (DP // R), NP // NN, R)
        out_position = out_start + j * 4
        out_at = out_channel * length + out_position
        out_mask = (out_channel < d) & (out_position < length) if not EXACT else None
        if HAS_D:
            y += skip * _load(u_ptr + base + out_at, out_mask)
        tl.store(y_ptr + base + out_at, y, mask=out_mask)


@triton.jit
def backward_kernel(
    dy_ptr, u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, saved_ptr, adjoint_ptr,
    du_ptr, ddelta_ptr, dA_ptr, dB_ptr, dC_ptr, dD_ptr, dbias_ptr,
    length, dim, group_dim, N: tl.constexpr, groups, blocks, per_row, chunks,
    HAS_D: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    T: tl.constexpr, HOLD: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """Gradients from the saved states and the adjoints that enter the chunks.

    Those of A, D and the bias are partial, one row a (sample, position block); those of B and C one a part of the
    channels.
    """
    PARTS: tl.constexpr = DP // R // 8 if DP // R > 8 else 1
    G: tl.constexpr = DP // R
    segment, channel, n = walk_index(DP, NP, R, NN, S)
    out_segment, out_channel = channel_index(DP, R, S)
    m_segment, m_part, m = state_index(DP, NP, R, NN, S)
    q, block, sequence, first, d = _item(per_row, blocks, group_dim, DP)
    batch = (sequence // groups).to(tl.int64)
    first += sequence % groups * group_dim
    A2 = load_decay(A_ptr + first * N, channel, n, d, N)
    base = (batch * dim + first) * length  # of 64 bits; offsets from it have 32
    m_base = sequence.to(tl.int64) * N * length
    start = _steps(q, segment, S, T)
    out_start = q * (S * T) + out_segment * T + tl.arange(0, 4)[None, None, :]
    sequences = (tl.num_programs(0) // per_row // blocks).to(tl.int64)
    dm_base = (block * PARTS * sequences + sequence) * N * length
    dm_row = m_part * sequences * N + m
    dm_start = q * (S * T) + m_segment * T + tl.arange(0, 4)[None, None, :]
    if HAS_D:
        skip = tl.load(D_ptr + first + out_channel, mask=out_channel < d, other=0.0)
    entry = (batch * chunks + q * S + segment) * dim + first + channel
    g = tl.load(adjoint_ptr + entry * N + n, mask=(channel < d) & (n < N), other=0.0)
    save = saved_ptr + tl.program_id(0).to(tl.int64) * (T // HOLD) * (S * DP * NP) + saved_index(DP, NP, R, NN, S)
    dA = tl.zeros_like(A2)
    dD = tl.zeros([S * G, R], tl.float32)
    dbias = tl.zeros([S * G, R], tl.float32)
    for back in range(T // 4):
        j = T // 4 - 1 - back
        h = tl.load(save + j // (HOLD // 4) * (S * DP * NP))
        for k in range(j // (HOLD // 4) * (HOLD // 4), j):
            position = start + k * 4
            delta = _load_steps(delta_ptr + base, channel, position, length, channel < d, EXACT)
            u = _load_steps(u_ptr + base, channel, position, length, channel < d, EXACT)
            b = _load_steps(B_ptr + m_base, n, position, length, n < N, EXACT)
            h = advance(h, delta, delta * u, b, A2)[3]
        position = start + j * 4
        delta = _load_steps(delta_ptr + base, channel, position, length, channel < d, EXACT)
        u = _load_steps(u_ptr + base, channel, position, length, channel < d, EXACT)
        b = _load_steps(B_ptr + m_base, n, position, length, n < N, EXACT)
        states = advance(h, delta, delta * u, b, A2)
        dy = _load_steps(dy_ptr + base, channel, position, length, channel < d, EXACT)
        c = _load_steps(C_ptr + m_base, n, position, length, n < N, EXACT)
        g, dA, by_input, by_decay, db, dc = gradients(
            g, dA, h, states, delta, delta * u, b, c, dy, A2, DP, NP, R, NN, S
        )
        out_position = out_start + j * 4
        out_at = out_channel * length + out_position
        out_mask = (out_channel < d) & (out_position < length) if not EXACT else None
        out_u = _load(u_ptr + base + out_at, out_mask)
        out_delta = _load(delta_ptr + base + out_at, out_mask)
        du = out_delta * by_input
        if HAS_D:
            out_dy = _load(dy_ptr + base + out_at, out_mask)
            du += skip * out_dy
            dD += tl.sum(out_dy * out_u, axis=2)
        ddelta = out_u * by_input + by_decay
        if SOFTPLUS:
            ddelta *= softplus_slope(out_delta)
        if HAS_BIAS:
            dbias += tl.sum(ddelta if EXACT else tl.where(out_mask, ddelta, 0.0), axis=2)
        tl.store(du_ptr + base + out_at, du, mask=out_mask)
        tl.store(ddelta_ptr + base + out_at, ddelta, mask=out_mask)
        dm_position = dm_start + j * 4
        dm_mask = (m < N) & (dm_position < length) if not EXACT else None
        tl.store(dB_ptr + dm_base + dm_row * length + dm_position, db, mask=dm_mask)
        tl.store(dC_ptr + dm_base + dm_row * length + dm_position, dc, mask=dm_mask)
    part = batch * per_row + q
    dA, head, state = sum_over_segments(dA, DP, NP, R, NN, S)
    tl.store(dA_ptr + (part * dim + first + head) * N + state, dA, mask=(head < d) & (state < N))
    head = tl.arange(0, G)[:, None] + tl.arange(0, R)[None, :] * G
    if HAS_D:
        tl.store(dD_ptr + part * dim + first + head, tl.sum(tl.reshape(dD, [S, G, R]), axis=0), mask=head < d)
    if HAS_BIAS:
        tl.store(dbias_ptr + part * dim + first + head, tl.sum(tl.reshape(dbias, [S, G, R]), axis=0), mask=head < d)


class _Plan:
    """Sizes and constants of one call, in the order in which every kernel takes them."""

    def __init__(self, batch: int, dim: int, length: int, groups: int, state: int) -> None:
        group_dim = dim // groups
        self.tile: Tile = tile_for(min(group_dim, MAX_BLOCK), state, length)
        self.blocks = ceil_div(group_dim, self.tile.DP)
        self.per_row = ceil_div(length, self.tile.span)
        self.chunks = chunk_count(length, self.tile)
        self.items = batch * groups * self.blocks * self.per_row
        self.sizes = (length, dim, group_dim, state, groups, self.blocks, self.per_row, self.chunks)
        if max(self.tile.DP, self.tile.NP) * self.per_row * self.tile.span >= 2**31:  # offsets have 32 bits
            raise ValueError(
                f"a sequence of {length} positions is too long for the triton backend at {group_dim} channels a group; "
                "choose another: backend='mamba-ssm' or 'torch'"
            )
        self.constants = self.tile.constants()
        del self.constants["SUB"]
        whole = length % self.tile.span == 0 and group_dim % self.tile.DP == 0 and state == self.tile.NP
        self.constants["EXACT"] = whole


def _plan(u: Tensor, B: Tensor) -> _Plan:
    return _Plan(u.shape[0], u.shape[1], u.shape[2], B.shape[1], B.shape[2])


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (work items, points in time, states)."""
    batch, dim, length = u.shape
    plan = _Plan(batch, dim, length, groups, state)
    return [plan.items, *plan.tile.saved_states]


def _step_sizes(delta: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    batch, dim, length = delta.shape
    if bias is None and not softplus and delta.dtype == torch.float32:
        return delta
    out = torch.empty_like(delta, dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(length))
    grid = (batch * dim, ceil_div(length, block))
    step_sizes_kernel[grid](delta, bias, out, length, dim, bias is not None, softplus, block)
    return out


def _summaries(v: Tensor, delta: Tensor, A: Tensor, M: Tensor, adjoint: bool) -> Tensor:
    plan = _plan(delta, M)
    shape = (delta.shape[0], plan.chunks, *A.shape)
    if plan.chunks == 1:
        return A.new_zeros(shape)
    state, total = A.new_empty(shape), A.new_empty(shape[:3])
    summary_kernel[(plan.items,)](
        v, delta, A, M, state, total, *plan.sizes,
        ADJOINT=adjoint, maxnreg=plan.tile.forward_registers, **plan.constants
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
    plan = _plan(u, B)
    y = torch.empty_like(u, dtype=torch.float32)
    with torch.cuda.device_of(u):
        delta = _step_sizes(delta, delta_bias, delta_softplus)
        starts = _summaries(u, delta, A, B, False)
        states = A.new_empty(states_shape_1d(u, A.shape[1], B.shape[1]))
        forward_kernel[(plan.items,)](
            u, delta, A, B, C, D, starts, states, y, *plan.sizes,
            HAS_D=D is not None, maxnreg=plan.tile.forward_registers, **plan.constants
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
        delta = _step_sizes(delta, delta_bias, delta_softplus)
        adjoints = _summaries(dy, delta, A, C, True)
        du, ddelta = (torch.empty_like(u, dtype=torch.float32) for _ in range(2))
        dA = A.new_empty(parts, *A.shape)
        dB, dC = (A.new_empty(plan.blocks * tile.parts, *B.shape) for _ in range(2))
        dD = None if D is None else A.new_empty(parts, dim)
        dbias = None if delta_bias is None else A.new_empty(parts, dim)
        backward_kernel[(plan.items,)](
            dy, u, delta, A, B, C, D, states, adjoints, du, ddelta, dA, dB, dC, dD, dbias, *plan.sizes,
            HAS_D=D is not None, HAS_BIAS=delta_bias is not None, SOFTPLUS=delta_softplus,
            maxnreg=BACKWARD_REGISTERS, **plan.constants
        )  # fmt: skip
        missing = A.new_zeros(1, dim)
    dB, dC = (m[0] if len(m) == 1 else m.sum(0) for m in (dB, dC))
    return du, ddelta, dA.sum(0), dB, dC, *((missing if m is None else m).sum(0) for m in (dD, dbias))
