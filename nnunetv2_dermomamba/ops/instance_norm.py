"""InstanceNorm, leaky ReLU and a residual: PyTorch's own, or for CPU inference one Numba kernel.

PyTorch's InstanceNorm copies channels-last maps to channels first and takes several passes.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from .cpu_inference import numba_infers


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
    if numba_infers(x):
        from .cpu_instance_norm import instance_norm_leaky_add_cpu  # Numba need not be there for PyTorch's own

        return instance_norm_leaky_add_cpu(x, norm, slope, other, factor)
    # other first: the sum has its memory format, which InstanceNorm loses
    return factor * other + F.leaky_relu(norm(x), slope, inplace=True)
