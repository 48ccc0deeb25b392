"""What the operators share that are one CUDA kernel for several depthwise convolutions (``cuda_depthwise``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .backends import own_cuda_kernels
from .library import register_convolution


def _branches_behind_each_other(x: Tensor, weights: Tensor) -> tuple[int, ...]:
    branches = weights.shape[:-2].numel()
    return branches * x.shape[0], *x.shape[1:3], x.shape[3] // branches


def register(name: str, kernel: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Register ``dermomamba::<name>`` and its backward, ``cuda_depthwise``'s ``<kernel>_forward`` and ``_backward``.

    Returns:
        The differentiable function of a map (B, H, W, branches c) and weights (branches, taps, c), or (taps, c) of one.
    """
    return register_convolution(name, "cuda_depthwise", kernel, _branches_behind_each_other)


def taps_of(convolutions: Sequence[nn.Conv2d]) -> Tensor:
    """Weights and biases of depthwise convolutions of c channels, (taps, c): a kernel's, its bias, the next one's.

    In float32, as the kernels read them.
    """
    rows = [m for conv in convolutions for m in (conv.weight.flatten(1).t(), conv.bias[None])]  # type: ignore[index]
    return torch.cat(rows).float()


def kernels_serve(x: Tensor, channels: int) -> bool:
    """Whether these operators can be asked for branches of so many channels of maps like ``x``."""
    return x.is_cuda and x.numel() > 0 and channels % 4 == 0 and own_cuda_kernels(x.dtype)
