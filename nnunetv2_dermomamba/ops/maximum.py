"""Maximum along one axis, with a gradient that stays finite when it is compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .backends import own_gpu_kernels


@torch.library.custom_op("dermomamba::maximum", mutates_args=())
def _forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    if x.is_cuda and x.numel() and own_gpu_kernels(x.dtype):
        from .triton_maximum import maximum_along  # Triton need not be there otherwise

        return maximum_along(x.contiguous(), dim)
    values, indices = x.max(dim)
    return values.contiguous(), indices.int().contiguous()


@_forward.register_fake
def _(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    values = x.new_empty(x.shape[:dim] + x.shape[dim + 1 :])
    return values, torch.empty_like(values, dtype=torch.int32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.dim = inputs
    ctx.length = x.shape[ctx.dim]
    ctx.save_for_backward(output[1])


def _gradients(ctx: Any, dvalues: Tensor, dindices: Tensor | None) -> tuple[Tensor, None]:
    (indices,) = ctx.saved_tensors
    indices, dvalues = indices.unsqueeze(ctx.dim), dvalues.unsqueeze(ctx.dim)
    if indices.device.type == "cpu":
        shape = list(indices.shape)
        shape[ctx.dim] = ctx.length
        return dvalues.new_zeros(shape).scatter_(ctx.dim, indices.long(), dvalues), None
    # one-hot times gradient rather than a scatter: a compiler fuses it into whatever reads it
    positions = torch.arange(ctx.length, device=indices.device, dtype=indices.dtype).view(
        -1, *(1,) * (indices.ndim - 1 - ctx.dim)
    )
    return (indices == positions) * dvalues, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _OfRows(torch.autograd.Function):
    """Along the last axis, in operations that a compiler fuses into one kernel with whatever makes ``x``.

    Whether a value equals the maximum is asked of float32, which is rounded alike wherever it is computed again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        value = x.amax(-1)
        ctx.length = x.shape[-1]
        positions = torch.arange(ctx.length, device=x.device, dtype=torch.int32)
        ctx.save_for_backward(torch.where(x == value[..., None], positions, ctx.length - 1).amin(-1))
        return value

    @staticmethod
    def backward(ctx: Any, dvalue: Tensor) -> Tensor:  # type: ignore[override]
        (index,) = ctx.saved_tensors
        positions = torch.arange(ctx.length, device=index.device, dtype=index.dtype)
        return (index[..., None] == positions) * dvalue[..., None]


def maximum(x: Tensor, dim: int) -> Tensor:
    """``x.amax(dim)`` whose gradient goes to one index, as ``x.max(dim)``'s does.

    The gradient of ``amax`` divides by the number of values that equal the maximum. Compiled under float16 autocast
    that number is 0, since one kernel compares rounded values with unrounded ones, and the gradient NaN; compiled,
    ``x.max(dim)`` fails in Triton 3.6 at this network's shapes. As an operator of its own it is neither.

    Args:
        x: any shape and floating-point type.
        dim: axis that is reduced.

    Returns:
        ``x``'s shape without ``dim``, ``x``'s type. On a GPU, where a gradient is wanted, NaN is passed over.
    """
    dim %= x.ndim
    if torch.is_grad_enabled() and x.requires_grad:
        if torch.compiler.is_compiling() and dim == x.ndim - 1 and x.dtype == torch.float32:
            return _OfRows.apply(x)  # type: ignore[no-any-return]
        return _forward(x, dim)[0]
    return x.amax(dim)
