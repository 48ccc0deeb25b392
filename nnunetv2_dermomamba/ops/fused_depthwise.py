"""What the operators share that are one CUDA kernel for several depthwise convolutions (``cuda_depthwise``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .backends import own_cuda_kernels
from .library import no_double_backward


def register(name: str, kernel: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Register ``dermomamba::<name>`` and its backward, ``cuda_depthwise``'s ``<kernel>_forward`` and ``_backward``.

    Returns:
        The differentiable function of a map (B, H, W, branches c) and weights (branches, taps, c), or (taps, c) of one.
    """

    @torch.library.custom_op(f"dermomamba::{name}", mutates_args=())
    def forward(x: Tensor, weights: Tensor) -> Tensor:
        from . import cuda_depthwise  # needs CUDA

        return getattr(cuda_depthwise, f"{kernel}_forward")(x, weights)  # type: ignore[no-any-return]

    @forward.register_fake
    def _(x: Tensor, weights: Tensor) -> Tensor:
        branches = weights.shape[:-2].numel()
        return x.new_empty(branches * x.shape[0], *x.shape[1:3], x.shape[3] // branches)

    @torch.library.custom_op(f"dermomamba::{name}_backward", mutates_args=())
    def backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        from . import cuda_depthwise

        return getattr(cuda_depthwise, f"{kernel}_backward")(dy, x, weights)  # type: ignore[no-any-return]

    @backward.register_fake
    def _(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return x.new_empty(x.shape), weights.new_empty(weights.shape)

    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return backward(dy.contiguous(), *ctx.saved_tensors)

    no_double_backward(backward)
    forward.register_autograd(gradients, setup_context=setup_context)
    return forward


def taps_of(convolutions: Sequence[nn.Conv2d]) -> Tensor:
    """Weights and biases of depthwise convolutions of c channels, (taps, c): a kernel's, its bias, the next one's.

    In float32, as the kernels read them.
    """
    rows = [m for conv in convolutions for m in (conv.weight.flatten(1).t(), conv.bias[None])]  # type: ignore[index]
    return torch.cat(rows).float()


def kernels_serve(x: Tensor, channels: int) -> bool:
    """Whether these operators can be asked for branches of so many channels of maps like ``x``."""
    return x.is_cuda and x.numel() > 0 and channels % 4 == 0 and own_cuda_kernels(x.dtype)
