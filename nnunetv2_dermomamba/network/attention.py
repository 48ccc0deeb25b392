"""The two attention modules: CBAM on the skips and PCA before the bottleneck."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops.depthwise import DepthwiseConv2d
from nnunetv2_dermomamba.ops.maximum import maximum


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al., 2018): a channel gate, then a spatial gate.

    Args:
        dim: channels.
        reduction: of the channel gate's hidden layer.

    Shape:
        (B, dim, H, W) to (B, dim, H, W).
    """

    def __init__(self, dim: int, reduction: int = 16) -> None:
        super().__init__()
        self.channel_mlp = nn.Sequential(nn.Linear(dim, dim // reduction), nn.ReLU(), nn.Linear(dim // reduction, dim))
        self.spatial_conv = nn.Conv2d(2, 1, 7, padding=3, bias=False)
        self.spatial_norm = nn.BatchNorm2d(1, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        pooled = torch.stack([x.mean((2, 3)), maximum(x.flatten(2), 2)])
        x = x * torch.sigmoid(self.channel_mlp(pooled).sum(0))[:, :, None, None]
        summary = torch.stack([maximum(x, 1), x.mean(1)], dim=1)
        return x * torch.sigmoid(self.spatial_norm(self.spatial_conv(summary)))


class PCA(nn.Module):
    """Channel attention from what a 9x9 depthwise convolution changes in the channel means.

    ``c = mean(x)``, ``x' = dw9x9(x)``, ``c' = mean(x')``, ``p = softmax(c' - c)`` over channels;
    ``x' * sigmoid(c' (1 + p))``.

    Shape:
        (B, dim, H, W) to (B, dim, H, W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(dim, (9, 9))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        before = x.mean((2, 3), keepdim=True)
        x = self.conv(x)
        after = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(after * (1 + F.softmax(after - before, dim=1)))
