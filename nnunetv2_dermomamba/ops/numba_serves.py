"""Whether Numba kernels may stand in for PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import choose_backend


def numba_serves(x: Tensor) -> bool:
    """Not where a graph is traced or there is nothing to do; a subclass (a fake tensor) has no memory to read."""
    if (
        type(x) is not Tensor
        or x.numel() == 0
        or x.device.type != "cpu"
        or x.dtype not in (torch.float32, torch.float64)
    ):
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return choose_backend("cpu", x.dtype) == "numba"


def numba_infers(x: Tensor) -> bool:
    """Of kernels that have no gradient and are made for float32."""
    return not torch.is_grad_enabled() and x.dtype == torch.float32 and numba_serves(x)
