"""Dense convolutions of channels-last maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import convolution as kernels
from nnunetv2_dermomamba.ops.add_bias import add_bias
from nnunetv2_dermomamba.ops.library import as_autocast


def convolve_and_add(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.conv2d``; on a GPU the bias is added apart, which a compiler does where the result is read."""
    if not x.is_cuda or bias is None:
        return F.conv2d(x, weight, bias)
    y = F.conv2d(x, weight)
    return y + bias.to(y.dtype)[:, None, None]


class ConvIn(nn.Conv2d):
    """``nn.Conv2d`` of 1 x 1 for images; compiled for a GPU its formula.

    A compiler makes one pass of that, and one of all its gradients; cuDNN's kernels are made for more channels.

    Shape:
        (B, dim_in, H, W) to (B, dim_out, H, W), of autocast's type under autocast.
    """

    MOST = 4  # input channels that are written out

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not (x.is_cuda and torch.compiler.is_compiling() and self.in_channels <= self.MOST):
            return super().forward(x)
        return self._formula(x)

    def _formula(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        y = self.bias
        for i, channel in enumerate(x.permute(0, 2, 3, 1).split(1, dim=3)):
            y = y + channel * self.weight[:, i, 0, 0]
        return as_autocast(y).permute(0, 3, 1, 2)


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3 with bias and "same" padding.

    Shape:
        (B, dim_in, H, W) to (B, dim_out, H, W).
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        if not x.is_cuda:
            return super().forward(x)
        assert self.bias is not None
        return add_bias(self._convolve(x, self.weight), self.bias)  # a compiler adds it where the result is read

    def without_bias(self, x: Tensor) -> Tensor:
        """For a normalisation behind it, which subtracts each channel's mean and the bias with it.

        That saves a pass over the map, and one over its gradient. The bias has a gradient nevertheless, as several
        GPUs' processes demand of every parameter: 0, which with the bias in place is rounding alone.
        """
        weight = self.weight
        if torch.is_grad_enabled():
            assert self.bias is not None
            weight = weight + 0 * self.bias[:, None, None, None]
        return self._convolve(x, weight)

    def _convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        if kernels.serves(x, weight):
            return kernels.convolution(x, weight)
        # cuDNN wants weights laid out as the maps are, and would copy them at every call; compiled, the copy is one
        # with autocast's
        weight = weight.contiguous(memory_format=torch.channels_last) if x.is_cuda else weight
        return F.conv2d(x, weight, padding=1)
