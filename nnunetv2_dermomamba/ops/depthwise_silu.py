"""Depthwise 3 x 3 convolution and SiLU of a channels-last map: PyTorch's own, or one CUDA kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .axial_depthwise import taps_of
from .backends import own_cuda_kernels
from .depthwise import DepthwiseConv2d
from .library import no_double_backward


@torch.library.custom_op("dermomamba::depthwise_silu", mutates_args=())
def _forward(x: Tensor, weights: Tensor) -> Tensor:
    from .cuda_depthwise import silu_forward  # needs CUDA

    return silu_forward(x, weights)


@_forward.register_fake
def _(x: Tensor, weights: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("dermomamba::depthwise_silu_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    from .cuda_depthwise import silu_backward

    return silu_backward(dy, x, weights)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    return _backward(dy.contiguous(), *ctx.saved_tensors)


no_double_backward(_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)


def depthwise_silu(x: Tensor, conv: DepthwiseConv2d) -> Tensor:
    """``silu(conv(x))``.

    Args:
        x: (B, H, W, c).
        conv: 3 x 3, not dilated.

    Returns:
        (B, H, W, c), of autocast's type under autocast.
    """
    if x.is_cuda and x.numel() > 0 and x.shape[-1] % 4 == 0 and own_cuda_kernels(x.dtype):
        if torch.is_autocast_enabled("cuda"):
            x = x.to(torch.get_autocast_dtype("cuda"))
        return _forward(x, taps_of([conv]))
    return F.silu(conv(x.permute(0, 3, 1, 2)), inplace=not torch.is_grad_enabled()).permute(0, 2, 3, 1)
