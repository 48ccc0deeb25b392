"""Whether the Numba kernels that have no gradient may stand in for PyTorch's operations."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import choose_backend


def numba_infers(x: Tensor) -> bool:
    """Not where gradients are recorded or a graph is traced; a subclass (a fake tensor) has no memory to read."""
    if type(x) is not Tensor or x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return choose_backend("cpu", x.dtype) == "numba"
