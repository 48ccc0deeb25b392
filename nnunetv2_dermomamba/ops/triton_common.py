# mypy: disable-error-code="no-untyped-def"
"""What the 1D and the 2D Triton scan share: tile shapes, the serial walks over rows, the scan over chunks.

A sequence is cut into chunks of ``T`` positions; a program walks ``S`` adjacent chunks ("segments") side by side, a
sub-block of ``SUB`` positions of each at a time. In bulk it first writes the rows that the walk needs (step size
``delta``, ``w = delta x``, B and C, a row a position) to a small scratch of its own, which stays in cache, and then
walks the ``SUB`` steps with the states of its segments and channels in registers. The reason for the scratch: Triton
cannot index a tile by a run-time position.

A walk's tile is ``[LX, R, N]``: ``LX`` runs over (segment, channel group) and fills the warps together with ``N``, and
the ``R`` channels of a group are held by one thread, so that sums over channels (for dB and dC) mostly need no
exchange between threads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHUNK = 64  # T, positions between two chunk summaries
SUB = 16  # positions whose rows are in the scratch at once, and between two saved states; divides CHUNK
BACKWARD_REGISTERS = 168  # a thread: 12 warps a processor
MAX_BLOCK = 128  # channels of one program


@dataclass(frozen=True)
class Tile:
    """Constants of a kernel for ``d`` channels and ``N`` states: see the module's text for the names."""

    DP: int  # channels, padded to a power of two
    NP: int  # states, padded likewise
    R: int
    S: int
    T: int
    SUB: int
    UNROLL: int  # steps whose states the backward walk holds in registers; divides SUB
    forward_registers: int
    num_warps: int

    @property
    def P(self) -> int:
        """Rows of a program's scratch."""
        return self.S * self.SUB

    @property
    def span(self) -> int:
        """Positions of a work item."""
        return self.S * self.T

    @property
    def G(self) -> int:
        """Partial sums over channels that the backward walk leaves per position: one for each warp."""
        return max(1, self.DP // self.R // 8)

    @property
    def forward_scratch(self) -> int:
        """Floats of a program's rows in the summary and forward kernels: delta, w (later y), B and C."""
        return self.P * (2 * self.DP + 2 * self.NP)

    @property
    def backward_scratch(self) -> int:
        """The same of the backward kernels: dy, checkpoints and partial dB and dC besides."""
        partial = self.P * self.G * 2 * self.NP if self.G > 1 else 0
        return self.forward_scratch + self.P * self.DP + self.SUB // self.UNROLL * self.S * self.DP * self.NP + partial

    def constants(self) -> dict[str, int]:
        """Keyword arguments of the kernels."""
        return {
            "DP": self.DP,
            "NP": self.NP,
            "R": self.R,
            "S": self.S,
            "T": self.T,
            "SUB": self.SUB,
            "num_warps": self.num_warps,
        }


def tile_for(channels: int, state: int) -> Tile:
    """Tile for one block of ``channels`` (at most ``MAX_BLOCK``)."""
    padded, states = triton.next_power_of_2(channels), triton.next_power_of_2(state)
    # Measured on an H200 (docs/selective_scan.md): few channels want more, smaller programs.
    run, unroll, registers = (2, 4, 128) if padded <= 64 else (4, 2, 168)
    run = min(run, padded)
    groups = padded // run
    segments = max(1, 8 // groups)
    threads = segments * groups * max(1, states // 4)
    return Tile(padded, states, run, segments, CHUNK, SUB, unroll, registers, max(1, min(16, threads // 32)))


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below ``a / b``."""
    return -(-a // b)


def chunk_count(length: int, tile: Tile) -> int:
    """Chunks of a sequence, filled up to whole programs."""
    return ceil_div(length, tile.span) * tile.S


def launch(
    like: Tensor, items: int, tile: Tile, floats: int, registers: int
) -> tuple[Tensor, tuple[int], dict[str, int]]:
    """Scratch (``floats`` a program), grid and options of a persistent launch that ``registers`` a thread can fill.

    As many programs as the device holds at once, so that each keeps its scratch in the cache.
    """
    programs = 2
    if like.device.type == "cuda":
        processors = torch.cuda.get_device_properties(like.device).multi_processor_count
        programs = processors * max(1, 65536 // registers // (32 * tile.num_warps))
    programs = min(items, programs)
    return like.new_empty(programs * floats, dtype=torch.float32), (programs,), {"maxnreg": registers, "num_stages": 1}


@triton.jit
def softplus(x):
    """``max(x, 0) + log1p(exp(-|x|))``; ``log1p(t) = 2 artanh(t / (2 + t))`` keeps tiny results relatively exact."""
    t = tl.exp(-tl.abs(x))
    z = t / (2.0 + t)
    s = z * z
    series = 1 / 13 + s * (1 / 15 + s * (1 / 17))
    series = 1 / 7 + s * (1 / 9 + s * (1 / 11 + s * series))
    series = 1.0 + s * (1 / 3 + s * (1 / 5 + s * series))
    return tl.maximum(x, 0.0) + 2.0 * z * series


@triton.jit
def softplus_slope(delta):
    """Derivative of ``softplus`` from its value: ``1 - exp(-delta)``, by its series where that would cancel."""
    series = delta * (1.0 - delta * (0.5 - delta * (1 / 6 - delta * (1 / 24 - delta * (1 / 120)))))
    return tl.where(delta < 0.1, series, 1.0 - tl.exp(-delta))


@triton.jit
def walk_index(DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """Channel ``[LX, R]``, segment ``[LX]`` and state ``[NP]`` of the walk's tile."""
    lx = tl.arange(0, S * (DP // R))
    r = tl.arange(0, R)
    channel = (lx % (DP // R))[:, None] + r[None, :] * (DP // R)
    return channel, lx // (DP // R), tl.arange(0, NP)


@triton.jit
def load_decay(A_ptr, channel, n, d, N):
    """``A log2(e)`` as ``[LX, R, NP]``; 0 (no decay) where padded."""
    mask = (channel < d)[:, :, None] & (n < N)[None, None, :]
    return tl.load(A_ptr + channel[:, :, None] * N + n[None, None, :], mask=mask, other=0.0) * LOG2E


@triton.jit
def walk_summary(
    delta_ptr, v_ptr, m_ptr, h, total, A2, channel, segment, n,
    ADJOINT: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    """Carry a segment's state and the sum of its steps over ``T`` rows.

    Forward: ``h = a h + w B``. ADJOINT, from the last position to the first: ``g = a (g + dy C)``.
    ``v_ptr`` holds w or dy, ``m_ptr`` B or C.
    """
    row = segment * T
    if ADJOINT:
        row += T - 1
    delta = tl.load(delta_ptr + row[:, None] * DP + channel)
    v = tl.load(v_ptr + row[:, None] * DP + channel)
    m = tl.load(m_ptr + row[:, None] * (2 * NP) + n[None, :])
    for i in range(T):
        row = segment * T + (tl.maximum(T - 2 - i, 0) if ADJOINT else tl.minimum(i + 1, T - 1))
        next_delta = tl.load(delta_ptr + row[:, None] * DP + channel)
        next_v = tl.load(v_ptr + row[:, None] * DP + channel)
        next_m = tl.load(m_ptr + row[:, None] * (2 * NP) + n[None, :])
        a = tl.exp2(delta[:, :, None] * A2)
        if ADJOINT:  # noqa: SIM108
            h = (h + v[:, :, None] * m[:, None, :]) * a
        else:
            h = h * a + v[:, :, None] * m[:, None, :]
        total += delta
        delta, v, m = next_delta, next_v, next_m
    return h, total


@triton.jit
def walk_output(
    delta_ptr, w_ptr, bc_ptr, h, A2, channel, segment, n, DP: tl.constexpr, NP: tl.constexpr, T: tl.constexpr
):
    """``y = <C, h>`` of every position, written over w. Each step loads the next one's rows ahead of its store."""
    row = segment * T
    delta = tl.load(delta_ptr + row[:, None] * DP + channel)
    w = tl.load(w_ptr + row[:, None] * DP + channel)
    b = tl.load(bc_ptr + row[:, None] * (2 * NP) + n[None, :])
    c = tl.load(bc_ptr + NP + row[:, None] * (2 * NP) + n[None, :])
    for i in range(T):
        following = segment * T + tl.minimum(i + 1, T - 1)
        next_delta = tl.load(delta_ptr + following[:, None] * DP + channel)
        next_w = tl.load(w_ptr + following[:, None] * DP + channel)
        next_b = tl.load(bc_ptr + following[:, None] * (2 * NP) + n[None, :])
        next_c = tl.load(bc_ptr + NP + following[:, None] * (2 * NP) + n[None, :])
        h = h * tl.exp2(delta[:, :, None] * A2) + w[:, :, None] * b[:, None, :]
        tl.store(w_ptr + (segment * T + i)[:, None] * DP + channel, tl.sum(h * c[:, None, :], axis=2))
        delta, w, b, c = next_delta, next_w, next_b, next_c
    return h


@triton.jit
def walk_back(
    delta_ptr, w_ptr, bc_ptr, dy_ptr, dbc_ptr, checkpoint_ptr, h, g, dA, A2, channel, segment, n,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, S: tl.constexpr, T: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    """Gradients of every position, from start states ``h`` and the adjoints ``g`` that enter at the segments' ends.

    Writes ``sum_n g B`` over w, ``sum_n (g a h_before) A`` over dy and the partial sums over channels of dB and dC to
    ``dbc_ptr``; returns the adjoints that leave and the gradient of A, added to ``dA``. The decays
    never divide, so underflow is harmless.
    """
    GROUPS: tl.constexpr = DP // R
    E: tl.constexpr = GROUPS if GROUPS < 8 else 8
    part = tl.arange(0, S * GROUPS // E)
    part_segment = part // (GROUPS // E)
    part_group = part % (GROUPS // E)
    state = ((segment[:, None] * DP + channel) * NP)[:, :, None] + n[None, None, :]
    row = segment * T
    for block in range(T // UNROLL):
        tl.store(checkpoint_ptr + block * (S * DP * NP) + state, h)
        for _ in tl.static_range(UNROLL):
            delta = tl.load(delta_ptr + row[:, None] * DP + channel)
            w = tl.load(w_ptr + row[:, None] * DP + channel)
            b = tl.load(bc_ptr + row[:, None] * (2 * NP) + n[None, :])
            h = h * tl.exp2(delta[:, :, None] * A2) + w[:, :, None] * b[:, None, :]
            row += 1
    tl.debug_barrier()
    for reverse in range(T // UNROLL):
        block = T // UNROLL - 1 - reverse
        h = tl.load(checkpoint_ptr + block * (S * DP * NP) + state)
        row = segment * T + block * UNROLL
        hs = (h,)
        decays = ()
        for i in tl.static_range(UNROLL):
            delta = tl.load(delta_ptr + (row + i)[:, None] * DP + channel)
            w = tl.load(w_ptr + (row + i)[:, None] * DP + channel)
            b = tl.load(bc_ptr + (row + i)[:, None] * (2 * NP) + n[None, :])
            a = tl.exp2(delta[:, :, None] * A2)
            h = h * a + w[:, :, None] * b[:, None, :]
            hs = hs + (h,)  # noqa: RUF005  (kernels know no starred tuples)
            decays = decays + (a,)  # noqa: RUF005
        for i in tl.static_range(UNROLL - 1, -1, -1):
            here = row + i
            delta = tl.load(delta_ptr + here[:, None] * DP + channel)
            w = tl.load(w_ptr + here[:, None] * DP + channel)
            dy = tl.load(dy_ptr + here[:, None] * DP + channel)
            b = tl.load(bc_ptr + here[:, None] * (2 * NP) + n[None, :])
            c = tl.load(bc_ptr + NP + here[:, None] * (2 * NP) + n[None, :])
            g += dy[:, :, None] * c[:, None, :]
            dc = tl.sum(dy[:, :, None] * hs[i + 1], axis=1)
            db = tl.sum(w[:, :, None] * g, axis=1)
            by_input = tl.sum(g * b[:, None, :], axis=2)
            g *= decays[i]
            q = g * hs[i]
            dA += q * delta[:, :, None]
            by_decay = tl.sum(q * A2, axis=2) * LN2
            tl.store(w_ptr + here[:, None] * DP + channel, by_input)
            tl.store(dy_ptr + here[:, None] * DP + channel, by_decay)
            out = ((part_segment * T + block * UNROLL + i) * (GROUPS // E) + part_group) * (2 * NP)
            db = tl.sum(tl.reshape(db, [S * GROUPS // E, E, NP]), axis=1)
            dc = tl.sum(tl.reshape(dc, [S * GROUPS // E, E, NP]), axis=1)
            tl.store(dbc_ptr + out[:, None] + n[None, :], db)
            tl.store(dbc_ptr + NP + out[:, None] + n[None, :], dc)
    return g, dA


@triton.jit
def _compose(decay_left, state_left, decay_right, state_right):
    return decay_left * decay_right, decay_right * state_left + state_right


@triton.jit
def combine_kernel(
    state_ptr,
    total_ptr,
    A_ptr,
    chunks,
    d,
    N,
    directions,
    REVERSE: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Scan over chunks, in place: row i of ``state`` holds what its predecessor adds, and then what enters chunk i."""
    outer = tl.program_id(0)
    lane = tl.program_id(1) * LANES + tl.arange(0, LANES)
    valid = lane < d * N
    A2 = tl.load(A_ptr + (outer % directions) * d * N + lane, mask=valid, other=0.0) * LOG2E
    base = outer.to(tl.int64) * chunks
    carry = tl.zeros([LANES], tl.float32)
    r = tl.arange(0, ROWS)
    for start in range(0, chunks, ROWS):
        step = start + r
        row = chunks - 1 - step if REVERSE else step
        inside = (step < chunks)[:, None] & valid[None, :]
        written = inside & (step > 0)[:, None]
        position = (base + row)[:, None]
        total = tl.load(total_ptr + position * d + (lane // N)[None, :], mask=written, other=0.0)
        state = tl.load(state_ptr + position * d * N + lane[None, :], mask=written, other=0.0)
        decay, state = tl.associative_scan((tl.exp2(total * A2[None, :]), state), 0, _compose)
        state += decay * carry[None, :]
        tl.store(state_ptr + position * d * N + lane[None, :], state, mask=inside)
        carry = tl.sum(tl.where((r == ROWS - 1)[:, None], state, 0.0), axis=0)


def combine(state: Tensor, total: Tensor, A: Tensor, directions: int, reverse: bool) -> None:
    """Turn chunk summaries ``state`` (..., chunks, d, N) into the states (reverse: adjoints) that enter each chunk."""
    chunks, d, N = state.shape[-3:]
    lanes = min(32, triton.next_power_of_2(d * N))
    rows = min(64, max(2, triton.next_power_of_2(chunks)))
    grid = (state.numel() // (chunks * d * N), ceil_div(d * N, lanes))
    combine_kernel[grid](state, total, A, chunks, d, N, directions, reverse, lanes, rows, num_warps=4)
