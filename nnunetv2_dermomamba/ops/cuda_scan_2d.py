"""The scan of a map in four directions as CUDA kernels (``cuda/scan_2d.cu``); interface as ``triton_scan_2d``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_block import (
    INPUTS,
    MAX_CHANNELS,
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
from .cuda_scan_1d import combine
from .nvrtc import launch

FILES = ("four.cuh", "walk.cuh", "input.cuh", "products.cuh", "scan_2d.cu", "paths_2d.cu")
LONG = 16
"""Blocks of SUB positions of a chunk at most, where a path is several."""
MANY_BLOCKS = 2048
"""Of one direction, which keep a large GPU busy while the other directions wait."""
PATH_THREADS, PATH_SUB = 64, 32
"""Threads that walk a path of few channels, and positions of it in shared memory: as in ``paths_2d.cu``."""
WHOLE_PATHS = 40_000
"""Such threads from which on that is faster than chunks with summaries: measured, 27 000 of 16 channels."""
RANK = 8
"""Shared rows for dt: the rank at most."""


class Map(ctypes.Structure):
    """As in ``scan_2d.cu``."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("height", "width", "d", "rank", "states", "spans", "subs", "first", "directions")
    ]


class Partial(ctypes.Structure):
    """As in ``scan_2d.cu``."""

    _fields_ = [("from_", ctypes.c_void_p), ("to", ctypes.c_void_p), ("size", ctypes.c_int)]


class Partials(ctypes.Structure):
    """As in ``scan_2d.cu``."""

    _fields_ = [("of", Partial * 5)]


def _is_lifted(block: Block) -> bool:
    """Whether ``dt_projs_weight`` is multiplied into ``x_proj_weight``: ``LIFTED`` in ``scan_2d.cu``."""
    return block.D <= 16


def _rows(block: Block) -> int:
    """Shared rows of a segment: u, delta, w, B, C and, where delta is not projected itself, dt."""
    return 3 * block.D + 2 * STATES + (0 if _is_lifted(block) else RANK)


def _weights_bytes(block: Block) -> int:
    """Bytes of a direction's weights in shared memory."""
    dt_rows, lift = (block.D, 0) if _is_lifted(block) else (RANK, block.D * (RANK + 4))
    row = block.D + (0 if block.D == 8 else 8)
    return 4 * ((dt_rows + 2 * STATES) * row + lift + block.D)


def _run(block: Block) -> int:
    """Sub-blocks that are walked back from one kept state: ``RUN`` in ``scan_2d.cu``."""
    return 1 if block.D == 8 else 2


def _backward_bytes(block: Block) -> int:
    """Bytes of a block's shared memory in the backward kernel, which has states of every STEPS of a run."""
    rows = _rows(block) + (0 if _is_lifted(block) else RANK) + 4 + block.D + block.summed_rows
    return block.rows_bytes(rows) + _weights_bytes(block) + _run(block) * SUB // STEPS * block.states_bytes


def _path_bytes(block: Block) -> int:
    """Bytes of shared memory of a block that walks a path: two sub-blocks' rows."""
    return 2 * _rows(block) * (PATH_SUB + 4) * 4 + _weights_bytes(block)


class Plan:
    """Sizes and constants of one call."""

    def __init__(self, x: Tensor, rank: int, states: int) -> None:
        self.batch, height, width, self.d = x.shape
        self.block = Block.of(self.d)
        self.subs = chunk_subs(height * width, 4 * self.batch, self.block, LONG)
        self.spans = ceil_div(height * width, self.block.segments * self.subs * SUB)
        self.chunks = self.spans * self.block.segments
        self.shared = self.block.rows_bytes(_rows(self.block)) + _weights_bytes(self.block)
        self.sizes = (height, width, self.d, rank, states, self.spans, self.subs)
        # of a backward launch: a direction alone adds to the map of those before it, which saves the memory of theirs
        self.directions = 1 if self.batch * self.spans >= MANY_BLOCKS else 4
        # of few channels, whose chunks are no whole paths in the backward pass
        self.walks_paths = self.block.D <= 16 and 4 * self.batch * PATH_THREADS >= WHOLE_PATHS
        self.definitions = {
            "D": self.block.D,
            "INPUT": INPUTS[x.dtype],
            "WHOLE": int(self.d == self.block.D),
        }

    def launch(self, name: str, shared: int, *arguments: Tensor | None, directions: int = 4) -> None:
        """Launch a kernel for all directions, so many at once, with a block for each span of a path."""
        for first in range(0, 4, directions):
            grid = self.batch * directions * self.spans
            sizes = Map(*self.sizes, first, directions)
            launch(FILES, self.definitions, name, grid, self.block.threads, shared, *arguments, sizes)

    @property
    def states_shape(self) -> list[int]:
        """See ``states_shape_2d``."""
        return [4 * self.batch * self.spans, ceil_div(self.subs, _run(self.block)), self.block.threads * 8]

    def directions_of(self, states: Tensor | None, x: Tensor, *parameters: Tensor) -> Tensor:
        """Results of the four directions, (4, *x.shape); fills ``states`` if they are given."""
        *weights, A, _ = parameters
        y = A.new_empty(4, *x.shape)
        if self.walks_paths:
            name, shared, sizes = "forward_paths_2d", _path_bytes(self.block), Map(*self.sizes, 0, 4)
            arguments = (x, *parameters, states, y, sizes)
            launch(FILES, self.definitions, name, 4 * self.batch, PATH_THREADS, shared, *arguments)
        else:
            starts = self.summaries("summary_2d", A, x, *weights)
            self.launch("forward_2d", self.shared, x, *parameters, starts, states, y)
        return y

    def sum(self, name: str, maps: Tensor, kind: torch.dtype) -> Tensor:
        """What the directions wrote as one map, in type ``kind``."""
        to = maps.new_empty(maps.shape[1:], dtype=kind)
        launch(
            FILES, self.definitions, name, ceil_div(to.numel(), 256), 256, 0, maps, to, ctypes.c_longlong(to.numel())
        )
        return to

    def sum_parts(self, arrays: list[Tensor]) -> list[Tensor]:
        """Five arrays of blocks' partial sums, each summed over its first axis."""
        sums = [m.new_empty(m.shape[1:]) for m in arrays]
        partials = Partials(
            tuple(Partial(m.data_ptr(), to.data_ptr(), to.numel()) for m, to in zip(arrays, sums, strict=True))
        )
        blocks = ceil_div(sum(m.numel() for m in sums), 8)
        parts = len(arrays[0])
        threads = 8 * _sharers(blocks, parts)
        launch(FILES, self.definitions, "sum_parts", blocks, threads, 4 * threads, partials, parts)
        return sums

    def summaries(self, name: str, A: Tensor, *arguments: Tensor) -> Tensor:
        """What enters every chunk, (batch, 4, chunks, d, N)."""
        if self.chunks == 1:
            return A.new_zeros(self.batch, 4, 1, self.d, STATES)
        state = A.new_empty(self.batch, 4, self.chunks, self.d, STATES)
        total = A.new_empty(self.batch, 4, self.chunks, self.d)
        self.launch(name, self.shared, *arguments, A, state, total)
        combine(FILES, self.definitions, state, total, A, 4, name == "adjoint_2d")
        return state


def serves_2d(x: Tensor, rank: int, states: int) -> bool:
    """Whether the kernels are made for such a call."""
    batch, height, width, d = x.shape
    if states > STATES or rank > RANK or d > MAX_CHANNELS or not x.numel() or height * width > MAX_POSITIONS:
        return False
    if 4 * batch * d >= MAX_SEQUENCES:
        return False
    return _backward_bytes(Block.of(d)) <= max_shared(x)


def states_shape_2d(x: Tensor, rank: int, state: int) -> list[int]:
    """Shape of ``states``: those of every thread before every run of sub-blocks, see ``kept_at`` in ``scan_2d.cu``."""
    return Plan(x, rank, state).states_shape


def scan_2d_directions(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> Tensor:
    """Results of the four directions, (4, B, H, W, d), for up to 128 channels, 16 states and a dt rank of 8."""
    plan = Plan(x, dt_projs_weight.shape[2], A.shape[1])
    with torch.cuda.device_of(x):
        return plan.directions_of(None, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)


def scan_2d_forward(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """See ``triton_scan_2d.scan_2d_forward``."""
    plan = Plan(x, dt_projs_weight.shape[2], A.shape[1])
    with torch.cuda.device_of(x):
        states = A.new_empty(plan.states_shape if keep else [0])
        kept = states if keep else None
        y = plan.directions_of(kept, x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
        return plan.sum("sum_outputs", y, torch.float32), states


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
    """See ``triton_scan_2d.scan_2d_backward``."""
    plan = Plan(x, dt_projs_weight.shape[2], A.shape[1])
    weights = (x_proj_weight, dt_projs_weight, dt_projs_bias)
    with torch.cuda.device_of(x):
        adjoints = plan.summaries("adjoint_2d", A, x, dy, *weights)
        one = plan.directions == 1  # at a time
        dx = A.new_empty(plan.directions, *x.shape)
        rounded = torch.empty_like(x) if one and x.dtype != dx.dtype else None
        lifted = _is_lifted(plan.block)
        of_dt = dt_projs_weight.shape if not lifted else (4, plan.d, plan.d)
        shapes = (x_proj_weight.shape, of_dt, dt_projs_bias.shape, A.shape, Ds.shape)
        sums = [A.new_empty(plan.batch * plan.spans, *shape) for shape in shapes]
        arguments = (dy, x, *weights, A, Ds, states, adjoints, dx, rounded, *sums)
        plan.launch("backward_2d", _backward_bytes(plan.block), *arguments, directions=plan.directions)
        dx_proj, ddt_projs, dbias, dA, dDs = plan.sum_parts(sums)
        if lifted:
            dx_dt, ddt_projs = _factors_gradients(ddt_projs, x_proj_weight, dt_projs_weight)
            dx_proj[:, : dx_dt.shape[1]] = dx_dt
        if one:
            return dx[0] if rounded is None else rounded, dx_proj, ddt_projs, dbias, dA, dDs
        return plan.sum("sum_gradients", dx, x.dtype), dx_proj, ddt_projs, dbias, dA, dDs


def _sharers(blocks: int, parts: int) -> int:
    """Threads that share a sum of ``parts``: the power of two that fills 132 processors, 8 to 128, if parts suffice."""
    filling = max(8, 132 * 2048 // (8 * blocks))
    return min(1 << filling.bit_length() - 1, 128, 1 << (parts - 1).bit_length())


def _factors_gradients(gradient: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of dt in ``x_proj_weight`` and of ``dt_projs_weight``, from that of their product, (4, d, d).

    By elements: small, and a matrix product's precision depends on PyTorch's settings.
    """
    dt_rows = x_proj_weight[:, : dt_projs_weight.shape[2]]
    return (dt_projs_weight[..., None] * gradient[:, :, None]).sum(1), (gradient[:, :, None] * dt_rows[:, None]).sum(3)
