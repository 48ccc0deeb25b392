"""The encoder's Cross-Scale Mamba block: three dilated depthwise branches through one shared VSS block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops.axial_depthwise import axial_depthwise
from nnunetv2_dermomamba.ops.depthwise import DepthwiseConv2d
from nnunetv2_dermomamba.ops.fused_depthwise import kernels_serve
from nnunetv2_dermomamba.ops.normalise import batch_norm_of_running
from nnunetv2_dermomamba.ops.numba_serves import numba_infers

from .ss2d import VSSBlock

DILATIONS = (1, 2, 3)
KERNEL = 7


class AxialDepthwise(nn.Module):
    """``x + dw3x3(dw7x1(dw1x7(x)))``, depthwise with one dilation, biased, "same" padding.

    Shape:
        (B, dim, H, W) to (B, dim, H, W).
    """

    def __init__(self, dim: int, dilation: int) -> None:
        super().__init__()
        self.conv_w = DepthwiseConv2d(dim, (1, KERNEL), dilation)
        self.conv_h = DepthwiseConv2d(dim, (KERNEL, 1), dilation)
        self.conv = DepthwiseConv2d(dim, (3, 3), dilation)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.conv(self.conv_h(self.conv_w(x)))


class CrossScaleMambaBlock(nn.Module):
    """Channels in four: three dilated branches through a shared VSS block, the fourth unchanged; BatchNorm, ReLU.

    The three branches share the VSS weights, so they are one batch of 3 B.

    Args:
        dim: channels, a multiple of 4.

    Shape:
        (B, dim, H, W) to (B, dim, H, W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(AxialDepthwise(dim // 4, dilation) for dilation in DILATIONS)
        self.vss = VSSBlock(dim // 4)
        self.norm = nn.BatchNorm2d(dim)

    def _branches(self, x: Tensor, chunks: list[Tensor]) -> Tensor:
        """Of x (B, H, W, dim), whose first three chunks these are, the three branches as one batch."""
        convolutions = [[branch.conv_w, branch.conv_h, branch.conv] for branch in self.branches]
        if kernels_serve(x, chunks[0].shape[3]):
            return axial_depthwise(x[..., : 3 * chunks[0].shape[3]], convolutions)
        maps = [chunk.permute(0, 3, 1, 2) for chunk in chunks]
        if numba_infers(x):
            from nnunetv2_dermomamba.ops import cpu_depthwise  # Numba need not be there otherwise

            return cpu_depthwise.axial_depthwise(maps, convolutions).permute(0, 2, 3, 1)
        y = torch.cat([branch(m) for branch, m in zip(self.branches, maps, strict=True)])
        return y.permute(0, 2, 3, 1)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        # Channels last throughout, so that gradients are, too, and are written once. Permuted twice: read by both ways,
        # one map with the axes in this order would be laid out otherwise by a compiler, and copied for the operator.
        *chunks, rest = x.permute(0, 2, 3, 1).chunk(4, dim=3)
        branches = self.vss(self._branches(x.permute(0, 2, 3, 1), chunks)).chunk(3)
        y = _side_by_side([*branches, rest]).permute(0, 3, 1, 2)
        return F.relu(batch_norm_of_running(y, self.norm), inplace=True)


def _side_by_side(maps: list[Tensor]) -> Tensor:
    """Maps (B, H, W, c) as one, (B, H, W, n c)."""
    if torch.is_grad_enabled():
        return torch.cat(maps, dim=3)
    # by rows: of a result with four axes a compiler thinks that they are (B, C, H, W), and writes the second one last
    return torch.cat([m.flatten(0, 2) for m in maps], dim=1).view(*maps[0].shape[:3], -1)
