"""3 x 3 convolutions of few channels as CUDA kernels (``cuda/convolution.cu``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_block import INPUTS, aligned, ceil_div
from .nvrtc import launch

FILES = ("four.cuh", "input.cuh", "map_tiles.cuh", "convolution.cu")
SIDE, WARPS, WIDE = 3, 12, 32
"""Of the kernel; of a block, each of which makes a row of a tile; columns of a tile."""
PROCESSORS = 132
"""Of a large GPU."""
PARTS = WARPS // SIDE
"""Of the weights' gradient, that a block makes: ``SUBSETS`` in ``convolution.cu``."""


class Sizes(ctypes.Structure):
    """As in ``map_tiles.cuh``."""

    _fields_ = [(n, ctypes.c_int) for n in ("height", "width")]


class Plan:
    """Sizes of one call for maps (batch, channels, height, width) and weights (channels of results, channels, 3, 3)."""

    def __init__(self, x: Tensor, weight: Tensor) -> None:
        batch, _, *size = x.shape
        self.to, self.from_ = weight.shape[:2]
        self.definitions = {"FROM": self.from_, "TO": self.to, "INPUT": INPUTS[x.dtype]}
        self.sizes = Sizes(*size)
        self.tiles = batch * ceil_div(size[0], WARPS) * ceil_div(size[1], WIDE)

    def shared(self, around: int, inside: int = 0) -> int:
        """Bytes of a block: weights, and two tiles' maps of so many channels, the first with a border."""
        bordered, plain = (WARPS + 2) * (WIDE + 2), WARPS * WIDE
        return 2 * (SIDE**2 * self.from_ * self.to + 2 * (bordered * around + plain * inside))


def _channels_last(x: Tensor) -> Tensor:
    """(B, C, H, W) as aligned memory of (B, H, W, C)."""
    return aligned(x.permute(0, 2, 3, 1))


def convolution_forward(x: Tensor, weight: Tensor) -> Tensor:
    """3 x 3 convolution with "same" padding, summed in float32.

    Args:
        x: (B, c, H, W), float16 or bfloat16; faster channels last. c and d are 16 or 32.
        weight: (d, c, 3, 3), float32; rounded to ``x``'s type.

    Returns:
        (B, d, H, W) of ``x``'s type, channels last.
    """
    plan = Plan(x, weight)
    y = x.new_empty(x.shape[0], *x.shape[2:], plan.to)
    with torch.cuda.device_of(x):
        arguments = _channels_last(x), weight.contiguous(), y, plan.tiles, plan.sizes
        blocks, shared = min(plan.tiles, 2 * PROCESSORS), plan.shared(plan.from_)
        launch(FILES, plan.definitions, "convolution_forward", blocks, WARPS * 32, shared, *arguments)
    return y.permute(0, 3, 1, 2)


def convolution_backward(dy: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of ``convolution_forward`` with respect to x, channels last and of its type, and weight, float32."""
    plan = Plan(x, weight)
    dx = x.new_empty(x.shape[0], *x.shape[2:], plan.from_)
    blocks = min(plan.tiles, PROCESSORS)
    parts = weight.new_empty(blocks * PARTS, *weight.shape)
    with torch.cuda.device_of(x):
        maps = _channels_last(dy), _channels_last(x)
        arguments = *maps, weight.contiguous(), dx, parts, plan.tiles, plan.sizes
        shared = plan.shared(plan.to, plan.from_)
        launch(FILES, plan.definitions, "convolution_backward", blocks, WARPS * 32, shared, *arguments)
        return dx.permute(0, 3, 1, 2), parts.sum(0)
