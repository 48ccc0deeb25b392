"""3 x 3 convolution of maps of few channels as an operator of CUDA kernels.

cuDNN's kernels are made for more channels: of 16 and 32 they take several times as long as the maps' bytes need.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import own_cuda_kernels
from .library import as_autocast, register_convolution

CHANNELS = {(16, 16), (16, 32), (32, 16)}
"""Of maps and results, where that is faster (``benchmarks/convolution.py``)."""
MANY = 192 * 256
"""Positions of all maps from which on the result is there sooner. With gradients that takes two to eight times as many;
below, a training pays a few microseconds."""


def _shape(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return x.shape[0], weight.shape[0], *x.shape[2:]


_operator = register_convolution("convolution", "cuda_convolution", "convolution", _shape, torch.channels_last)


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether ``convolution`` takes such a call and computes its result faster: x (B, c, H, W), weight (d, c, k, k)."""
    if not x.is_cuda or tuple(weight.shape[2:]) != (3, 3) or (weight.shape[1], weight.shape[0]) not in CHANNELS:
        return False
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    many = x.shape[0] * x.shape[2] * x.shape[3] >= MANY
    return many and kind in (torch.float16, torch.bfloat16) and own_cuda_kernels(kind)


def convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with "same" padding, summed in float32; where it ``serves``.

    Args:
        x: (B, c, H, W); faster channels last.
        weight: (d, c, 3, 3).

    Returns:
        (B, d, H, W), channels last, of autocast's type under autocast.
    """
    return _operator(as_autocast(x), weight.float())
