# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the depthwise convolution: cuDNN's gradient of its weights is many times slower than its bytes.

A program takes a tile of positions and channels, in whatever order memory has them, and sums over the kernel's taps.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunetv2_dermomamba.ops.triton_common import ceil_div

TILE = 512  # outputs of a program of the convolution
SUMMANDS = 256  # positions times channels that the weights' gradient takes at once, for up to 16 taps
WIDEST = 16  # channels of a program where they are adjacent in memory
PROGRAMS = 2048  # of the weights' gradient, about: enough to fill a GPU, few partial sums


@triton.jit
def convolution_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, channels, height, width,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, FLIP: tl.constexpr, HAS_BIAS: tl.constexpr,
    P: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """``y = conv(x) + bias`` with "same" padding; FLIP: with the kernel reversed, which is the gradient of x."""
    p = tl.program_id(0) * P + tl.arange(0, P)
    c = tl.program_id(1) * C + tl.arange(0, C)
    batch = tl.program_id(2).to(tl.int64)
    inside = (p < height * width)[:, None] & (c < channels)[None, :]
    row = p // width
    column = p % width
    y = tl.zeros([P, C], tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    for i in range(KH):
        r = row + (i - KH // 2) * DILATION
        for j in tl.static_range(KW):
            s = column + (j - KW // 2) * DILATION
            tap = (KH - 1 - i) * KW + KW - 1 - j if FLIP else i * KW + j
            weight = tl.load(weight_ptr + c * (KH * KW) + tap, mask=c < channels, other=0.0).to(tl.float32)
            exists = (r >= 0) & (r < height) & (s >= 0) & (s < width)
            at = x_ptr + batch * x_b + (r * x_h + s * x_w)[:, None] + (c * x_c)[None, :]
            y += tl.load(at, mask=inside & exists[:, None], other=0.0).to(tl.float32) * weight[None, :]
    at = y_ptr + batch * y_b + (row * y_h + column * y_w)[:, None] + (c * y_c)[None, :]
    tl.store(at, y, mask=inside)


@triton.jit
def weight_gradient_kernel(
    x_ptr, dy_ptr, part_ptr, items, blocks, channels, height, width,
    x_b, x_c, x_h, x_w, y_b, y_c, y_h, y_w,
    KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr,
    TAPS: tl.constexpr, P: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Partial sums of ``dy x`` for ``TAPS`` taps; the tap behind the kernel's last is the bias, whose ``x`` is 1."""
    tap = tl.program_id(2) * TAPS + tl.arange(0, TAPS)
    c = tl.program_id(1) * C + tl.arange(0, C)
    down = (tap // KW - KH // 2) * DILATION
    right = (tap % KW - KW // 2) * DILATION
    total = tl.zeros([TAPS, P, C], tl.float32)
    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        batch = (item // blocks).to(tl.int64)
        p = item % blocks * P + tl.arange(0, P)
        row = p // width
        column = p % width
        inside = (p < height * width)[:, None] & (c < channels)[None, :]
        at = dy_ptr + batch * y_b + (row * y_h + column * y_w)[:, None] + (c * y_c)[None, :]
        dy = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        r = row[None, :] + down[:, None]
        s = column[None, :] + right[:, None]
        exists = (r >= 0) & (r < height) & (s >= 0) & (s < width) & (tap < KH * KW)[:, None]
        at = x_ptr + batch * x_b + (r * x_h + s * x_w)[:, :, None] + (c * x_c)[None, None, :]
        x = tl.load(at, mask=inside[None, :, :] & exists[:, :, None], other=0.0).to(tl.float32)
        total += tl.where((tap == KH * KW)[:, None, None], 1.0, x) * dy[None, :, :]
    at = part_ptr + tl.program_id(0) * (channels * (KH * KW + 1)) + c[None, :] * (KH * KW + 1) + tap[:, None]
    tl.store(at, tl.sum(total, axis=1), mask=(tap < KH * KW + 1)[:, None] & (c < channels)[None, :])


def _tile(x: Tensor, size: int) -> tuple[int, int]:
    """Positions and channels of a program: channels where those are adjacent in memory."""
    channels = min(WIDEST, triton.next_power_of_2(x.shape[1])) if x.stride(1) == 1 else 1
    return min(size // channels, triton.next_power_of_2(x.shape[2] * x.shape[3])), channels


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, dilation: int, out: Tensor, flip: bool) -> Tensor:
    batch, channels, height, width = x.shape
    positions, together = _tile(x, TILE)
    grid = (ceil_div(height * width, positions), ceil_div(channels, together), batch)
    with torch.cuda.device_of(x):
        convolution_kernel[grid](
            x, weight, weight if bias is None else bias, out, channels, height, width, *x.stride(), *out.stride(),
            KH=weight.shape[2], KW=weight.shape[3], DILATION=dilation, FLIP=flip, HAS_BIAS=bias is not None,
            P=positions, C=together
        )  # fmt: skip
    return out


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Depthwise convolution of a map with "same" padding; sums in float32.

    Args:
        x: (B, C, H, W) of any strides, float16, bfloat16 or float32.
        weight: (C, 1, KH, KW), contiguous, odd sides.
        bias: (C,).
        dilation: of both axes.

    Returns:
        (B, C, H, W) of ``x``'s type and order in memory.
    """
    return _convolve(x, weight, bias, dilation, torch.empty_like(x), flip=False)


def depthwise_backward(dy: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``depthwise_forward`` with respect to x, of its type, and weight and bias, in float32."""
    dx = _convolve(dy, weight, None, dilation, torch.empty_like(x), flip=True)
    batch, channels, height, width = x.shape
    KH, KW = weight.shape[2:]
    outputs = KH * KW + 1
    taps = min(16, triton.next_power_of_2(outputs))
    positions, together = _tile(x, SUMMANDS)
    blocks = ceil_div(height * width, positions)
    bundles, groups = ceil_div(channels, together), ceil_div(outputs, taps)
    programs = min(batch * blocks, max(1, PROGRAMS // (bundles * groups)))
    parts = x.new_empty(programs, channels, outputs, dtype=torch.float32)
    with torch.cuda.device_of(x):
        weight_gradient_kernel[(programs, bundles, groups)](
            x, dy, parts, batch * blocks, blocks, channels, height, width, *x.stride(), *dy.stride(),
            KH=KH, KW=KW, DILATION=dilation, TAPS=taps, P=positions, C=together
        )  # fmt: skip
    total = parts.sum(0)
    return dx, total[:, :-1].reshape(weight.shape).contiguous(), total[:, -1].contiguous()
