"""The encoder's three axial branches as one operator: what passes between its convolutions stays on chip."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import own_cuda_kernels
from .library import no_double_backward


@torch.library.custom_op("dermomamba::axial_depthwise", mutates_args=())
def _forward(x: Tensor, weights: Tensor) -> Tensor:
    from .cuda_depthwise import axial_forward  # needs CUDA

    return axial_forward(x, weights)


@_forward.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(3 * x.shape[0], *x.shape[1:3], x.shape[3] // 3)


@torch.library.custom_op("dermomamba::axial_depthwise_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    from .cuda_depthwise import axial_backward

    return axial_backward(dy, x, weights)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dy.contiguous(), *ctx.saved_tensors)


no_double_backward(_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)


def taps_of(convolutions: Sequence[nn.Conv2d]) -> Tensor:
    """Weights and biases of depthwise convolutions of c channels, (taps, c): a kernel's, its bias, the next one's.

    In float32, as the kernels read them.
    """
    rows = [m for conv in convolutions for m in (conv.weight.flatten(1).t(), conv.bias[None])]  # type: ignore[index]
    return torch.cat(rows).float()


def axial_kernels_serve(x: Tensor, channels: int) -> bool:
    """Whether ``axial_depthwise`` can be asked for branches of so many channels of maps like ``x``."""
    return x.is_cuda and x.numel() > 0 and channels % 4 == 0 and own_cuda_kernels(x.dtype)


def axial_depthwise(x: Tensor, branches: Sequence[Sequence[nn.Conv2d]]) -> Tensor:
    """``x + dw3x3(dw7x1(dw1x7(x)))`` of three branches with dilations 1, 2 and 3, biased, "same" padding.

    Args:
        x: (B, H, W, 3 c), the branches' channels one after the other.
        branches: the three convolutions of each.

    Returns:
        (3 B, H, W, c), of autocast's type under autocast.
    """
    if torch.is_autocast_enabled("cuda"):
        x = x.to(torch.get_autocast_dtype("cuda"))
    return _forward(x, torch.stack([taps_of(convolutions) for convolutions in branches]))
