"""LayerNorm, gate and linear map of few channels as one pass: PyTorch's own, or for CPU inference a Numba kernel.

PyTorch's LayerNorm spends most of its time between rows where they have 4 or 8 channels, as in the first stages.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import choose_backend


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, gate: Tensor | None = None) -> Tensor:
    """``linear(norm(x))``, or ``linear(norm(x) * silu(gate))``.

    Args:
        x: (..., c).
        norm: over the last axis.
        linear: without bias, c to m.
        gate: (..., c) or None.

    Returns:
        (..., m).
    """
    if _kernel_serves(x):
        from .cpu_rows import norm_linear_cpu  # Numba need not be there for PyTorch's own

        return norm_linear_cpu(x, norm.weight, norm.bias, norm.eps, linear.weight, gate)
    x = norm(x)
    return linear(x if gate is None else x * F.silu(gate))


def _kernel_serves(x: Tensor) -> bool:
    """The kernel has no gradient and is not traced; a subclass (a fake tensor) has no memory that it could read."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return choose_backend("cpu", x.dtype) == "numba"
