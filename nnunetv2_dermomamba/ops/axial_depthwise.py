"""The encoder's three axial branches as one operator: what passes between its convolutions stays on chip."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .fused_depthwise import register, taps_of
from .library import as_autocast

_operator = register("axial_depthwise", "axial")


def axial_depthwise(x: Tensor, branches: Sequence[Sequence[nn.Conv2d]]) -> Tensor:
    """``x + dw3x3(dw7x1(dw1x7(x)))`` of three branches with dilations 1, 2 and 3, biased, "same" padding.

    Where ``fused_depthwise.kernels_serve``.

    Args:
        x: (B, H, W, 3 c), the branches' channels one after the other.
        branches: the three convolutions of each.

    Returns:
        (3 B, H, W, c), of autocast's type under autocast.
    """
    return _operator(as_autocast(x), torch.stack([taps_of(convolutions) for convolutions in branches]))
