"""A decoder's 1 x 1 convolution of a gated skip, with what comes from the level below added, as one pass over the map.

Apart, the product with the gates is written and read, and so is the convolution's result: three times the bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import own_gpu_kernels
from .library import as_autocast, no_double_backward

CHANNELS = (32, 64, 128)
"""Of maps whose weights a program holds."""
OWN = 32
"""Channels of a program's gradients: of more the sums would not fit into its registers."""
BACK_PROGRAMS = 16 * 132
"""For gradients, of a warp or two, which fill a large GPU: each has ``OWN`` channels of a part of a map."""


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


@torch.library.custom_op("dermomamba::fuse_skip_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .triton_fuse_skip import fuse_skip_backward

    gates = spatial_gate.contiguous(), channel_gate.contiguous()
    dx, dspatial, dlow, sums = fuse_skip_backward(_rows(dy), _rows(x), *gates, weight.flatten(1).contiguous(), parts)
    return dx.permute(0, 3, 1, 2), dspatial, dlow.permute(0, 3, 1, 2), sums


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, channels, height, width = x.shape
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dspatial = x.new_empty(batch, channels // OWN, height, width, dtype=torch.float32)
    dlow = x.new_empty(batch, height // 2, width // 2, channels).permute(0, 3, 1, 2)
    return dx, dspatial, dlow, x.new_empty(batch, parts, channels + 2, channels, dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
    x, spatial_gate, channel_gate, weight = ctx.saved_tensors
    channels = x.shape[1]
    parts = max(1, BACK_PROGRAMS * OWN // channels // len(x))
    dx, dspatial, dlow, sums = _backward(dy, x, spatial_gate, channel_gate, weight, parts)
    of_maps = sums.sum(1)
    dchannel, total = of_maps[:, channels, :, None, None], of_maps.sum(0)
    dgates = [m.to(dy.dtype) for m in (dspatial.sum(1, keepdim=True), dchannel)]
    dweight = total[:channels, :, None, None].to(weight.dtype)
    return dx, *dgates, dweight, dlow, total[channels + 1]


_forward.register_autograd(_gradients, setup_context=_setup_context)
no_double_backward(_backward)


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
