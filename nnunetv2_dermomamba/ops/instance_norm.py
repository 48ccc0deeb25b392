"""InstanceNorm, leaky ReLU and a residual: PyTorch's own, on a CPU Numba kernels, compiled its formula.

PyTorch's InstanceNorm copies channels-last maps to channels first and takes several passes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import normalise
from .numba_serves import numba_serves


def instance_norm_leaky_add(x: Tensor, norm: nn.InstanceNorm2d, slope: float, other: Tensor, factor: Tensor) -> Tensor:
    """``factor * other + leaky_relu(norm(x), slope)``.

    Args:
        x: (B, C, H, W).
        norm: affine, without running statistics.
        slope: of the leaky ReLU.
        other: as ``x``.
        factor: one number.

    Returns:
        (B, C, H, W).
    """
    if numba_serves(x) and other.shape == x.shape and norm.num_features == x.shape[1]:
        from .cpu_instance_norm import instance_norm_leaky_add_cpu  # Numba need not be there for PyTorch's own

        return instance_norm_leaky_add_cpu(x, norm, slope, other, factor)
    if normalise.serves(x):
        return factor * other + _LeakyReLU.apply(normalise.instance_norm(x, norm), slope)
    normalised = _formula(x, norm) if torch.compiler.is_compiling() else norm(x)
    # other first: the sum has its memory format, which InstanceNorm loses
    return factor * other + F.leaky_relu(normalised, slope, inplace=True)


class _LeakyReLU(torch.autograd.Function):
    """In whose gradient the input is used once: a compiler writes what it has to compute again for several uses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.slope = slope
        return F.leaky_relu(x, slope)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return torch.where(x > 0, dy, dy * ctx.slope), None


def _formula(x: Tensor, norm: nn.InstanceNorm2d) -> Tensor:
    """What a compiler fuses without a copy; statistics in float32 or better, as PyTorch's."""
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, (2, 3), correction=0, keepdim=True)
    scale, shift = (m[:, None, None] for m in (norm.weight, norm.bias))
    return ((wide - mean) * torch.rsqrt(variance + norm.eps) * scale + shift).to(x.dtype)
