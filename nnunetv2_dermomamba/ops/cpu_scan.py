"""CPU backend of the selective scan: Numba kernels on a thread pool, one task per image and pair of directions.

Chosen by measurement (``benchmarks/selective_scan.py``) over chunked PyTorch. Needs no compiler: Numba brings LLVM.
Memory beyond inputs and outputs: one second copy of y (or dx), the states at chunk starts (``4 N / TILE`` times x) and
one tile's buffers per thread.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_kernels import LOG2_E, backward_1d, backward_2d, forward_1d, forward_2d
from .cpu_lanes import LANES
from .cpu_threads import run_shared
from .library import accumulation_type

TILE = 64
"""Positions per tile, a multiple of 4: the backward pass's buffers, of 4 N vectors each, are 128 KiB at 16 states."""


COLUMNS_FIRST = (1, 0)
"""Column-major paths take longer, and what takes longest must not begin last."""


def _padded(dim: int) -> int:
    """Channels in whole vectors."""
    return (dim + LANES - 1) // LANES * LANES


def _even(state: int) -> int:
    """States in whole pairs."""
    return state + state % 2


def states_shape_2d(x: Tensor, rank: int, state: int) -> list[int]:
    """Shape of the saved states of ``scan_2d_forward``: (batch, 4, chunks, d / 8 * N, 8), d rounded up."""
    batch, height, width, dim = x.shape
    return [batch, 4, (height * width + TILE - 1) // TILE, _padded(dim) // LANES * _even(state), LANES]


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (batch, groups, chunks, D / groups / 8 * N, 8), rounded up."""
    batch, dim, length = u.shape
    return [batch, groups, (length + TILE - 1) // TILE, _padded(dim // groups) // LANES * _even(state), LANES]


def _array(tensor: Tensor, kind: torch.dtype) -> np.ndarray:
    return tensor.detach().to(kind).contiguous().numpy()


def pad_channels(tensor: Tensor) -> Tensor:
    """(..., d) with zeros up to whole vectors."""
    return F.pad(tensor, (0, _padded(tensor.shape[-1]) - tensor.shape[-1]))


def _to_vectors(A: Tensor) -> Tensor:
    """(groups, d, N) to (groups, d / 8 * N, 8), N even: the kernels' order of what there is for every state."""
    A = F.pad(A, (0, A.shape[2] % 2))
    return pad_channels(A.mT).unflatten(2, (-1, LANES)).transpose(1, 2).flatten(1, 2)


def _from_vectors(vectors: Tensor, dim: int, state: int) -> Tensor:
    """The inverse of ``_to_vectors``, (groups d, N)."""
    return vectors.unflatten(1, (-1, _even(state))).transpose(2, 3).flatten(1, 2)[:, :dim, :state].flatten(0, 1)


def _weights_2d(
    x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor, kind: torch.dtype
) -> tuple[np.ndarray, ...]:
    """Per direction: w_in (d, row), w_delta (R, d), bias (1, d), A and A log2(e) in vectors, D (1, d); d padded."""
    dim, rank = dt_projs_weight.shape[1:]
    state = A.shape[1]
    w_dt, w_b, w_c = x_proj_weight.split([rank, state, state], dim=1)
    odd = x_proj_weight.new_zeros(4, state % 2, dim)
    w_in = pad_channels(torch.cat([w_b, odd, w_c, odd, w_dt], dim=1)).mT
    w_in = pad_channels(w_in)
    A = _to_vectors(A.view(4, dim, -1))
    w_delta, bias, D = (pad_channels(m) for m in (dt_projs_weight.mT, dt_projs_bias[:, None], Ds.view(4, 1, dim)))
    return tuple(_array(tensor, kind) for tensor in (w_in, w_delta, bias, A, A * LOG2_E, D))


def scan_2d_forward(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """Four-direction scan; arguments as ``composed.selective_scan_2d_composed``, and whether states are wanted.

    Returns:
        y (B, H, W, d) and the states at the chunk starts, or none, float32 (float64 for float64 input).
    """
    batch, height, width, dim = x.shape
    kind, state = accumulation_type(x), A.shape[1]
    w_in, w_delta, bias, _, A2, D = _weights_2d(x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, kind)
    xs = _array(x, kind).reshape(batch, height * width, dim)
    states = torch.empty(states_shape_2d(x, dt_projs_weight.shape[2], state), dtype=kind)
    ys = torch.empty(2, batch, height, width, dim, dtype=kind)  # rows and columns, so that two tasks never share a row
    states_array, ys_array = states.numpy(), ys.view(2, batch, height * width, dim).numpy()

    def task(b: int, pair: int) -> None:
        for k in (pair, pair + 2):
            forward_2d(_even(state), xs[b], height, width, k, TILE, w_in[k], w_delta[k], bias[k], A2[k], D[k],
                    states_array[b, k], ys_array[pair, b])  # fmt: skip

    run_shared(task, [(b, pair) for pair in COLUMNS_FIRST for b in range(batch)])
    return ys[0].add_(ys[1]), states if keep else states.new_empty(0)


def scan_2d_backward(
    dy: Tensor,
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, x_proj_weight, dt_projs_weight, dt_projs_bias, A and Ds."""
    batch, height, width, dim = x.shape
    kind, state, rank = accumulation_type(x), A.shape[1], dt_projs_weight.shape[2]
    w_in, w_delta, bias, A_array, A2, D = _weights_2d(x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, kind)
    xs, dys = (_array(m, kind).reshape(batch, height * width, dim) for m in (x, dy))
    dxs = torch.empty(2, batch, height, width, dim, dtype=kind)
    dxs_array, states_array = dxs.view(2, batch, height * width, dim).numpy(), states.numpy()
    # One set of weight gradients a task, added afterwards in a fixed order: results do not depend on the threads.
    weight_grads = [torch.zeros(batch, *m.shape, dtype=kind) for m in (w_in, w_delta, bias, A_array, D)]
    grad_arrays = [grad.numpy() for grad in weight_grads]

    def task(b: int, pair: int) -> None:
        for k in (pair, pair + 2):
            backward_2d(_even(state), dys[b], xs[b], height, width, k, TILE, w_in[k], w_delta[k], bias[k],
                        A_array[k], A2[k], D[k], states_array[b, k], dxs_array[pair, b],
                        *(grad[b, k] for grad in grad_arrays))  # fmt: skip

    run_shared(task, [(b, pair) for pair in COLUMNS_FIRST for b in range(batch)])
    dw_in, dw_delta, dbias, dA, dD = (grad.sum(0) for grad in weight_grads)
    dw_b, dw_c, dw_dt = dw_in.mT[:, : 2 * _even(state) + rank, :dim].split([_even(state), _even(state), rank], dim=1)
    dx_proj = torch.cat([dw_dt, dw_b[:, :state], dw_c[:, :state]], dim=1)
    dw_delta = dw_delta.mT[:, :dim].contiguous()
    dbias, dD = (m[:, 0, :dim].contiguous() for m in (dbias, dD))
    return dxs[0].add_(dxs[1]), dx_proj, dw_delta, dbias, _from_vectors(dA, dim, state), dD.flatten()


def _vector(tensor: Tensor | None, dim: int, groups: int, kind: torch.dtype) -> np.ndarray:
    full = torch.zeros(dim, dtype=kind) if tensor is None else tensor
    return _array(pad_channels(full.view(groups, 1, dim // groups)), kind)


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
    """1D scan; arguments as ``naive.selective_scan_naive`` with B and C (batch, groups, state, length).

    Returns:
        y (batch, dim, length) and the states at the chunk starts, float32 (float64 for float64 input).
    """
    (batch, dim, length), (groups, state) = u.shape, B.shape[1:3]
    kind, per_group = accumulation_type(u), dim // groups
    us, deltas = (_array(m, kind).reshape(batch, groups, per_group, length) for m in (u, delta))
    Bs, Cs = _array(B, kind), _array(C, kind)
    A2 = _array(_to_vectors(A.view(groups, per_group, state) * LOG2_E), kind)
    Ds, bias = _vector(D, dim, groups, kind), _vector(delta_bias, dim, groups, kind)
    y = torch.zeros(batch, groups, per_group, length, dtype=kind)
    states = torch.empty(states_shape_1d(u, state, groups), dtype=kind)
    y_array, states_array = y.numpy(), states.numpy()

    def task(b: int, g: int) -> None:
        forward_1d(_even(state), us[b, g], deltas[b, g], A2[g], Bs[b, g], Cs[b, g], Ds[g], bias[g], delta_softplus,
                   TILE, states_array[b, g], y_array[b, g])  # fmt: skip

    run_shared(task, [(b, g) for b in range(batch) for g in range(groups)])
    return y.view(batch, dim, length), states


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
    (batch, dim, length), (groups, state) = u.shape, B.shape[1:3]
    kind, per_group = accumulation_type(u), dim // groups
    dys, us, deltas = (_array(m, kind).reshape(batch, groups, per_group, length) for m in (dy, u, delta))
    Bs, Cs = _array(B, kind), _array(C, kind)
    A = _to_vectors(A.view(groups, per_group, state))
    As, A2 = _array(A, kind), _array(A * LOG2_E, kind)
    Ds, bias = _vector(D, dim, groups, kind), _vector(delta_bias, dim, groups, kind)
    du, ddelta = (torch.zeros(batch, groups, per_group, length, dtype=kind) for _ in range(2))
    dB, dC = (torch.zeros(B.shape, dtype=kind) for _ in range(2))
    dA, dD, dbias = (torch.zeros(batch, *m.shape, dtype=kind) for m in (As, Ds, bias))
    outputs = [m.numpy() for m in (du, ddelta, dA, dB, dC, dD, dbias)]
    states_array = states.numpy()

    def task(b: int, g: int) -> None:
        backward_1d(_even(state), dys[b, g], us[b, g], deltas[b, g], As[g], A2[g], Bs[b, g], Cs[b, g], Ds[g],
                    bias[g], delta_softplus, TILE, states_array[b, g], *(m[b, g] for m in outputs))  # fmt: skip

    run_shared(task, [(b, g) for b in range(batch) for g in range(groups)])
    du, ddelta = (m.view(batch, dim, length) for m in (du, ddelta))
    dD, dbias = (m.sum(0)[:, 0, :per_group].flatten() for m in (dD, dbias))
    return du, ddelta, _from_vectors(dA.sum(0), per_group, state), dB, dC, dD, dbias
