# mypy: disable-error-code="no-untyped-def"
"""What the 1D and the 2D Triton scan share: tile shapes, the serial walks over rows, the scan over chunks.

A sequence is cut into chunks of ``T`` positions; a program walks ``S`` adjacent chunks ("segments") side by side, a
sub-block of ``SUB`` positions of each at a time. In bulk it first writes the rows that the walk needs (step size
``delta``, ``w = delta x``, B and C) to a small scratch of its own, which stays in cache, and then walks the ``SUB``
steps, unrolled, with the states in registers.

A walk's tile is ``[LANES, R, NN]``. ``LANES`` runs over (segment, group of ``R`` channels, state modulo ``NP / NN``)
and fills the warps exactly; the ``R`` channels and ``NN`` states of a lane are one thread's. Rows are loaded as
``[LANES, R or NN, 4]``, four steps a load of 16 bytes; the scratch keeps a quantity as ``[SUB / 4, rows, 4]``, row
``index S + segment``, so that a warp's load is one or two lines of cache. That last axis is one thread's too, so
``_pick`` takes a step out of it at no cost, no step waits for memory and nothing passes between threads but the sums
over states and channels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
CHUNK = 64  # T, positions between two chunk summaries
SUB = 16  # positions whose rows are in the scratch at once; divides CHUNK
FORWARD_REGISTERS = 128  # a thread: 16 warps a processor
BACKWARD_REGISTERS = 255  # 8 warps a processor: the backward walk holds HOLD states and decays of every channel
MAX_BLOCK = 128  # channels of one program


@dataclass(frozen=True)
class Tile:
    """Constants of a kernel for ``d`` channels and ``N`` states: see the module's text for the names."""

    DP: int  # channels, padded to a power of two
    NP: int  # states, padded likewise
    R: int
    NN: int
    S: int
    T: int
    SUB: int
    HOLD: int  # positions between two saved states, whose states the backward walk holds in registers; divides SUB

    @property
    def lanes(self) -> int:
        """Threads of a program."""
        return self.S * (self.DP // self.R) * (self.NP // self.NN)

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return max(1, self.lanes // 32)

    @property
    def P(self) -> int:
        """Positions of a program's scratch."""
        return self.S * self.SUB

    @property
    def span(self) -> int:
        """Positions of a work item."""
        return self.S * self.T

    @property
    def forward_scratch(self) -> int:
        """Floats of a program's rows in the summary and forward kernels: delta, w (later y), B and C."""
        return self.P * (2 * self.DP + 2 * self.NP)

    @property
    def backward_scratch(self) -> int:
        """The same of the backward kernels: dy besides, and dB and dC, a partial sum of each for every warp."""
        partial = max(1, self.DP // self.R // 8)
        return self.P * (3 * self.DP + 2 * self.NP + partial * 2 * self.NP)

    @property
    def saved_states(self) -> tuple[int, int]:
        """Shape of the states that a work item saves: (points in time, states of all its lanes)."""
        return self.T // self.HOLD, self.S * self.DP * self.NP

    def constants(self) -> dict[str, int]:
        """Keyword arguments of the kernels."""
        names = ("DP", "NP", "R", "NN", "S", "T", "SUB", "HOLD", "num_warps")
        return {name: getattr(self, name) for name in names}


def tile_for(channels: int, state: int, length: int) -> Tile:
    """Tile for one block of ``channels`` (at most ``MAX_BLOCK``) of sequences of ``length``."""
    padded, states = triton.next_power_of_2(channels), triton.next_power_of_2(state)
    run, held = min(4 if padded > 64 else 2, padded), min(4, states)
    segments = max(2, 32 // (padded // run * (states // held)))
    shorter = 1 if length > 64 * CHUNK else 2 if length > 8 * CHUNK else 4  # short sequences want more programs
    chunk = max(SUB, CHUNK // shorter)
    hold = min(SUB, 8 if run * held <= 8 else 4)
    return Tile(padded, states, run, held, segments, chunk, SUB, hold)


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
def walk_index(DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr):
    """Segment ``[LANES, 1, 1]``, channel ``[LANES, R, 1]`` and state ``[LANES, 1, NN]`` of the walk's tile."""
    NL: tl.constexpr = NP // NN
    lane = tl.arange(0, S * (DP // R) * NL)
    channel = (lane // NL % (DP // R))[:, None, None] + tl.arange(0, R)[None, :, None] * (DP // R)
    n = tl.arange(0, NN)[None, None, :] * NL + (lane % NL)[:, None, None]
    return (lane // NL // (DP // R))[:, None, None], channel, n


@triton.jit
def saved_index(DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr):
    """Where a lane's states lie among a work item's saved ones: adjacent lanes side by side."""
    LANES: tl.constexpr = S * (DP // R) * (NP // NN)
    held = tl.arange(0, R)[None, :, None] * NN + tl.arange(0, NN)[None, None, :]
    return tl.arange(0, LANES)[:, None, None] + held * LANES


@triton.jit
def load_decay(A_ptr, channel, n, d, N):
    """``A log2(e)`` as ``[LANES, R, NN]``; 0 (no decay) where padded."""
    return tl.load(A_ptr + channel * N + n, mask=(channel < d) & (n < N), other=0.0) * LOG2E


@triton.jit
def _exp2(x):
    """The hardware's own: results below the smallest normal number are 0, which spares the code that scales them."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _pick(steps, i: tl.constexpr):
    """Step ``i`` of ``[LANES, X, Y, 4]``, by a sum of integers: those that are known to be 0 vanish in compilation."""
    here = tl.arange(0, 4)[None, None, None, :] == i
    return tl.sum(tl.where(here, steps.to(tl.int32, bitcast=True), 0), axis=3).to(tl.float32, bitcast=True)


@triton.jit
def _pack(a, b, c, d):
    """Four steps of ``[X, Y]`` as ``[X, Y, 4]``."""
    return tl.join(tl.join(a, c), tl.join(b, d)).reshape(a.shape[0], a.shape[1], 4)


@triton.jit
def cells(row, step, ROWS: tl.constexpr):
    """Offsets in the scratch of steps ``step`` of rows ``row`` (broadcast) of a quantity of ``ROWS`` rows."""
    return step // 4 * (ROWS * 4) + row * 4 + step % 4


@triton.jit
def _rows(segment, index, S: tl.constexpr):
    """Offsets ``[LANES, ..., 4]`` of the first four steps of each lane's rows."""
    return ((index * S + segment) * 4)[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]


@triton.jit
def _output_rows(DP: tl.constexpr, R: tl.constexpr, S: tl.constexpr):
    """Offsets ``[S DP / R, R, 4]`` of the first four steps of each channel's rows."""
    G: tl.constexpr = DP // R
    group = tl.arange(0, S * G)[:, None, None]
    channel = group % G + tl.arange(0, R)[None, :, None] * G
    return (channel * S + group // G) * 4 + tl.arange(0, 4)[None, None, :]


@triton.jit
def walk_summary(
    delta_ptr, v_ptr, m_ptr, h, total, A2, segment, channel, n,
    ADJOINT: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Carry a segment's state and the sum of its steps over ``SUB`` positions.

    Forward: ``h = a h + w B``. ADJOINT, from the last position to the first: ``g = a (g + dy C)``.
    ``v_ptr`` holds w or dy, ``m_ptr`` B or C.
    """
    row = _rows(segment, channel, S)
    m_row = _rows(segment, n, S)
    WAY: tl.constexpr = -1 if ADJOINT else 1
    BEGIN: tl.constexpr = SUB - 4 if ADJOINT else 0
    STEP: tl.constexpr = 3 if ADJOINT else 0
    for at in tl.static_range(BEGIN, SUB - 4 - BEGIN + 4 * WAY, 4 * WAY):
        delta = tl.load(delta_ptr + row + at * (S * DP))
        v = tl.load(v_ptr + row + at * (S * DP))
        m = tl.load(m_ptr + m_row + at * (S * NP))
        for i in tl.static_range(STEP, 3 - STEP + WAY, WAY):
            step = _pick(delta, i)
            a = _exp2(step * A2)
            if ADJOINT:  # noqa: SIM108
                h = (h + _pick(v, i) * _pick(m, i)) * a
            else:
                h = h * a + _pick(v, i) * _pick(m, i)
            total += step
    return h, total


@triton.jit
def walk_output(
    delta_ptr, w_ptr, bc_ptr, saved_ptr, h, A2, segment, channel, n, saved,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    SUB: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """``y = <C, h>`` of every position, written over w; saves the states before every ``HOLD`` positions."""
    row = _rows(segment, channel, S)
    bc_row = _rows(segment, n, S)
    y_row = _output_rows(DP, R, S)
    for k in tl.static_range(SUB // 4):
        if k * 4 % HOLD == 0:
            tl.store(saved_ptr + k * 4 // HOLD * (S * DP * NP) + saved, h)
        delta = tl.load(delta_ptr + row + k * 4 * (S * DP))
        w = tl.load(w_ptr + row + k * 4 * (S * DP))
        b = tl.load(bc_ptr + bc_row + k * 4 * (S * 2 * NP))
        c = tl.load(bc_ptr + NP * S * 4 + bc_row + k * 4 * (S * 2 * NP))
        ys = ()
        for i in tl.static_range(4):
            h = h * _exp2(_pick(delta, i) * A2) + _pick(w, i) * _pick(b, i)
            ys = ys + (tl.sum(h * _pick(c, i), axis=2),)  # noqa: RUF005  (kernels know no starred tuples)
        y = _pack(ys[0], ys[1], ys[2], ys[3]).reshape(S * (DP // R), NP // NN, R, 4)
        tl.store(w_ptr + y_row + k * 4 * (S * DP), tl.sum(y, axis=1))
    return h


@triton.jit
def walk_back(
    delta_ptr, w_ptr, bc_ptr, dy_ptr, dbc_ptr, saved_ptr, g, dA, A2, segment, channel, n, saved,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    SUB: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """Gradients of every position, from the saved states and the adjoints ``g`` that enter at the segments' ends.

    Writes ``sum_n g B`` over w, ``sum_n (g a h_before) A`` over dy and the sums over up to 8 groups of channels of dB
    and dC, as rows of (segment, 8 groups, B and C), to ``dbc_ptr``; returns the adjoints that leave and the gradient of
    A, added to ``dA``. The decays never divide, so underflow is harmless.
    """
    NL: tl.constexpr = NP // NN
    G: tl.constexpr = DP // R
    E: tl.constexpr = G if G < 8 else 8
    PARTS: tl.constexpr = S * (G // E)
    row = _rows(segment, channel, S)
    bc_row = _rows(segment, n, S)
    out_row = _output_rows(DP, R, S)
    part = tl.arange(0, PARTS * NL)[:, None, None]
    m = part // NL % (G // E) * (2 * NP) + part % NL + (tl.arange(0, NN) * NL)[None, :, None]
    dbc_row = (m * S + part // NL // (G // E)) * 4 + tl.arange(0, 4)[None, None, :]
    for back in range(SUB // HOLD):
        first = SUB - HOLD - back * HOLD
        h = tl.load(saved_ptr + first // HOLD * (S * DP * NP) + saved)
        hs = (h,)
        deltas = ()
        ws = ()
        bs = ()
        for k in tl.static_range(HOLD // 4):
            delta = tl.load(delta_ptr + row + (first + k * 4) * (S * DP))
            w = tl.load(w_ptr + row + (first + k * 4) * (S * DP))
            b = tl.load(bc_ptr + bc_row + (first + k * 4) * (S * 2 * NP))
            deltas = deltas + (delta,)  # noqa: RUF005
            ws = ws + (w,)  # noqa: RUF005
            bs = bs + (b,)  # noqa: RUF005
            for i in tl.static_range(4):
                h = h * _exp2(_pick(delta, i) * A2) + _pick(w, i) * _pick(b, i)
                hs = hs + (h,)  # noqa: RUF005
        for k in tl.static_range(HOLD // 4 - 1, -1, -1):
            dy = tl.load(dy_ptr + row + (first + k * 4) * (S * DP))
            c = tl.load(bc_ptr + NP * S * 4 + bc_row + (first + k * 4) * (S * 2 * NP))
            by_input = ()
            by_decay = ()
            dbs = ()
            dcs = ()
            for i in tl.static_range(3, -1, -1):
                step = _pick(deltas[k], i)
                dy_i = _pick(dy, i)
                g += dy_i * _pick(c, i)
                dcs = (tl.sum(dy_i * hs[k * 4 + i + 1], axis=1),) + dcs  # noqa: RUF005
                dbs = (tl.sum(_pick(ws[k], i) * g, axis=1),) + dbs  # noqa: RUF005
                by_input = (tl.sum(g * _pick(bs[k], i), axis=2),) + by_input  # noqa: RUF005
                g *= _exp2(step * A2)
                q = g * hs[k * 4 + i]
                dA += q * step
                by_decay = (tl.sum(q * A2, axis=2),) + by_decay  # noqa: RUF005
            by_input = _pack(by_input[0], by_input[1], by_input[2], by_input[3]).reshape(S * G, NL, R, 4)
            by_decay = _pack(by_decay[0], by_decay[1], by_decay[2], by_decay[3]).reshape(S * G, NL, R, 4)
            db = tl.sum(_pack(dbs[0], dbs[1], dbs[2], dbs[3]).reshape(PARTS, E, NL, NN, 4), axis=1)
            dc = tl.sum(_pack(dcs[0], dcs[1], dcs[2], dcs[3]).reshape(PARTS, E, NL, NN, 4), axis=1)
            tl.store(w_ptr + out_row + (first + k * 4) * (S * DP), tl.sum(by_input, axis=1))
            tl.store(dy_ptr + out_row + (first + k * 4) * (S * DP), tl.sum(by_decay, axis=1) * LN2)
            tl.store(dbc_ptr + dbc_row + (first + k * 4) * (PARTS * 2 * NP), db.reshape(PARTS * NL, NN, 4))
            tl.store(dbc_ptr + NP * S * 4 + dbc_row + (first + k * 4) * (PARTS * 2 * NP), dc.reshape(PARTS * NL, NN, 4))
    return g, dA


@triton.jit
def sum_over_segments(dA, DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr):
    """The walk's ``[LANES, R, NN]`` summed over segments, ``[DP / R, NP / NN, R, NN]``; its channels and states."""
    G: tl.constexpr = DP // R
    NL: tl.constexpr = NP // NN
    channel = (tl.arange(0, G)[:, None] + tl.arange(0, R)[None, :] * G)[:, None, :, None]
    n = (tl.arange(0, NL)[:, None] + tl.arange(0, NN)[None, :] * NL)[None, :, None, :]
    return tl.sum(tl.reshape(dA, [S, G, NL, R, NN]), axis=0), channel, n


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
