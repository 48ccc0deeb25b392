"""The convolution of CBAM's spatial gate as CUDA kernels (``cuda/gate_convolution.cu``)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .cuda_block import INPUTS, aligned, ceil_div
from .nvrtc import launch

FILES = ("four.cuh", "input.cuh", "map_tiles.cuh", "gate_convolution.cu")
SIDE, CHANNELS = 7, 2
THREADS, ACROSS = 128, 8
WIDE = ACROSS * 4
"""Columns of a tile."""
MANY = 2 * 132
"""Tiles, and blocks that sum weights' gradients of a channel, that fill a large GPU: two for each of 132 processors."""


class Sizes(ctypes.Structure):
    """As in ``map_tiles.cuh``."""

    _fields_ = [(n, ctypes.c_int) for n in ("height", "width")]


def _tiles(x: Tensor, rows: int) -> int:
    """Tiles of the maps (batch, 2, height, width) whose results are made ``rows`` by a thread."""
    batch, _, height, width = x.shape
    return batch * ceil_div(height, THREADS // ACROSS * rows) * ceil_div(width, WIDE)


class Plan:
    """Sizes of one call for maps (batch, 2, height, width)."""

    def __init__(self, x: Tensor) -> None:
        self.rows = 4 if _tiles(x, 4) >= MANY else 1
        self.tiles = _tiles(x, self.rows)
        self.walkers = min(self.tiles, MANY)
        self.definitions = {"ROWS": self.rows, "INPUT": INPUTS[x.dtype]}
        self.sizes = Sizes(*x.shape[2:])

    @property
    def shared(self) -> tuple[int, int]:
        """Bytes of a block, forward and backward: weights and planes; backward later the threads' sums instead."""
        weights = CHANNELS * ceil_div(SIDE**2, 4) * 4
        plane = (THREADS // ACROSS * self.rows + SIDE - 1) * (WIDE + 8)
        return 4 * (weights + CHANNELS * plane), 4 * max(weights + plane, SIDE**2 * (THREADS + 2))


def gate_forward(x: Tensor, weight: Tensor) -> Tensor:
    """7 x 7 convolution of two channels to one with "same" padding, summed in float32.

    Args:
        x: (B, 2, H, W), float16, bfloat16 or float32.
        weight: (1, 2, 7, 7), float32.

    Returns:
        (B, 1, H, W) of ``x``'s type, contiguous.
    """
    plan = Plan(x)
    y = x.new_empty(x.shape[0], 1, *x.shape[2:])
    with torch.cuda.device_of(x):
        arguments = aligned(x), weight.contiguous(), y, plan.sizes
        launch(FILES, plan.definitions, "gate_forward", plan.tiles, THREADS, plan.shared[0], *arguments)
    return y


def gate_inference(maximum: Tensor, mean: Tensor, weight: Tensor, norm: Sequence[Tensor], eps: float) -> Tensor:
    """The gate: sigmoid of ``gate_forward`` of both maps, normalised by given statistics.

    Args:
        maximum: (B, H, W), float16, bfloat16 or float32.
        mean: as maximum.
        weight: (1, 2, 7, 7), float32.
        norm: BatchNorm's weight, bias, running mean and running variance, (1,), float32.
        eps: BatchNorm's.

    Returns:
        (B, 1, H, W) of ``maximum``'s type, contiguous.
    """
    y = maximum.new_empty(maximum.shape[0], 1, *maximum.shape[1:])
    plan = Plan(y)
    with torch.cuda.device_of(y):
        maps = aligned(maximum), aligned(mean)
        arguments = *maps, weight.contiguous(), *norm, ctypes.c_float(eps), y, plan.sizes
        launch(FILES, plan.definitions, "gate_inference", plan.tiles, THREADS, plan.shared[0], *arguments)
    return y


def gate_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``gate_forward`` with respect to x, contiguous and of its type, and the weight, float32."""
    plan = Plan(x)
    dx = x.new_empty(x.shape)
    parts = weight.new_empty(2 * plan.walkers, *weight.shape)
    with torch.cuda.device_of(x):
        arguments = aligned(dy), aligned(x), weight.contiguous(), dx, parts, plan.walkers, plan.tiles, plan.sizes
        blocks = CHANNELS * plan.walkers + plan.tiles
        launch(FILES, plan.definitions, "gate_backward", blocks, THREADS, plan.shared[1], *arguments)
        return dx, parts.sum(0)
