# mypy: disable-error-code="no-untyped-def, misc"
# (misc: kernels build tuples in unrolled loops, whose lengths mypy does not follow)
"""What the 1D and the 2D Triton scan share: tile shapes, the serial walks over rows, the scan over chunks.

A sequence is cut into chunks of ``T`` positions; a program walks ``S`` adjacent chunks ("segments") side by side, a
sub-block of ``SUB`` positions of each at a time, with the states in registers. It first puts what the steps of a
sub-block need (step size ``delta``, w = delta u, B and C) into rows of a small scratch of its own, which stays in
cache: the 1D scan from its inputs, the 2D scan by projecting the map.

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
CHUNK = 128  # T, positions between two chunk summaries of a long sequence
LONG = 4096  # positions above which a sequence is long
SUB = 16  # positions whose rows are in the scratch at once; divides CHUNK
BACKWARD_REGISTERS = 255  # a thread, 8 warps a processor: the backward walk holds four steps' states and decays
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
    HOLD: int = 8  # positions between two saved states; divides SUB

    @property
    def lanes(self) -> int:
        """Threads of a program."""
        return self.S * (self.DP // self.R) * (self.NP // self.NN)

    @property
    def num_warps(self) -> int:
        """Warps of a program."""
        return max(1, self.lanes // 32)

    @property
    def forward_registers(self) -> int:
        """Registers a thread of the summary and forward kernels: what 8 or 16 states want without spilling."""
        return 168 if self.R * self.NN > 8 else 128

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
        return self.P * (3 * self.DP + 2 * self.NP + self.parts * 2 * self.NP)

    @property
    def parts(self) -> int:
        """Sums over channels that ``gradients`` leaves of dB and dC: one for each warp of a segment."""
        return max(1, self.DP // self.R // 8)

    @property
    def saved_states(self) -> tuple[int, int]:
        """Shape of the states that a work item saves: (points in time, states of all its lanes)."""
        return self.T // self.HOLD, self.S * self.DP * self.NP

    def constants(self) -> dict[str, int]:
        """Keyword arguments of the kernels."""
        names = ("DP", "NP", "R", "NN", "S", "T", "SUB", "HOLD", "num_warps")
        return {name: getattr(self, name) for name in names}


def tile_for(channels: int, state: int, length: int, stretch: int = 1) -> Tile:
    """Tile for one block of ``channels`` (at most ``MAX_BLOCK``) of sequences of ``length``.

    A thread holds 8 states of up to 16 channels and 16 of more: the more, the fewer loads an update, and the fewer
    threads. ``stretch`` lengthens the chunks. What measured best (docs/selective_scan.md).
    """
    padded, states = triton.next_power_of_2(channels), triton.next_power_of_2(state)
    run = min(4 if padded > 16 else 2, padded)
    held = min(4, states)
    segments = max(2, 32 // (padded // run * (states // held)))
    chunk = CHUNK if length > LONG else 32 if length > 512 else SUB  # short sequences want more programs
    return Tile(padded, states, run, held, segments, chunk * stretch, SUB)


def ceil_div(a: int, b: int) -> int:
    """Smallest integer not below ``a / b``."""
    return -(-a // b)


def chunk_count(length: int, tile: Tile) -> int:
    """Chunks of a sequence, filled up to whole programs."""
    return ceil_div(length, tile.span) * tile.S


def programs_at_once(like: Tensor, per_processor: int) -> int:
    """Programs that the tensor's device runs at once; 2 where kernels are interpreted."""
    if like.device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(like.device).multi_processor_count * per_processor


def resident_programs(like: Tensor, tile: Tile, registers: int) -> int:
    """Programs of ``registers`` a thread that the tensor's device holds at once, one a processor at least."""
    return programs_at_once(like, max(1, 65536 // registers // (32 * tile.num_warps)))


def launch(
    like: Tensor, items: int, tile: Tile, floats: int, registers: int
) -> tuple[Tensor, tuple[int], dict[str, int]]:
    """Scratch (``floats`` a program), grid and options of a persistent launch that ``registers`` a thread can fill.

    As many programs as the device holds at once, so that each keeps its scratch in the cache.
    """
    programs = min(items, resident_programs(like, tile, registers))
    return like.new_empty(programs * floats, dtype=torch.float32), (programs,), {"maxnreg": registers, "num_stages": 1}


@triton.jit
def exp2(x):
    """The hardware's own: results below the smallest normal number are 0, which spares the code that scales them."""
    if INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def softplus(x):
    """``max(x, 0) + log1p(exp(-|x|))``, log1p(t) as t times a polynomial: tiny results stay relatively exact.

    Of degree 8, with the least relative error on [0, 1], 3e-8; fitted by iteratively reweighted least squares.
    """
    t = exp2(tl.abs(x) * -LOG2E)
    series = -0.0295052325 + t * 0.0052326927
    series = -0.136632449 + t * (0.0782259417 + t * series)
    series = -0.248429821 + t * (0.191060064 + t * series)
    series = -0.499994931 + t * (0.333190968 + t * series)
    return tl.maximum(x, 0.0) + t * (1.0 + t * series)


@triton.jit
def softplus_slope(delta):
    """Derivative of ``softplus`` from its value: ``1 - exp(-delta)``, by its series where that would cancel."""
    series = delta * (1.0 - delta * (0.5 - delta * (1 / 6 - delta * (1 / 24 - delta * (1 / 120)))))
    return tl.where(delta < 0.1, series, 1.0 - exp2(delta * -LOG2E))


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
    """Where a lane's states lie among a work item's saved ones: a channel's side by side, adjacent lanes next."""
    LANES: tl.constexpr = S * (DP // R) * (NP // NN)
    lane = tl.arange(0, LANES)[:, None, None] * NN + tl.arange(0, NN)[None, None, :]
    return lane + tl.arange(0, R)[None, :, None] * (LANES * NN)


@triton.jit
def load_decay(A_ptr, channel, n, d, N):
    """``A log2(e)`` as ``[LANES, R, NN]``; 0 (no decay) where padded."""
    return tl.load(A_ptr + channel * N + n, mask=(channel < d) & (n < N), other=0.0) * LOG2E


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
def advance(h, delta, w, b, A2):
    """States after each of four steps, ``h = a h + w B``."""
    states = ()
    for i in tl.static_range(4):
        h = h * exp2(_pick(delta, i) * A2) + _pick(w, i) * _pick(b, i)
        states = states + (h,)  # noqa: RUF005  (kernels know no starred tuples)
    return states


@triton.jit
def retreat(g, delta, dy, c, A2):
    """Adjoint that leaves four steps towards their start, ``g = a (g + dy C)``."""
    for i in tl.static_range(3, -1, -1):
        g = (g + _pick(dy, i) * _pick(c, i)) * exp2(_pick(delta, i) * A2)
    return g


@triton.jit
def sum_of_steps(delta):
    """Sum of four steps, ``[LANES, R, 1]``."""
    return _pick(delta, 0) + _pick(delta, 1) + _pick(delta, 2) + _pick(delta, 3)


@triton.jit
def sum_over_lanes(x, OUTER: tl.constexpr, W: tl.constexpr, INNER: tl.constexpr):
    """``[LANES, X, Y]`` summed over the middle factor of ``LANES = OUTER W INNER``; every lane gets its sum.

    In the walk's own layout, so it is shuffles alone: any other one would cost a trip through shared memory.
    """
    if W == 1:
        return x
    shape: tl.constexpr = [OUTER, W, INNER, x.shape[1], x.shape[2]]
    total = tl.sum(tl.reshape(x, shape), axis=1, keep_dims=True)
    return tl.reshape(tl.broadcast_to(total, shape), x.shape)


@triton.jit
def outputs(states, c, GROUPS: tl.constexpr, NL: tl.constexpr):
    """``y = <C, h>`` of four steps, ``[LANES, R, 4]`` with ``LANES = GROUPS NL``."""
    ys = ()
    for i in tl.static_range(4):
        ys = ys + (tl.sum(states[i] * _pick(c, i), axis=2),)  # noqa: RUF005
    return sum_over_lanes(_pack(ys[0], ys[1], ys[2], ys[3]), GROUPS, NL, 1)


@triton.jit
def gradients(
    g, dA, before, states, delta, w, b, c, dy, A2,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr
):  # fmt: skip
    """Gradients of four steps, from the states before and after each and the adjoint ``g`` behind them.

    The decays never divide, so underflow is harmless.

    Returns:
        The adjoint before them; ``dA`` with theirs added; of each step ``sum_n g B`` and ``sum_n (g a h_before) A``,
        ``[LANES, R, 4]``; dB and dC, sums over up to 8 groups of channels, ``[LANES, NN, 4]``. Lanes that share a sum
        all have it.
    """
    NL: tl.constexpr = NP // NN
    G: tl.constexpr = DP // R
    E: tl.constexpr = G if G < 8 else 8
    PARTS: tl.constexpr = S * (G // E)
    by_input = ()
    by_decay = ()
    dbs = ()
    dcs = ()
    for i in tl.static_range(3, -1, -1):
        step = _pick(delta, i)
        dy_i = _pick(dy, i)
        g += dy_i * _pick(c, i)
        dcs = (tl.sum(dy_i * states[i], axis=1),) + dcs  # noqa: RUF005
        dbs = (tl.sum(_pick(w, i) * g, axis=1),) + dbs  # noqa: RUF005
        by_input = (tl.sum(g * _pick(b, i), axis=2),) + by_input  # noqa: RUF005
        g *= exp2(step * A2)
        q = g * (states[i - 1] if i > 0 else before)
        dA += q * step
        by_decay = (tl.sum(q * A2, axis=2),) + by_decay  # noqa: RUF005
    by_input = sum_over_lanes(_pack(by_input[0], by_input[1], by_input[2], by_input[3]), S * G, NL, 1)
    by_decay = sum_over_lanes(_pack(by_decay[0], by_decay[1], by_decay[2], by_decay[3]), S * G, NL, 1)
    db = sum_over_lanes(_pack(dbs[0], dbs[1], dbs[2], dbs[3]), PARTS, E, NL)
    dc = sum_over_lanes(_pack(dcs[0], dcs[1], dcs[2], dcs[3]), PARTS, E, NL)
    return g, dA, by_input, by_decay * LN2, db, dc


@triton.jit
def turned_cells(col, per_segment: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr):
    """Offsets in the scratch, ``[SUB / 4, per_segment, S, 4]``, of a sub-block's rows as ``[columns, S SUB]``."""
    r = tl.arange(0, S * SUB)[None, :]
    return r // 4 % (SUB // 4) * (S * per_segment * 4) + (col[:, None] * S + r // SUB) * 4 + r % 4


@triton.jit
def _rows(segment, index, S: tl.constexpr):
    """Offsets ``[..., 4]`` in the scratch of the first four steps of rows."""
    return ((index * S + segment) * 4)[:, :, :, None] + tl.arange(0, 4)[None, None, None, :]


@triton.jit
def walk_summary(
    delta_ptr, v_ptr, m_ptr, h, total, A2, segment, channel, n,
    ADJOINT: tl.constexpr, DP: tl.constexpr, NP: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr
):  # fmt: skip
    """Carry a segment's state and the sum of its steps over ``SUB`` positions; ADJOINT: from the last to the first.

    ``v_ptr`` holds w or dy, ``m_ptr`` B or C.
    """
    row = _rows(segment, channel, S)
    m_row = _rows(segment, n, S)
    for k in range(SUB // 4):
        at = (SUB - 4 - k * 4) if ADJOINT else k * 4
        delta = tl.load(delta_ptr + row + at * (S * DP))
        v = tl.load(v_ptr + row + at * (S * DP))
        m = tl.load(m_ptr + m_row + at * (S * NP))
        if ADJOINT:  # noqa: SIM108
            h = retreat(h, delta, v, m, A2)
        else:
            h = advance(h, delta, v, m, A2)[3]
        total += sum_of_steps(delta)
    return h, total


@triton.jit
def walk_states(
    delta_ptr, w_ptr, b_ptr, saved_ptr, h, A2, segment, channel, n, saved,
    DP: tl.constexpr, NP: tl.constexpr, S: tl.constexpr, SUB: tl.constexpr, HOLD: tl.constexpr
):  # fmt: skip
    """Carry the states over ``SUB`` positions, and save those before every ``HOLD``."""
    row = _rows(segment, channel, S)
    b_row = _rows(segment, n, S)
    for k in range(SUB // 4):
        at = k * 4
        if at % HOLD == 0:
            tl.store(saved_ptr + at // HOLD * (S * DP * NP) + saved, h)
        delta = tl.load(delta_ptr + row + at * (S * DP))
        w = tl.load(w_ptr + row + at * (S * DP))
        b = tl.load(b_ptr + b_row + at * (S * NP))
        h = advance(h, delta, w, b, A2)[3]
    return h


@triton.jit
def walk_output(
    delta_ptr, w_ptr, bc_ptr, saved_ptr, h, A2, segment, channel, n, saved,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    SUB: tl.constexpr, HOLD: tl.constexpr, SAVE: tl.constexpr
):  # fmt: skip
    """``y = <C, h>`` of every position, written over w; SAVE: saves the states before every ``HOLD`` positions."""
    row = _rows(segment, channel, S)
    bc_row = _rows(segment, n, S)
    y_row = (channel * S + segment) * 4 + tl.arange(0, 4)[None, None, :]
    first = tl.arange(0, row.shape[0])[:, None, None] % (NP // NN) == 0  # of the lanes that share a channel
    for k in range(SUB // 4):
        at = k * 4
        if SAVE:  # noqa: SIM102  (Triton before 3.4 evaluates both sides of an "and")
            if at % HOLD == 0:
                tl.store(saved_ptr + at // HOLD * (S * DP * NP) + saved, h)
        delta = tl.load(delta_ptr + row + at * (S * DP))
        w = tl.load(w_ptr + row + at * (S * DP))
        b = tl.load(bc_ptr + bc_row + at * (S * 2 * NP))
        c = tl.load(bc_ptr + NP * S * 4 + bc_row + at * (S * 2 * NP))
        states = advance(h, delta, w, b, A2)
        h = states[3]
        tl.store(w_ptr + y_row + at * (S * DP), outputs(states, c, S * (DP // R), NP // NN), mask=first)
    return h


@triton.jit
def walk_back(
    delta_ptr, w_ptr, bc_ptr, dy_ptr, dbc_ptr, saved_ptr, g, dA, A2, segment, channel, n, saved,
    DP: tl.constexpr, NP: tl.constexpr, R: tl.constexpr, NN: tl.constexpr, S: tl.constexpr,
    SUB: tl.constexpr, HOLD: tl.constexpr, AHEAD: tl.constexpr
):  # fmt: skip
    """Gradients of every position, from the saved states and the adjoints ``g`` that enter at the segments' ends.

    Writes those with respect to w over w, the decays' part of those with respect to delta over dy, and the partial
    sums of dB and dC to ``dbc_ptr``; returns the adjoints that leave and the gradient of A, added to ``dA``. AHEAD:
    the saved states are loaded four steps before their use.
    """
    NL: tl.constexpr = NP // NN
    G: tl.constexpr = DP // R
    E: tl.constexpr = G if G < 8 else 8
    row = _rows(segment, channel, S)
    bc_row = _rows(segment, n, S)
    lane = tl.arange(0, row.shape[0])[:, None, None]
    group = lane // NL % G
    t4 = tl.arange(0, 4)[None, None, :]
    out_row = (channel * S + segment) * 4 + t4
    m = tl.arange(0, NN)[None, :, None] * NL + lane % NL
    dbc_row = ((group // E * (2 * NP) + m) * S + segment) * 4 + t4
    first_of_channel = lane % NL == 0
    first_of_state = group % E == 0
    if AHEAD:
        ahead = tl.load(saved_ptr + (SUB - 4) // HOLD * (S * DP * NP) + saved)
    for back in range(SUB // 4):
        at = SUB - 4 - back * 4
        if AHEAD:
            h = ahead
            ahead = tl.load(saved_ptr + tl.maximum(at - 4, 0) // HOLD * (S * DP * NP) + saved)
        else:
            h = tl.load(saved_ptr + at // HOLD * (S * DP * NP) + saved)
        for k in range(at // HOLD * HOLD, at, 4):
            delta = tl.load(delta_ptr + row + k * (S * DP))
            w = tl.load(w_ptr + row + k * (S * DP))
            b = tl.load(bc_ptr + bc_row + k * (S * 2 * NP))
            h = advance(h, delta, w, b, A2)[3]
        delta = tl.load(delta_ptr + row + at * (S * DP))
        w = tl.load(w_ptr + row + at * (S * DP))
        b = tl.load(bc_ptr + bc_row + at * (S * 2 * NP))
        states = advance(h, delta, w, b, A2)
        dy = tl.load(dy_ptr + row + at * (S * DP))
        c = tl.load(bc_ptr + NP * S * 4 + bc_row + at * (S * 2 * NP))
        g, dA, by_input, by_decay, db, dc = gradients(g, dA, h, states, delta, w, b, c, dy, A2, DP, NP, R, NN, S)
        tl.store(w_ptr + out_row + at * (S * DP), by_input, mask=first_of_channel)
        tl.store(dy_ptr + out_row + at * (S * DP), by_decay, mask=first_of_channel)
        tl.store(dbc_ptr + dbc_row + at * (S * (G // E) * 2 * NP), db, mask=first_of_state)
        tl.store(dbc_ptr + NP * S * 4 + dbc_row + at * (S * (G // E) * 2 * NP), dc, mask=first_of_state)
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
    lanes = min(128, triton.next_power_of_2(d * N))  # of one warp, which then scans 16 rows within its threads
    rows = min(16, max(2, triton.next_power_of_2(chunks)))
    grid = (state.numel() // (chunks * d * N), ceil_div(d * N, lanes))
    combine_kernel[grid](state, total, A, chunks, d, N, directions, reverse, lanes, rows, num_warps=1)
