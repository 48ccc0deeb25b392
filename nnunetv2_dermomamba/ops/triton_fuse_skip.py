# mypy: disable-error-code="no-untyped-def"
"""Triton kernel of ``fuse_skip``: gates, 1 x 1 convolution and upsampled addend of a block of pixels in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import ceil_div

PIXELS = 64
"""Of a program at once."""
PROGRAMS = 8 * 132
"""At most, which fill a large GPU of 132 processors: each multiplies by weights that it has loaded once."""


@triton.jit
def fuse_kernel(
    x_ptr, spatial_ptr, channel_ptr, weight_ptr, low_ptr, bias_ptr, y_ptr, items, blocks, pixels, width,
    C: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """Blocks of ``P`` pixels, of which there are ``items``, ``blocks`` a map: as far apart as there are programs."""
    kind: tl.constexpr = x_ptr.dtype.element_ty
    c = tl.arange(0, C)
    weight = tl.load(weight_ptr + c[None, :] * C + c[:, None]).to(kind)  # [in, out]
    bias = tl.load(bias_ptr + c)
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), num_stages=2):
        batch = (item // blocks).to(tl.int64)
        pixel = item % blocks * P + tl.arange(0, P)
        inside = pixel < pixels
        at = batch * pixels + pixel
        x = tl.load(x_ptr + at[:, None] * C + c[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        spatial = tl.load(spatial_ptr + at, mask=inside, other=0.0).to(tl.float32)
        channel = tl.load(channel_ptr + batch * C + c).to(tl.float32)
        row, column = pixel // width, pixel % width
        below = batch * (pixels // 4) + row // 2 * (width // 2) + column // 2
        low = tl.load(low_ptr + below[:, None] * C + c[None, :], mask=inside[:, None], other=0.0).to(tl.float32)
        gated = (x * spatial[:, None] * channel[None, :]).to(kind)
        y = tl.dot(gated, weight, input_precision="ieee") + low + bias[None, :]
        tl.store(y_ptr + at[:, None] * C + c[None, :], y.to(kind), mask=inside[:, None])


def fuse_skip_forward(
    x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, low: Tensor, bias: Tensor
) -> Tensor:
    """See ``fuse_skip``; all maps (B, H, W, C) and contiguous, of one type but for ``weight`` and ``bias``."""
    batch, height, width, channels = x.shape
    pixels = height * width
    blocks = ceil_div(pixels, PIXELS)
    y = torch.empty_like(x)
    with torch.cuda.device_of(x):
        fuse_kernel[(min(batch * blocks, PROGRAMS),)](
            x, spatial_gate, channel_gate, weight, low, bias, y, batch * blocks, blocks, pixels, width,
            C=channels, P=PIXELS
        )  # fmt: skip
    return y
