"""The two attention modules: CBAM on the skips and PCA before the bottleneck."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import fuse_skip
from nnunetv2_dermomamba.ops.backends import own_cuda_kernels, own_gpu_kernels
from nnunetv2_dermomamba.ops.depthwise import DepthwiseConv2d, depthwise
from nnunetv2_dermomamba.ops.gate_convolution import gate_convolution, spatial_gate
from nnunetv2_dermomamba.ops.library import as_autocast
from nnunetv2_dermomamba.ops.maximum import maximum
from nnunetv2_dermomamba.ops.numba_serves import numba_serves

FEW_MAPS = 4  # an image and its mirror images


def _maximum_and_mean(x: Tensor, channels: bool) -> tuple[Tensor, Tensor]:
    """Of every position over the channels, (B, H, W), or of every channel over the positions, (B, C).

    A gradient lies in memory in the order of the axes that were reduced, and adding it to a map in another order is
    slow: maps are channels last, so the axes are, too.
    """
    x = x.permute(0, 2, 3, 1)
    return (maximum(x, 3), x.mean(3)) if channels else (maximum(x.flatten(1, 2), 1), x.mean((1, 2)))


def multiplied(*factors: Tensor) -> Tensor:
    """Product, from the left."""
    return reduce(torch.mul, factors)


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

    def factors(self, x: Tensor) -> tuple[Tensor, ...]:
        """Tensors whose product is the result: training on a GPU ``x`` and both gates, so that no product need be kept.

        So they are where ``fuse_skip`` takes them. The spatial gate comes first, or a compiler would find the product
        with the other one and keep that. Elsewhere that product is a factor: it has been computed.
        """
        if numba_serves(x) and x.shape[1] % 8 == 0:
            return self._factors_on_cpu(x)
        pooled = torch.stack(_maximum_and_mean(x, channels=False))
        few = len(x) <= FEW_MAPS and x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled()
        mlp = self._mlp_of_few if few else self.channel_mlp
        channel_gate = torch.sigmoid(mlp(pooled).sum(0))[:, :, None, None]
        gated = x * channel_gate
        spatial_gate = self._spatial_gate(*_maximum_and_mean(gated, channels=True))
        factors = x, spatial_gate, channel_gate
        keeps_less = torch.is_grad_enabled() and x.device.type != "cpu"
        return factors if keeps_less or fuse_skip.serves(*factors) else (gated, spatial_gate)

    def _mlp_of_few(self, pooled: Tensor) -> Tensor:
        """``channel_mlp`` as sums, a kernel each when compiled; a library's products of few rows take longer."""
        for layer in self.channel_mlp:
            if isinstance(layer, nn.Linear):
                pooled = as_autocast((pooled[..., None, :] * layer.weight).sum(-1) + layer.bias)
            else:
                pooled = layer(pooled)
        return pooled

    def _spatial_gate(self, maximum: Tensor, mean: Tensor) -> Tensor:
        """Of two maps (B, H, W), (B, 1, H, W)."""
        norm = self.spatial_norm
        infers = maximum.is_cuda and not (torch.is_grad_enabled() or norm.training) and type(norm) is nn.BatchNorm2d
        if infers and maximum.numel() and own_cuda_kernels(maximum.dtype):
            return spatial_gate(maximum, mean, self.spatial_conv.weight, norm)
        return torch.sigmoid(norm(self._convolve(torch.stack([maximum, mean], dim=1))))

    def _convolve(self, summary: Tensor) -> Tensor:
        """``spatial_conv``, in the way whose gradients are fastest; (B, 2, H, W) to (B, 1, H, W)."""
        if summary.is_cuda and summary.numel() and own_cuda_kernels(summary.dtype):
            return gate_convolution(summary, self.spatial_conv.weight)
        if summary.is_cuda and summary.numel() and own_gpu_kernels(summary.dtype):
            taps = self.spatial_conv.weight.transpose(0, 1)  # one kernel for the maximum, one for the mean, then added
            convolved = depthwise(summary, taps, taps.new_zeros(2), 1)
            return convolved[:, :1] + convolved[:, 1:]  # not sum(), which autocast makes float32
        return self.spatial_conv(summary)

    def _factors_on_cpu(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """By kernels that read the map twice."""
        from nnunetv2_dermomamba.ops.cpu_depthwise import convolution  # Numba need not be there otherwise
        from nnunetv2_dermomamba.ops.cpu_gates import gate_channels, pool_positions

        channel_gate = torch.sigmoid(self.channel_mlp(pool_positions(x)).sum(0))[:, :, None, None]
        gated, summary = gate_channels(x, channel_gate)
        if torch.is_grad_enabled():
            return gated, torch.sigmoid(self.spatial_norm(self.spatial_conv(summary)))
        taps = self.spatial_conv.weight.transpose(0, 1)  # one kernel for the maximum, one for the mean, then added
        convolved = convolution(summary, taps, taps.new_zeros(2), 1).sum(1, keepdim=True)
        return gated, torch.sigmoid(self.spatial_norm(convolved))

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return multiplied(*self.factors(x))


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
