"""Depthwise 3 x 3 convolution and SiLU of a channels-last map: PyTorch's own, or one CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .depthwise import DepthwiseConv2d
from .fused_depthwise import kernels_serve, register, taps_of
from .library import as_autocast

depthwise_silu_by_taps = register("depthwise_silu", "silu")
"""``depthwise_silu`` of a map and ``taps_of`` a convolution, where ``kernels_serve``."""


def depthwise_silu(x: Tensor, conv: DepthwiseConv2d) -> Tensor:
    """``silu(conv(x))``.

    Args:
        x: (B, H, W, c).
        conv: 3 x 3, not dilated.

    Returns:
        (B, H, W, c), of autocast's type under autocast.
    """
    if kernels_serve(x, x.shape[-1]):
        return depthwise_silu_by_taps(as_autocast(x), taps_of([conv]))
    return F.silu(conv(x.permute(0, 3, 1, 2)), inplace=not torch.is_grad_enabled()).permute(0, 2, 3, 1)
