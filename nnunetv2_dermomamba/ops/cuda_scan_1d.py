"""The 1D selective scan as CUDA kernels (``cuda/scan_1d.cu``); interface as ``triton_scan_1d``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_block import (
    INPUTS,
    MAX_POSITIONS,
    MAX_SEQUENCES,
    STATES,
    STEPS,
    SUB,
    Block,
    ceil_div,
    chunk_subs,
    max_shared,
)
from .nvrtc import launch

FILES = ("four.cuh", "walk.cuh", "input.cuh", "scan_1d.cu")
LONG = 8
"""Blocks of SUB positions of a chunk at most, where a sequence is several."""
COMBINING_WARPS, CHUNKS_A_WARP = 16, 32
"""Of a block that combines summaries, at most; of a warp at once: ``AHEAD`` in ``walk.cuh``."""


class Sizes(ctypes.Structure):
    """As in ``scan_1d.cu``."""

    _fields_ = [
        (name, ctypes.c_int) for name in ("length", "dim", "group_dim", "groups", "states", "blocks", "spans", "subs")
    ]


class Plan:
    """Sizes and constants of one call."""

    def __init__(self, u: Tensor, groups: int, states: int, softplus: bool) -> None:
        self.batch, self.dim, length = u.shape
        group_dim = self.dim // groups
        self.block = Block.of(group_dim)
        D, segments = self.block.D, self.block.segments
        self.blocks = ceil_div(group_dim, D)
        subs = chunk_subs(length, self.batch * groups * self.blocks, self.block, LONG)
        self.spans = ceil_div(length, segments * subs * SUB)
        self.chunks = self.spans * segments
        self.grid = self.batch * groups * self.blocks * self.spans
        self.sizes = Sizes(length, self.dim, group_dim, groups, states, self.blocks, self.spans, subs)
        self.saved = [self.grid, subs, D * STATES * segments]
        whole = group_dim % D == 0 and states == STATES and length % 4 == 0
        self.definitions = {"D": D, "INPUT": INPUTS[u.dtype], "WHOLE": int(whole), "SOFTPLUS": int(softplus)}

    @property
    def backward_shared(self) -> int:
        """Bytes of a block's shared memory in the backward kernel, which wants most."""
        rows = 3 * self.block.D + 4 + 2 * STATES + self.block.summed_rows
        return self.block.rows_bytes(rows) + SUB // STEPS * self.block.states_bytes

    def launch(self, name: str, shared: int, *arguments: Tensor | None) -> None:
        """Launch a kernel with ``shared`` bytes of shared memory."""
        launch(FILES, self.definitions, name, self.grid, self.block.threads, shared, *arguments, self.sizes)

    def summaries(self, name: str, v: Tensor, delta: Tensor, bias: Tensor | None, A: Tensor, m: Tensor) -> Tensor:
        """What enters every chunk, (batch, chunks, dim, N)."""
        if self.chunks == 1:
            return A.new_zeros(self.batch, 1, self.dim, STATES)
        state = A.new_empty(self.batch, self.chunks, self.dim, STATES)
        total = A.new_empty(self.batch, self.chunks, self.dim)
        self.launch(name, self.block.rows_bytes(2 * self.block.D + STATES), v, delta, bias, A, m, state, total)
        combine(FILES, self.definitions, state, total, A, 1, name == "adjoint_1d")
        return state


def combine(
    files: tuple[str, ...], definitions: dict[str, int], state: Tensor, total: Tensor, A: Tensor, directions: int,
    reversed_: bool,
) -> None:  # fmt: skip
    """Turn chunks' summaries into what enters them, in place.

    Args:
        files: with ``walk.cuh``.
        definitions: macros.
        state: (..., chunks, rows, N).
        total: (..., chunks, rows), sums of step sizes.
        A: (directions * rows, states).
        directions: sequence i has the i-th run of ``rows`` of A, modulo this.
        reversed_: whether what enters comes from behind.
    """
    chunks, rows = state.shape[-3:-1]
    count = state.numel() // chunks
    threads = 32 * min(COMBINING_WARPS, ceil_div(chunks, CHUNKS_A_WARP))
    launch(
        files, definitions, "combine", ceil_div(count, 32), threads, 8 * threads,
        state, total, A, rows, chunks, A.shape[1], directions, int(reversed_), count,
    )  # fmt: skip


def serves_1d(u: Tensor, groups: int, states: int) -> bool:
    """Whether the kernels are made for such a call."""
    fits = states <= STATES and u.numel() > 0 and u.shape[2] <= MAX_POSITIONS
    fits = fits and u.shape[0] * u.shape[1] < MAX_SEQUENCES
    return fits and Plan(u, groups, states, True).backward_shared <= max_shared(u)


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (blocks, points in time, states of a block)."""
    return Plan(u, groups, state, True).saved


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
    """See ``triton_scan_1d.scan_1d_forward``; for up to 16 states."""
    plan = Plan(u, B.shape[1], A.shape[1], delta_softplus)
    with torch.cuda.device_of(u):
        y = torch.empty_like(u, dtype=torch.float32)
        starts = plan.summaries("summary_1d", u, delta, delta_bias, A, B)
        saved = A.new_empty(plan.saved)
        shared = plan.block.rows_bytes(2 * plan.block.D + 2 * STATES)
        plan.launch("forward_1d", shared, u, delta, delta_bias, A, B, C, D, starts, saved, y)
    return y, saved


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
    """See ``triton_scan_1d.scan_1d_backward``."""
    plan = Plan(u, B.shape[1], A.shape[1], delta_softplus)
    with torch.cuda.device_of(u):
        adjoints = plan.summaries("adjoint_1d", dy, delta, delta_bias, A, C)
        du, ddelta = (torch.empty_like(u, dtype=torch.float32) for _ in range(2))
        dB, dC = (A.new_empty(plan.blocks, *B.shape) for _ in range(2))
        sums = A.new_empty(plan.batch * plan.spans, plan.dim, A.shape[1] + 2)  # of A, D and the bias
        plan.launch(
            "backward_1d", plan.backward_shared, dy, u, delta, delta_bias, A, B, C, D, states, adjoints,
            du, ddelta, dB, dC, sums,
        )  # fmt: skip
    dA, dD, dbias = (m.clone() for m in sums.sum(0).split([A.shape[1], 1, 1], dim=1))
    given = ((dD, D), (dbias, delta_bias))
    dD, dbias = (torch.zeros_like(m[:, 0]) if parameter is None else m[:, 0] for m, parameter in given)
    dB, dC = (m[0] if len(m) == 1 else m.sum(0) for m in (dB, dC))
    return du, ddelta, dA, dB, dC, dD, dbias
