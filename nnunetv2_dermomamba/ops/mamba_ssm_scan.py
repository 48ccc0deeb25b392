"""Adapter to mamba-ssm's CUDA kernel. Needs its compiled module ``selective_scan_cuda`` and none of its Python files.

Importing this module where the kernel is absent raises ImportError; ``backends`` turns that into a reason.
"""

from __future__ import annotations

import selective_scan_cuda
import torch
from torch import Tensor

_CHUNK = 2048  # positions per saved state in mamba-ssm's kernel (selective_scan_fwd_kernel.cuh)


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the kernel's saved states: (batch, dim, chunks, 2 state)."""
    batch, dim, length = u.shape
    return [batch, dim, (length + _CHUNK - 1) // _CHUNK, 2 * state]


def _inputs(u: Tensor, delta: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    return [m.float().contiguous() for m in (u, delta, B, C)]


def scan_1d_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """1D scan; arguments as ``naive.selective_scan_naive`` with B and C (batch, groups, state, length)."""
    u, delta, B, C = _inputs(u, delta, B, C)
    y, states, *_ = selective_scan_cuda.fwd(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    return y, states


def scan_1d_backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D and delta_bias (the last two also where they were None)."""
    u, delta, B, C = _inputs(u, delta, B, C)
    du, ddelta, dA, dB, dC, dD, dbias, *_ = selective_scan_cuda.bwd(
        u, delta, A, B, C, D, None, delta_bias, dy.float().contiguous(), states, None, None, delta_softplus, False
    )
    missing = torch.zeros(u.shape[1], device=u.device)
    return du, ddelta, dA, dB, dC, missing if dD is None else dD, missing if dbias is None else dbias.float()
