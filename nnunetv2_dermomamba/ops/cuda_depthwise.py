"""Depthwise convolutions of channels-last maps as CUDA kernels, several at once (``cuda/depthwise.cu``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import nvrtc
from .cuda_block import INPUTS, ceil_div, max_shared
from .nvrtc import launch

FILES = ("four.cuh", "input.cuh", "tile.cuh", "taps.cuh", "weight_gradient.cuh", "depthwise.cu")
THREADS = 256
WARPS, MOST_SUMS = THREADS // 32, 40
"""As in ``weight_gradient.cuh``."""
QUAD = 4
"""Channels of a block."""
AXIAL_TAPS, SILU_TAPS = 26, 10
"""Rows of the weights: every tap of every kernel, and the kernels' biases."""


class Sizes(ctypes.Structure):
    """As in ``tile.cuh``."""

    _fields_ = [(n, ctypes.c_int) for n in ("height", "width", "channels")]


def _plane(rows: int, columns: int) -> int:
    """Quads of a plane, whose rows are an odd number of quads apart."""
    return rows * (columns | 1)


def _quads_axial(tile: int) -> tuple[int, int]:
    """Quads in shared memory at dilation 3, forward and backward (``Axial``)."""
    whole, rows, square = _plane(tile + 24, tile + 24), _plane(tile + 24, tile + 6), _plane(tile + 6, tile + 6)
    back = _plane(tile + 18, tile + 18) + _plane(tile, tile + 18)
    return whole + rows + square, 2 * whole + rows + back


def _quads_silu(tile: int) -> tuple[int, int]:
    before = _plane(tile + 2, tile + 2)
    return before, _plane(tile + 4, tile + 4) + before


def _bytes(quads: int, taps: int, size: int, backward: bool) -> int:
    """Of a block's shared memory: weights, backward the warps' sums of their gradients, and planes."""
    return 4 * (taps * QUAD + (WARPS * MOST_SUMS if backward else 0)) + quads * QUAD * size


def _backward_bytes(tile: int, size: int) -> int:
    """Of a block of the hungriest kernel."""
    return _bytes(_quads_axial(tile)[1], AXIAL_TAPS, size, backward=True)


def _tile(size: int, side: int, limit: int) -> int:
    """Side of a block's tile, in all kernels, for values of ``size`` bytes, a map's longer side and ``limit`` bytes."""
    return 32 if side > 16 and _backward_bytes(32, size) <= limit else 16


class Plan:
    """Sizes of one call for a map (batch, height, width, branches channels) and weights (branches, taps, channels)."""

    def __init__(self, x: Tensor, weights: Tensor) -> None:
        self.batch, height, width, _ = x.shape
        self.branches, (taps, self.channels) = weights.shape[:-2].numel(), weights.shape[-2:]
        self.tile = _tile(x.element_size(), max(height, width), max_shared(x))
        self.parts = self.batch * ceil_div(height, self.tile) * ceil_div(width, self.tile)
        self.grid = self.parts * self.branches * (self.channels // QUAD)
        quads = (_quads_axial if self.branches > 1 else _quads_silu)(self.tile)
        self.shared = [_bytes(q, taps, x.element_size(), i == 1) for i, q in enumerate(quads)]
        self.definitions = {"TILE": self.tile, "INPUT": INPUTS[x.dtype]}
        self.sizes = Sizes(height, width, self.channels)

    def launch(self, name: str, *arguments: Tensor | int) -> None:
        """Launch a kernel."""
        shared = self.shared[name.endswith("backward")]
        batches = [self.batch] if self.branches > 1 else []  # which branches' maps lie behind each other
        *tensors, pitch = arguments
        launch(FILES, self.definitions, name, self.grid, THREADS, shared, *tensors, *batches, pitch, self.sizes)


def fits(kind: torch.dtype) -> bool:
    """Whether the current device's shared memory holds the planes of maps of this type."""
    return _backward_bytes(16, kind.itemsize) <= nvrtc.max_shared(torch.cuda.current_device())


def _pitched(x: Tensor) -> tuple[Tensor, int]:
    """(..., channels) whose positions follow each other at one distance, in elements."""
    height, width = x.shape[1:3]
    pitch = x.stride(2)
    size = x.element_size() * QUAD
    dense = x.stride() == (height * width * pitch, width * pitch, pitch, 1)
    if not dense or pitch % QUAD or x.data_ptr() % size:
        x = x.contiguous()
        return x if x.data_ptr() % size == 0 else x.clone(), x.shape[3]  # the stride of one column may be anything
    return x, pitch


def _forward(kernel: str, x: Tensor, weights: Tensor) -> Tensor:
    plan = Plan(x, weights)
    y = x.new_empty(plan.branches * plan.batch, *x.shape[1:3], plan.channels)
    x, pitch = _pitched(x)
    with torch.cuda.device_of(x):
        plan.launch(f"{kernel}_forward", x, weights.contiguous(), y, pitch)
    return y


def _backward(kernel: str, dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    plan = Plan(x, weights)
    dx = x.new_empty(x.shape)
    sums = weights.new_empty(plan.parts, *weights.shape)
    x, pitch = _pitched(x)
    with torch.cuda.device_of(x):
        dy, _ = _pitched(dy.contiguous())
        plan.launch(f"{kernel}_backward", dy, x, weights.contiguous(), dx, sums, pitch)
        return dx, sums.sum(0)


def axial_forward(x: Tensor, weights: Tensor) -> Tensor:
    """``x + dw3x3(dw7x1(dw1x7(x)))`` of three branches with dilations 1, 2 and 3, and "same" padding.

    Args:
        x: (B, H, W, 3 c), the branches' channels one after the other, float16, bfloat16 or float32; c a multiple of 4.
        weights: (3, 26, c), float32: 1 x 7, its bias, 7 x 1, its bias, 3 x 3, its bias.

    Returns:
        (3 B, H, W, c) of ``x``'s type, contiguous.
    """
    return _forward("axial", x, weights)


def axial_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``axial_forward`` with respect to x, contiguous and of its type, and the weights."""
    return _backward("axial", dy, x, weights)


def silu_forward(x: Tensor, weights: Tensor) -> Tensor:
    """``silu(dw3x3(x))`` with "same" padding.

    Args:
        x: (B, H, W, c), float16, bfloat16 or float32; c a multiple of 4.
        weights: (10, c), float32: 3 x 3, its bias.

    Returns:
        (B, H, W, c) of ``x``'s type, contiguous.
    """
    return _forward("silu", x, weights)


def silu_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``silu_forward`` with respect to x, contiguous and of its type, and the weights."""
    return _backward("silu", dy, x, weights)
