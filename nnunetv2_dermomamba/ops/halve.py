"""2 x 2 max pooling: PyTorch's own on a CPU, elsewhere element-wise, which a compiler fuses with what is around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def halve(x: Tensor) -> Tensor:
    """2 x 2 max pooling of even sides; of equal pixels the first gets the gradient.

    Args:
        x: (B, C, H, W), best channels last.

    Returns:
        (B, C, H / 2, W / 2) of ``x``'s type.
    """
    if x.device.type == "cpu":
        return F.max_pool2d(x, 2)
    x = x.permute(0, 2, 3, 1)
    halved = _Halve.apply(x) if torch.is_grad_enabled() else _pairs(x)[0]
    return halved.permute(0, 3, 1, 2)  # type: ignore[no-any-return]


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of (B, H, W, C) the maxima of 2 x 2 pixels, and which of the four is the first that is: 0 to 3, uint8."""
    pixels = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    a, b, c, d = (pixels[:, :, row, :, column] for row in (0, 1) for column in (0, 1))
    top, bottom = torch.maximum(a, b), torch.maximum(c, d)
    first = torch.where(bottom > top, 2 + (d > c).byte(), (b > a).byte())
    return torch.maximum(top, bottom), first


@torch.library.custom_op("dermomamba::written", mutates_args=())
def _written(x: Tensor) -> Tensor:
    """A copy: a compiler computes what an operator takes once and writes it, instead of once for every reader."""
    return x.clone()


@_written.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class _Halve(torch.autograd.Function):
    """``_pairs``' maxima; PyTorch's gradient of them would be made in two passes, with zeros in between.

    Compiled, which pixel was first is written before the gradient's kernel reads it: with four reads and comparisons
    more for every pixel that takes nearly twice as long, and its blocks become so large that it takes five times.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        value, first = _pairs(x)
        ctx.save_for_backward(_written(first) if torch.compiler.is_compiling() else first)
        return value

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> Tensor:  # type: ignore[override]
        (first,) = ctx.saved_tensors
        pixel = torch.arange(4, dtype=torch.uint8, device=first.device).view(2, 1, 2, 1)
        is_first = first[:, :, None, :, None] == pixel
        return (is_first * dvalue[:, :, None, :, None]).flatten(3, 4).flatten(1, 2)
