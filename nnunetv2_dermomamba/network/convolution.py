"""Dense 3 x 3 convolution of channels-last maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def convolve_and_add(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int = 0) -> Tensor:
    """``F.conv2d``; on a GPU the bias is added apart: a compiler does that where the result is read, in no pass for it."""
    if not x.is_cuda or bias is None:
        return F.conv2d(x, weight, bias, padding=padding)
    y = F.conv2d(x, weight, padding=padding)
    return y + bias.to(y.dtype)[:, None, None]


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3 with bias and "same" padding; on a GPU its weights are laid out as the maps are.

    cuDNN wants them so, and would copy them at every call; compiled, the copy is one with autocast's.

    Shape:
        (B, dim_in, H, W) to (B, dim_out, H, W).
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return convolve_and_add(x, self._weight_for(x), self.bias, padding=1)

    def without_bias(self, x: Tensor) -> Tensor:
        """For a normalisation behind it, which subtracts each channel's mean and the bias with it.

        That saves a pass over the map, and one over its gradient. The bias has a gradient nevertheless, as several
        GPUs' processes demand of every parameter: 0, which with the bias in place is rounding alone.
        """
        weight = self._weight_for(x)
        if torch.is_grad_enabled():
            assert self.bias is not None
            weight = weight + 0 * self.bias[:, None, None, None]
        return F.conv2d(x, weight, padding=1)

    def _weight_for(self, x: Tensor) -> Tensor:
        return self.weight.contiguous(memory_format=torch.channels_last) if x.is_cuda else self.weight
