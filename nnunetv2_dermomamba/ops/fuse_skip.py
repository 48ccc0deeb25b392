"""A decoder's 1 x 1 convolution of a gated skip, with what comes from the level below added, as one pass over the map.

Apart, the product with the gates is written and read, and so is the convolution's result: three times the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .add_bias import positions_sum
from .backends import own_cuda_kernels, own_gpu_kernels
from .library import as_autocast

CHANNELS = (32, 64, 128)
"""Of maps whose weights a program holds."""


def _rows(x: Tensor) -> Tensor:
    """(B, C, H, W) as contiguous (B, H, W, C)."""
    return x.permute(0, 2, 3, 1).contiguous()


@torch.library.custom_op("dermomamba::fuse_skip", mutates_args=())
def _forward(
    x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, low: Tensor, bias: Tensor
) -> Tensor:
    from .triton_fuse_skip import fuse_skip_forward  # Triton need not be there otherwise

    gates = spatial_gate.contiguous(), channel_gate.contiguous()
    y = fuse_skip_forward(_rows(x), *gates, weight.flatten(1).contiguous(), _rows(low), bias.contiguous())
    return y.permute(0, 3, 1, 2)


@_forward.register_fake
def _(x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, low: Tensor, bias: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    """Of the product with the gates, which is computed again, PyTorch's own, and what follows from them."""
    x, spatial_gate, channel_gate, weight = ctx.saved_tensors
    gated = x * spatial_gate * channel_gate
    dgated, dweight, _ = torch.ops.aten.convolution_backward(
        dy, gated, weight.to(dy.dtype), None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1, [True, True, False]
    )
    dspatial = (dgated * x * channel_gate).sum(1, keepdim=True).to(dy.dtype)  # autocast sums to float32
    dchannel = (dgated * x * spatial_gate).sum((2, 3), keepdim=True).to(dy.dtype)
    # the axes in memory's order: else the sum is not, and what reads it copies it
    blocks = dy.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))
    dlow = blocks.sum((2, 4)).to(dy.dtype).permute(0, 3, 1, 2)
    by_kernel = dlow.is_cuda and own_cuda_kernels(dlow.dtype)  # a compiler would sum all of dy once more
    dbias = positions_sum(dlow) if by_kernel else dlow.sum((0, 2, 3), dtype=torch.float32)
    return dgated * spatial_gate * channel_gate, dspatial, dchannel, dweight.to(weight.dtype), dlow, dbias


_forward.register_autograd(_gradients, setup_context=_setup_context)


def serves(x: Tensor, *gates: Tensor) -> bool:
    """Whether ``fuse_skip`` takes such a skip (B, C, H, W) and gates."""
    half = x.dtype in (torch.float16, torch.bfloat16)
    if not (x.is_cuda and x.numel() and half and x.shape[1] in CHANNELS):
        return False
    return [gate.shape[1:] for gate in gates] == [(1, *x.shape[2:]), (x.shape[1], 1, 1)] and own_gpu_kernels(x.dtype)


def fuse_skip(
    x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, low: Tensor, bias: Tensor
) -> Tensor:
    """``conv1x1(x spatial_gate channel_gate) + upsampled(low + bias)``, upsampled to the nearest; where it ``serves``.

    Args:
        x: (B, C, H, W), channels last, float16 or bfloat16; H and W even.
        spatial_gate: (B, 1, H, W).
        channel_gate: (B, C, 1, 1).
        weight: (C, C, 1, 1).
        low: (B, C, H / 2, W / 2), channels last.
        bias: (C,).

    Returns:
        (B, C, H, W), channels last, of the type of ``x``; summed in float32 and rounded once.
    """
    maps = [m.to(x.dtype) for m in (spatial_gate, channel_gate)]
    return _forward(x, *maps, as_autocast(weight), low.to(x.dtype), bias.float())
