"""Dense 3 x 3 convolution of channels-last maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Conv3x3(nn.Conv2d):
    """``nn.Conv2d`` of 3 x 3 with bias and "same" padding; on a GPU its weights are laid out as the maps are.

    cuDNN wants them so, and would copy them at every call; compiled, the copy is one with autocast's.

    Shape:
        (B, dim_in, H, W) to (B, dim_out, H, W).
    """

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__(dim_in, dim_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        weight = self.weight.contiguous(memory_format=torch.channels_last) if x.is_cuda else self.weight
        return self._conv_forward(x, weight, self.bias)
