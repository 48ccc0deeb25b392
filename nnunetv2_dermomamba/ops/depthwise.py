"""Depthwise convolution: PyTorch's own, or kernels where Triton serves a GPU and Numba a CPU.

On a CPU the forward pass of a training stays PyTorch's; its backward pass takes up to ten times as long as the kernel.
In inference the kernel serves, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backends import choose_backend, own_gpu_kernels
from .library import as_autocast, no_double_backward
from .numba_serves import numba_infers


@torch.library.custom_op("dermomamba::depthwise", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    if x.device.type == "cpu":
        from .cpu_depthwise import depthwise_forward
    else:
        from .triton_depthwise import depthwise_forward  # Triton need not be there for PyTorch's own

    return depthwise_forward(x, weight, bias, dilation)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("dermomamba::depthwise_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    if x.device.type == "cpu":
        from .cpu_depthwise import depthwise_backward
    else:
        from .triton_depthwise import depthwise_backward

    return depthwise_backward(dy, x, weight, dilation)


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    dweight = torch.empty_like(weight, dtype=kind, memory_format=torch.contiguous_format)
    return torch.empty_like(x), dweight, dweight.new_empty(weight.shape[0])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.dilation = inputs
    ctx.bias_type = bias.dtype
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _backward(dy, x, weight, ctx.dilation)
    return dx, dweight.to(weight.dtype), dbias.to(ctx.bias_type), None


no_double_backward(_backward)
_forward.register_autograd(_gradients, setup_context=_setup_context)


def _kernels_serve(x: Tensor) -> bool:
    """On a CPU the operator is for its gradient, and half precision is PyTorch's."""
    if x.is_cuda:
        return x.numel() > 0 and own_gpu_kernels(x.dtype)
    if x.device.type != "cpu" or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype in (torch.float32, torch.float64) and choose_backend("cpu", x.dtype) == "numba"


def depthwise(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Depthwise convolution with "same" padding, by this package's kernels.

    Args:
        x: (B, C, H, W).
        weight: (C, 1, KH, KW), odd sides.
        bias: (C,).
        dilation: of both axes.

    Returns:
        (B, C, H, W) in ``x``'s order in memory, of autocast's type under autocast.
    """
    return _forward(as_autocast(x), weight.contiguous(), bias, dilation)


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution with bias and "same" padding; parameters and results are ``nn.Conv2d``'s.

    Where Triton or Numba serve the scan they serve this, too. The result is of autocast's type, the sums are float32's.

    Args:
        channels: C.
        kernel_size: (height, width), odd.
        dilation: of both axes.

    Shape:
        (B, C, H, W) to (B, C, H, W).
    """

    def __init__(self, channels: int, kernel_size: tuple[int, int], dilation: int = 1) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels, padding="same", dilation=dilation)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if numba_infers(x) and x.ndim == 4 and x.shape[1] == self.in_channels and self.weight.dtype == x.dtype:
            from .cpu_depthwise import convolution  # Numba need not be there otherwise

            return convolution(x, self.weight, self.bias, self.dilation[0])
        assert self.bias is not None
        return depthwise(x, self.weight, self.bias, self.dilation[0]) if _kernels_serve(x) else super().forward(x)
