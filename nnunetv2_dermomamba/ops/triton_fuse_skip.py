# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of ``fuse_skip``: gates, 1 x 1 convolution and upsampled addend of a block of pixels in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import ceil_div

FULL = 2 * 132
"""Programs that fill a large GPU of 132 processors."""


@triton.jit
def fuse_kernel(
    x_ptr, spatial_ptr, channel_ptr, weight_ptr, low_ptr, bias_ptr, y_ptr, pixels, width,
    C: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """``P`` pixels of the map whose number is the program's second."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    pixel = tl.program_id(0) * P + tl.arange(0, P)
    inside = pixel < pixels
    batch = tl.program_id(1).to(tl.int64)
    at = batch * pixels + pixel
    c = tl.arange(0, C)
    x = tl.load(x_ptr + at[:, None] * C + c[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    spatial = tl.load(spatial_ptr + at, mask=inside, other=0.0).to(tl.float32)
    channel = tl.load(channel_ptr + batch * C + c).to(tl.float32)
    weight = tl.load(weight_ptr + c[None, :] * C + c[:, None])  # [in, out]
    gated = (x * spatial[:, None] * channel[None, :]).to(kind)
    y = tl.dot(gated, weight.to(kind), input_precision="ieee")
    row, column = pixel // width, pixel % width
    below = batch * (pixels // 4) + row // 2 * (width // 2) + column // 2
    low = tl.load(low_ptr + below[:, None] * C + c[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
    y += low + tl.load(bias_ptr + c)[None, :]
    tl.store(y_ptr + at[:, None] * C + c[None, :], y.to(kind), mask=inside[:, None])


def fuse_skip_forward(
    x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, low: Tensor, bias: Tensor
) -> Tensor:
    """See ``fuse_skip``; all maps (B, H, W, C) and contiguous, of one type but for ``weight`` and ``bias``."""
    batch, height, width, channels = x.shape
    pixels = height * width
    y = torch.empty_like(x)
    P = 128 if batch * ceil_div(pixels, 128) >= FULL else 32
    with torch.cuda.device_of(x):
        fuse_kernel[(ceil_div(pixels, P), batch)](
            x, spatial_gate, channel_gate, weight, low, bias, y, pixels, width, C=channels, P=P,
            num_warps=8 if P * channels > 8192 else 4
        )  # fmt: skip
    return y
