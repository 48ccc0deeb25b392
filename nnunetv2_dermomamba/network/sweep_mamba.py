"""Sweep-Mamba, the bottleneck: three SS2D over the three planes of the (H, W, C) volume."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops.normalise import batch_norm_of_running

from .ss2d import SS2D, side_by_side


class SweepMamba(nn.Module):
    """Scans over (H, W), (W, C) and (C, H), with C, H and W as the features, between two projections.

    Two of the scans have the map's height and width as their feature axis, so the module is built for one map size.

    Args:
        dim: channels.
        height: of the map.
        width: of the map.
        ratio: dim over the scans' channels C.

    Shape:
        (B, dim, height, width) to the same.
    """

    def __init__(self, dim: int, height: int, width: int, ratio: int = 8) -> None:
        super().__init__()
        inner = dim // ratio
        self.norm_in = nn.LayerNorm(dim)
        self.proj_in = nn.Linear(dim, inner)
        self.scan_hw = SS2D(inner)
        self.scan_wc = SS2D(height)
        self.scan_ch = SS2D(width)
        self.proj_out = nn.Linear(inner, dim)
        self.scale = nn.Parameter(torch.ones(1))
        self.norm_out = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        skip = x.permute(0, 2, 3, 1)
        x = self.proj_in(self.norm_in(skip))
        layers = self.scan_hw, self.scan_wc, self.scan_ch
        hw, wc, ch = side_by_side(layers, [x, x.permute(0, 2, 3, 1), x.permute(0, 3, 1, 2)])
        scans = hw + wc.permute(0, 3, 1, 2) + ch.permute(0, 2, 3, 1)
        x = self.proj_out(F.silu(x) * scans) + skip * self.scale
        return F.relu(batch_norm_of_running(x.permute(0, 3, 1, 2), self.norm_out))
