"""A bias for every channel of maps, with a gradient in one pass over what the gradient behind it reads, too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .normalise import channel_sums, serves


def add_bias(x: Tensor, bias: Tensor) -> Tensor:
    """``x`` with a number added to every channel.

    Args:
        x: (B, C, H, W).
        bias: (C,).

    Returns:
        (B, C, H, W), in the type of ``x``.
    """
    return _AddBias.apply(x, bias) if serves(x) else x + bias.to(x.dtype)[:, None, None]


def positions_sum(x: Tensor) -> Tensor:
    """Of maps (B, C, H, W) that ``channel_sums`` takes, for every channel; (C,), float32."""
    return channel_sums(None, x, x.new_zeros(1, x.shape[1], dtype=torch.float32)).sum(1)[0, 0]


class _AddBias(torch.autograd.Function):
    """Whose gradient is summed by an operator: for a sum of its own a compiler computes all before it once more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:  # type: ignore[override]
        return x + bias.to(x.dtype)[:, None, None]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return dy, positions_sum(dy)
