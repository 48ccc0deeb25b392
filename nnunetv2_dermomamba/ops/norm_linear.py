"""LayerNorm, gate and linear map of few channels as one pass: PyTorch's own, or a kernel where one serves.

PyTorch's LayerNorm spends most of its time between rows where they have 4 or 8 channels, as in the first stages. On a
GPU a CUDA kernel serves those few channels and a Triton kernel the others, on a CPU a Numba kernel.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends import choose_backend, own_gpu_kernels
from .library import no_double_backward
from .numba_serves import numba_serves

WIDEST_IN, WIDEST_OUT = 128, 256
"""Channels c and m that a program of the Triton kernels can hold."""


def _gpu_kernels(x: Tensor, gate: Tensor | None, matrix: Tensor) -> ModuleType:
    """The module whose kernels serve; neither need be there for PyTorch's own."""
    if choose_backend("cuda", x.dtype) == "cuda":
        from . import cuda_norm_linear

        if cuda_norm_linear.serves(x, gate, matrix):
            return cuda_norm_linear
    from . import triton_norm_linear

    return triton_norm_linear


@torch.library.custom_op("dermomamba::norm_linear", mutates_args=())
def norm_linear_by_kernel(
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    matrix: Tensor,
    kind: torch.dtype,
    maps: int,
) -> Tensor:
    """``triton_norm_linear.norm_linear_forward``, by the kernel that serves."""
    return _gpu_kernels(x, gate, matrix).norm_linear_forward(x, gate, scale, shift, eps, matrix, kind, maps)


@norm_linear_by_kernel.register_fake
def _(
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    matrix: Tensor,
    kind: torch.dtype,
    maps: int,
) -> Tensor:
    return x.new_empty(*x.shape[maps > 1 : -1], matrix.shape[0], dtype=kind)


@torch.library.custom_op("dermomamba::norm_linear_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dgate, *rest = _gpu_kernels(x, gate, matrix).norm_linear_backward(dy, x, gate, scale, shift, eps, matrix)
    return dx, x.new_empty(0) if dgate is None else dgate, *rest  # operators return tensors, not None


@_backward.register_fake
def _(
    dy: Tensor, x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, matrix: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx, dscale, dshift, dmatrix = (
        torch.empty_like(m, memory_format=torch.contiguous_format) for m in (x, scale, shift, matrix)
    )
    dgate = x.new_empty(0) if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    return dx, dgate, dscale, dshift, dmatrix


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, gate, scale, shift, ctx.eps, matrix, _, maps = inputs
    assert maps == 1, "only inference adds maps here"
    ctx.save_for_backward(x, gate, scale, shift, matrix)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, gate, scale, shift, matrix = ctx.saved_tensors
    dx, dgate, dscale, dshift, dmatrix = _backward(dy.contiguous(), x, gate, scale, shift, ctx.eps, matrix)
    return dx, None if gate is None else dgate, dscale, dshift, None, dmatrix, None, None


no_double_backward(_backward)
norm_linear_by_kernel.register_autograd(_gradients, setup_context=_setup_context)


def norm_linear(
    x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, gate: Tensor | None = None, summed: bool = False
) -> Tensor:
    """``linear(norm(x))``, or ``linear(norm(x) * silu(gate))``.

    Args:
        x: (..., c).
        norm: over the last axis.
        linear: without bias, c to m.
        gate: (..., c) or None.
        summed: x is (k, ..., c), and the sum over its first axis is meant.

    Returns:
        (..., m), of autocast's type under autocast.
    """
    maps = len(x) if summed and _triton_serves(x, linear.weight) else 1
    if summed and maps == 1:
        x = x.squeeze(0) if len(x) == 1 else x.sum(0)  # [0] would have a gradient that copies
    if _triton_serves(x, linear.weight):
        kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
        return norm_linear_by_kernel(x, gate, norm.weight, norm.bias, norm.eps, linear.weight, kind, maps)
    if _cpu_kernel_serves(x, norm, linear.weight, gate):
        from .cpu_norm_linear import norm_linear_cpu  # Numba need not be there for PyTorch's own

        return norm_linear_cpu(x, norm.weight, norm.bias, norm.eps, linear.weight, gate, 1)[0]
    x = norm(x)
    return linear(x if gate is None else x * F.silu(gate))


def norm_linear_halves(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> tuple[Tensor, ...]:
    """The two halves of ``linear(norm(x))``; on a CPU each lies in memory by itself, and so do their gradients.

    Args:
        x: (..., c).
        norm: over the last axis.
        linear: without bias, c to 2 m.

    Returns:
        Two of (..., m).
    """
    if _cpu_kernel_serves(x, norm, linear.weight, None):
        from .cpu_norm_linear import norm_linear_cpu

        return norm_linear_cpu(x, norm.weight, norm.bias, norm.eps, linear.weight, None, 2)
    return norm_linear(x, norm, linear).chunk(2, dim=-1)


def _cpu_kernel_serves(x: Tensor, norm: nn.LayerNorm, matrix: Tensor, gate: Tensor | None) -> bool:
    """The kernel looks at no bounds; of what does not match PyTorch's own complains, or makes something of it."""
    if not numba_serves(x) or (gate is not None and (gate.shape, gate.dtype) != (x.shape, x.dtype)):
        return False
    if norm.weight is None or norm.bias is None or matrix.shape[1:] != x.shape[-1:]:
        return False
    vectors = norm.weight, norm.bias
    return all(m.shape == x.shape[-1:] for m in vectors) and all(m.dtype == x.dtype for m in (matrix, *vectors))


def _triton_serves(x: Tensor, matrix: Tensor) -> bool:
    """Parameters are float32 and few enough for a program."""
    if not x.is_cuda or matrix.dtype != torch.float32:
        return False
    if matrix.shape[1] > WIDEST_IN or matrix.shape[0] > WIDEST_OUT:
        return False
    return own_gpu_kernels(x.dtype)
