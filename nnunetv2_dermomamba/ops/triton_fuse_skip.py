# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of ``fuse_skip``: gates, 1 x 1 convolution, upsampled addend and their gradients in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fuse_skip import OWN
from .triton_common import ceil_div

PIXELS, BACK_PIXELS = 64, 32
"""Of a program at once, forward and backward."""
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


@triton.jit
def fuse_backward_kernel(
    dy_ptr, x_ptr, spatial_ptr, channel_ptr, weight_ptr, dx_ptr, dspatial_ptr, dlow_ptr, sums_ptr,
    parts, blocks, across, height, width, C: tl.constexpr, OWN: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """``OWN`` channels of a part of the ``blocks`` of a map, ``across`` of them side by side: two rows of pixels.

    Of ``P`` pixels in a block four form a square that the upsampling made of one. ``sums``: those of the weight's, the
    channel gate's and the bias's gradients over the part's pixels, (C + 2, C). The former two follow from one product,
    since the channel gate is the same for all pixels.
    """
    kind: tl.constexpr = x_ptr.dtype.element_ty
    slices: tl.constexpr = C // OWN
    part = tl.program_id(0).to(tl.int64) // slices
    slice = tl.program_id(0) % slices
    batch = part // parts
    c = tl.arange(0, C)
    own = slice * OWN + tl.arange(0, OWN)
    p = tl.arange(0, P)
    square = tl.arange(0, P // 4)
    weight = tl.load(weight_ptr + c[:, None] * C + own[None, :]).to(kind)  # [out, in]
    channel = tl.load(channel_ptr + batch * C + own).to(tl.float32)
    product = tl.zeros([C, OWN], tl.float32)
    dbias = tl.zeros([P // 4, OWN], tl.float32)
    for block in tl.range((part % parts).to(tl.int32), blocks, parts, num_stages=2):
        top = block // across * 2
        left = block % across * (P // 2)
        column = left + p // 4 * 2 + p % 2
        inside = column < width
        at = (batch * height + top + p // 2 % 2) * width + column
        cells = at[:, None] * C + own[None, :]
        dy = tl.load(dy_ptr + at[:, None] * C + c[None, :], mask=inside[:, None], other=0.0)
        x = tl.load(x_ptr + cells, mask=inside[:, None], other=0.0).to(tl.float32)
        spatial = tl.load(spatial_ptr + at, mask=inside, other=0.0).to(tl.float32)
        product += tl.dot(tl.trans(dy), (x * spatial[:, None]).to(kind), input_precision="ieee")
        dgated = tl.dot(dy, weight, input_precision="ieee") * channel[None, :]
        tl.store(dx_ptr + cells, (dgated * spatial[:, None]).to(kind), mask=inside[:, None])
        row = ((batch * slices + slice) * height + top + p // 2 % 2) * width + column
        tl.store(dspatial_ptr + row, tl.sum(dgated * x, 1), mask=inside)
        dy_own = dy if C == OWN else tl.load(dy_ptr + cells, mask=inside[:, None], other=0.0)
        dlow = tl.sum(tl.reshape(dy_own.to(tl.float32), [P // 4, 4, OWN]), 1)
        dbias += dlow
        below = (batch * (height // 2) + top // 2) * (width // 2) + left // 2 + square
        exists = left // 2 + square < width // 2
        tl.store(dlow_ptr + below[:, None] * C + own[None, :], dlow.to(kind), mask=exists[:, None])
    sums_ptr += part * (C + 2) * C
    tl.store(sums_ptr + c[:, None] * C + own[None, :], product * channel[None, :])
    tl.store(sums_ptr + C * C + own, tl.sum(product * weight.to(tl.float32), 0))
    tl.store(sums_ptr + (C + 1) * C + own, tl.sum(dbias, 0))


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


def fuse_skip_backward(
    dy: Tensor, x: Tensor, spatial_gate: Tensor, channel_gate: Tensor, weight: Tensor, parts: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``x``, ``spatial_gate`` and ``low``, and sums for the others.

    Tensors as in ``fuse_skip_forward``. The spatial gate's gradient is one for every slice of ``OWN`` channels,
    (B, C / OWN, H, W), float32. Sums: of each map ``parts`` parts are summed apart, (B, parts, C + 2, C), float32, rows
    of the weight's gradient, then the channel gate's and the bias's.
    """
    batch, height, width, channels = x.shape
    dx = torch.empty_like(x)
    dspatial = x.new_empty(batch, channels // OWN, height, width, dtype=torch.float32)
    dlow = x.new_empty(batch, height // 2, width // 2, channels)
    sums = x.new_empty(batch, parts, channels + 2, channels, dtype=torch.float32)
    across = ceil_div(width, BACK_PIXELS // 2)
    with torch.cuda.device_of(x):
        fuse_backward_kernel[(batch * parts * (channels // OWN),)](
            dy, x, spatial_gate, channel_gate, weight, dx, dspatial, dlow, sums, parts, height // 2 * across, across,
            height, width, C=channels, OWN=OWN, P=BACK_PIXELS, num_warps=1 if channels < 128 else 2
        )  # fmt: skip
    return dx, dspatial, dlow, sums
