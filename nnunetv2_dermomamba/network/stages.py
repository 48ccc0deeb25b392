"""Encoder and decoder stages."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import fuse_skip
from nnunetv2_dermomamba.ops.halve import halve
from nnunetv2_dermomamba.ops.instance_norm import instance_norm_leaky_add
from nnunetv2_dermomamba.ops.normalise import batch_norm, batch_norm_of_running
from nnunetv2_dermomamba.ops.numba_serves import numba_serves
from nnunetv2_dermomamba.ops.recompute import recompute

from .attention import multiplied
from .convolution import Conv3x3, convolve_and_add
from .cross_scale import CrossScaleMambaBlock


class ResMambaBlock(nn.Module):
    """``LeakyReLU(InstanceNorm(conv3x3(y))) + scale * y`` with ``y = CrossScaleMambaBlock(x)``.

    Shape:
        (B, dim, H, W) to (B, dim, H, W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.block = CrossScaleMambaBlock(dim)
        self.conv = Conv3x3(dim, dim)
        self.norm = nn.InstanceNorm2d(dim, affine=True)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        y = self.block(x)
        return instance_norm_leaky_add(self.conv.without_bias(y), self.norm, 0.01, y, self.scale)


class EncoderStage(nn.Module):
    """Residual Mamba block, then a convolution to twice the channels; returns it pooled and as it is.

    Shape:
        (B, dim, H, W) to (B, 2 dim, H / 2, W / 2) and (B, 2 dim, H, W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.res_mamba = ResMambaBlock(dim)
        self.conv = Conv3x3(dim, 2 * dim)
        self.norm = nn.BatchNorm2d(2 * dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # noqa: D102
        x = self.res_mamba(x)
        if self.training:
            x = batch_norm(self.conv.without_bias(x), self.norm, self.conv.bias)
        else:
            x = batch_norm_of_running(self.conv(x), self.norm)
        # compiled, the skip would be kept for fuse_skip's gradient and the convolution's result for BatchNorm's; so the
        # former is computed again: 350 MB of batch 64
        compiled = x.is_cuda and torch.compiler.is_compiling()
        skip = recompute(F.relu, x) if compiled else F.relu(x, inplace=True)
        return halve(skip), skip


def _is_gated(x: Tensor, *gates: Tensor) -> bool:
    """Whether one factor for each position is all there is besides ``x``."""
    return len(gates) == 1 and gates[0].shape == (len(x), 1, *x.shape[2:])


class DecoderStage(nn.Module):
    """Nearest upsampling, concatenation with the skip, 1x1 and 3x3 convolution, GELU, BatchNorm, in that order.

    The 1x1 convolution commutes with nearest upsampling and splits over the concatenation, so its half for ``x`` runs
    at the low resolution and nothing is concatenated.

    Args:
        dim: channels of ``x`` and of the skip; half of them leave.

    Shape:
        x (B, dim, H, W) and the factors of skip, (B, dim, 2 H, 2 W) and what broadcasts to it (``CBAM.factors``), to
        (B, dim / 2, 2 H, 2 W).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fuse = nn.Conv2d(2 * dim, dim, 1)
        self.conv = Conv3x3(dim, dim // 2)
        self.norm = nn.BatchNorm2d(dim // 2)

    def _fuse(self, x: Tensor, *skip: Tensor) -> Tensor:
        """``fuse`` of the concatenation."""
        weight_x, weight_skip = self.fuse.weight.chunk(2, dim=1)
        if fuse_skip.serves(*skip):
            whole, spatial_gate, channel_gate = skip
            low = F.conv2d(x, weight_x)
            return fuse_skip.fuse_skip(whole, spatial_gate, channel_gate, weight_skip, low, self.fuse.bias)
        low = convolve_and_add(x, weight_x, self.fuse.bias)
        if numba_serves(x) and low.shape[1] % 8 == 0 and _is_gated(*skip):
            from nnunetv2_dermomamba.ops.cpu_gates import gate_and_add  # Numba need not be there otherwise

            return gate_and_add(F.conv2d(skip[0], weight_skip), skip[1], low)
        fused = recompute(lambda *skip: F.conv2d(multiplied(*skip), weight_skip), *skip)
        # nearest upsampling by broadcasting, in place: nothing is written, and its gradient is a sum
        # the axes in memory's order: else that sum is, and the convolution of low copies it
        blocks = fused.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
        blocks.add_(low.permute(0, 2, 3, 1)[:, :, None, :, None])
        return fused

    def forward(self, x: Tensor, *skip: Tensor) -> Tensor:  # noqa: D102
        return batch_norm_of_running(F.gelu(self.conv(self._fuse(x, *skip))), self.norm)
