"""BatchNorm and InstanceNorm of channels-last maps in training on a GPU: sums by a CUDA kernel, the rest a formula.

A compiler fuses the formula with what is around it. It would make the sums, too, but BatchNorm's in three times the
time that the bytes need, and the gradient, which sums and formula both read, it would write as float32.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import own_cuda_kernels
from .cuda_block import ceil_div

CHANNELS = [2**n for n in range(3, 10)]
"""That the kernel is made for."""
BLOCKS, FEWEST_ROWS = 8 * 132, 64
"""Parts that fill a large GPU of 132 processors; rows of one at least."""


def _parts(b: Tensor, groups: int) -> tuple[int, int, int]:
    """Rows of a group, parts that they fall into, and rows of a part."""
    rows = b.numel() // b.shape[1] // groups
    part_rows = max(FEWEST_ROWS, ceil_div(rows, ceil_div(BLOCKS, groups)))
    return rows, ceil_div(rows, part_rows), part_rows


@torch.library.custom_op("dermomamba::channel_sums", mutates_args=())
def channel_sums(a: Tensor | None, b: Tensor, shift: Tensor) -> Tensor:
    """For every channel the sums of ``a`` and of ``a (b - shift)`` over the positions of a group, part by part.

    It takes maps, not rows of channels: a compiler keeps results of what is both read before and after an operator
    like this one, instead of computing them again in the backward pass.

    Args:
        a: (B, C, H, W), channels last, float16 or bfloat16; None means ``b - shift``.
        b: as a.
        shift: (groups, C), float32; a group is a map, or all of them.

    Returns:
        (groups, parts, 2, C), float32.
    """
    kernel = import_module(".cuda_channel_sums", __package__)  # needs CUDA
    return kernel.channel_sums(a, b, shift, *_parts(b, len(shift)))  # type: ignore[no-any-return]


@channel_sums.register_fake
def _(a: Tensor | None, b: Tensor, shift: Tensor) -> Tensor:
    return shift.new_empty(len(shift), _parts(b, len(shift))[1], 2, b.shape[1])


def _rows(x: Tensor, groups: int) -> Tensor:
    """(B, C, H, W) as (groups, positions, C)."""
    return x.permute(0, 2, 3, 1).reshape(groups, -1, x.shape[1])


def _maps(rows: Tensor, like: Tensor) -> Tensor:
    """The opposite."""
    return rows.reshape(like.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2)


class _Normalise(torch.autograd.Function):
    """A normalisation by the statistics of ``x`` itself, which its gradient counts in.

    Maps go in and come out, and so do their gradients: where the gradient were rows, a compiler would copy it for the
    operator that takes it as maps, and so the result for the next one.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, rstd)
        scale = rstd * weight
        y = (_rows(x, len(mean)) * scale[:, None] + (bias - mean * scale)[:, None]).to(x.dtype)
        return _maps(y, x).clone()  # what a function returns must be no view, or it could not be changed in place

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, rstd = ctx.saved_tensors
        first, second = channel_sums(dy, x, mean).sum(1).unbind(1)
        # of x, not of its difference from the mean, which a compiler would keep from the forward pass, as float32
        count = x.numel() // mean.numel()
        scale, slope = rstd * weight, second * rstd * rstd / count
        constant = mean * slope - first / count
        dx = (_rows(dy, len(mean)) - _rows(x, len(mean)) * slope[:, None] + constant[:, None]) * scale[:, None]
        return _maps(dx.to(x.dtype), x), (second * rstd).sum(0), first.sum(0), None, None


def normalise(x: Tensor, norm: nn.BatchNorm2d | nn.InstanceNorm2d, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """What an affine ``norm`` makes of each channel of each group.

    Args:
        x: (B, C, H, W), channels last, float16 or bfloat16.
        norm: its weight and bias, float32, and its eps are used.
        groups: B for statistics of each map, 1 for those of all.

    Returns:
        As ``x``; mean and variance (of all positions, not an estimate), (groups, C), float32, without gradients.
    """
    with torch.no_grad():
        shift = x[:groups, :, 0, 0].float()  # near the mean, so that squares do not cancel
        sums = channel_sums(None, x.detach(), shift).sum(1)
        first, second = (sums * (groups * x.shape[1] / x.numel())).unbind(1)
        mean, variance = shift + first, (second - first * first).clamp(min=0)
        rstd = torch.rsqrt(variance + norm.eps)
    return _Normalise.apply(x, norm.weight, norm.bias, mean, rstd), mean, variance


def serves(x: Tensor) -> bool:
    """Whether ``normalise`` is the faster way for maps (B, C, H, W): compiled, in training, on a GPU."""
    if not (x.is_cuda and torch.compiler.is_compiling() and torch.is_grad_enabled() and x.numel()):
        return False
    half = x.dtype in (torch.float16, torch.bfloat16)
    return half and x.shape[1] in CHANNELS and own_cuda_kernels(x.dtype)


def instance_norm(x: Tensor, norm: nn.InstanceNorm2d) -> Tensor:
    """``norm(x)`` where it ``serves``; (B, C, H, W), channels last."""
    return normalise(x, norm, len(x))[0]


def batch_norm(x: Tensor, norm: nn.BatchNorm2d, offset: Tensor) -> Tensor:
    """``norm(x + offset)``; in training the offset, which the mean takes away again, goes into the running mean alone.

    Not where several processes share their statistics: nnU-Net makes BatchNorm a SyncBatchNorm then.

    Args:
        x: (B, C, H, W).
        norm: whose running statistics are updated in training.
        offset: (C,).

    Returns:
        (B, C, H, W).
    """
    mean, variance, momentum = norm.running_mean, norm.running_var, norm.momentum
    if type(norm) is not nn.BatchNorm2d or not norm.training or mean is None or variance is None or momentum is None:
        return norm(x + offset.to(x.dtype)[:, None, None])
    offset = offset.detach()
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
    if not serves(x):
        without = mean - offset
        y = F.batch_norm(x, without, variance, norm.weight, norm.bias, True, momentum, norm.eps)
        with torch.no_grad():
            mean.copy_(without + offset)
        return y
    y, own_mean, own_variance = normalise(x, norm, 1)
    with torch.no_grad():
        count = x.numel() // x.shape[1]
        mean.lerp_(own_mean[0] + offset, momentum)
        variance.lerp_(own_variance[0] * (count / max(count - 1, 1)), momentum)
    return y


def batch_norm_of_running(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``norm(x)``; compiled for a GPU, inference writes the formula out.

    PyTorch's own has a square root and a division, which a compiler does for every position: half of the pass's time.

    Args:
        x: (B, C, H, W).
        norm: its running statistics are used unless it is in training.

    Returns:
        (B, C, H, W), in the type of ``x``.
    """
    mean, variance = norm.running_mean, norm.running_var
    inference = x.is_cuda and torch.compiler.is_compiling() and type(norm) is nn.BatchNorm2d and not norm.training
    if not inference or mean is None or variance is None:
        return norm(x)
    return _of_running(x, norm, mean, variance)


def _of_running(x: Tensor, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> Tensor:
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return ((x - mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)
