"""CPU backend of the selective scan: Numba kernels on a thread pool, one task per image and pair of directions.

Chosen by measurement (``benchmarks/selective_scan.py``) over chunked PyTorch. Needs no compiler: Numba brings LLVM.
Memory beyond inputs and outputs: one second copy of y (or dx), the states at chunk starts (at most ``4 N / tile`` times
the size of x) and one tile's buffers per thread.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .cpu_kernels import LOG2_E, kernels


def tile_length(dim: int, state: int) -> int:
    """Positions per tile: the backward pass's two (tile, dim, state) buffers stay within a quarter of a megabyte."""
    return max(16, min(64, 32768 // (dim * state)))


def states_shape_2d(x: Tensor, state: int) -> list[int]:
    """Shape of the saved states of ``scan_2d_forward``: (batch, 4, chunks, d, N)."""
    batch, height, width, dim = x.shape
    tile = tile_length(dim, state)
    return [batch, 4, (height * width + tile - 1) // tile, dim, state]


def states_shape_1d(u: Tensor, state: int, groups: int) -> list[int]:
    """Shape of the saved states of ``scan_1d_forward``: (batch, groups, chunks, D / groups, N)."""
    batch, dim, length = u.shape
    tile = tile_length(dim // groups, state)
    return [batch, groups, (length + tile - 1) // tile, dim // groups, state]


@lru_cache(maxsize=4)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """One pool per process (threads do not survive a fork) and thread count."""
    return ThreadPoolExecutor(threads, thread_name_prefix="selective_scan")


def _run(task: Callable[..., None], arguments: Iterable[tuple[Any, ...]]) -> None:
    """Run the tasks on as many threads as PyTorch uses; the first error is raised here."""
    threads = torch.get_num_threads()
    if threads == 1:
        for argument in arguments:
            task(*argument)
        return
    for future in [_pool(threads, os.getpid()).submit(task, *argument) for argument in arguments]:
        future.result()


def _array(tensor: Tensor, kind: torch.dtype) -> np.ndarray:
    return tensor.detach().to(kind).contiguous().numpy()


def _accumulation_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _padded_rank(rank: int) -> int:
    """The rank is compiled in; padded to a multiple of four, one compilation serves every stage of the network."""
    return (rank + 3) // 4 * 4


def _weights_2d(
    x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor, kind: torch.dtype
) -> tuple[np.ndarray, ...]:
    """Per direction: w_in (d, N + N + padded R), w_delta (d, R), bias (d), A (d, N), A log2(e), D (d)."""
    dim, rank = dt_projs_weight.shape[1:]
    w_dt, w_bc = x_proj_weight.split([rank, x_proj_weight.shape[1] - rank], dim=1)
    w_in = torch.cat([w_bc, w_dt, w_dt.new_zeros(4, _padded_rank(rank) - rank, dim)], dim=1).mT
    A = A.view(4, dim, -1)
    tensors = (w_in, dt_projs_weight, dt_projs_bias, A, A * LOG2_E, Ds.view(4, dim))
    return tuple(_array(tensor, kind) for tensor in tensors)


def scan_2d_forward(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> tuple[Tensor, Tensor]:
    """Four-direction scan; arguments as ``naive.selective_scan_2d_naive``.

    Returns:
        y (B, H, W, d) and the states at the chunk starts, float32 (float64 for float64 input).
    """
    batch, height, width, dim = x.shape
    kind, state = _accumulation_type(x), A.shape[1]
    w_in, w_delta, bias, _, A2, D = _weights_2d(x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, kind)
    xs = _array(x, kind).reshape(batch, height * width, dim)
    states = torch.empty(states_shape_2d(x, state), dtype=kind)
    ys = torch.empty(2, batch, height, width, dim, dtype=kind)  # rows and columns, so that two tasks never share a row
    states_array, ys_array = states.numpy(), ys.view(2, batch, height * width, dim).numpy()
    forward, tile = kernels(state, _padded_rank(dt_projs_weight.shape[2])).forward_2d, tile_length(dim, state)

    def task(b: int, pair: int) -> None:
        for k in (pair, pair + 2):
            forward(xs[b], height, width, k, tile, w_in[k], w_delta[k], bias[k], A2[k], D[k],
                    states_array[b, k], ys_array[pair, b])  # fmt: skip

    _run(task, [(b, pair) for b in range(batch) for pair in (0, 1)])
    return ys[0].add_(ys[1]), states


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
    kind, state, rank = _accumulation_type(x), A.shape[1], dt_projs_weight.shape[2]
    w_in, w_delta, bias, A_array, A2, D = _weights_2d(x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds, kind)
    xs, dys = (_array(m, kind).reshape(batch, height * width, dim) for m in (x, dy))
    dxs = torch.empty(2, batch, height, width, dim, dtype=kind)
    dxs_array, states_array = dxs.view(2, batch, height * width, dim).numpy(), states.numpy()
    # One set of weight gradients a task, added afterwards in a fixed order: results do not depend on the threads.
    shapes = [(dim, 2 * state + _padded_rank(rank)), (dim, rank), (dim,), (dim, state), (dim,)]
    weight_grads = [torch.zeros(batch, 4, *shape, dtype=kind) for shape in shapes]
    grad_arrays = [grad.numpy() for grad in weight_grads]
    backward, tile = kernels(state, _padded_rank(rank)).backward_2d, tile_length(dim, state)

    def task(b: int, pair: int) -> None:
        for k in (pair, pair + 2):
            backward(dys[b], xs[b], height, width, k, tile, w_in[k], w_delta[k], bias[k], A_array[k], A2[k],
                     D[k], states_array[b, k], dxs_array[pair, b], *(grad[b, k] for grad in grad_arrays))  # fmt: skip

    _run(task, [(b, pair) for b in range(batch) for pair in (0, 1)])
    dw_in, dw_delta, dbias, dA, dD = (grad.sum(0) for grad in weight_grads)
    dw_bc, dw_dt = dw_in.mT[:, : 2 * state], dw_in.mT[:, 2 * state : 2 * state + rank]
    dx_proj = torch.cat([dw_dt, dw_bc], dim=1)
    return dxs[0].add_(dxs[1]), dx_proj, dw_delta, dbias, dA.flatten(0, 1), dD.flatten()


def _vector(tensor: Tensor | None, dim: int, groups: int, kind: torch.dtype) -> np.ndarray:
    full = torch.zeros(dim, dtype=kind) if tensor is None else tensor
    return _array(full, kind).reshape(groups, dim // groups)


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
    kind, per_group = _accumulation_type(u), dim // groups
    us, deltas = (_array(m, kind).reshape(batch, groups, per_group, length) for m in (u, delta))
    Bs, Cs, A2 = _array(B, kind), _array(C, kind), _array(A * LOG2_E, kind).reshape(groups, per_group, state)
    Ds, bias = _vector(D, dim, groups, kind), _vector(delta_bias, dim, groups, kind)
    y = torch.zeros(batch, groups, per_group, length, dtype=kind)
    states = torch.empty(states_shape_1d(u, state, groups), dtype=kind)
    y_array, states_array = y.numpy(), states.numpy()
    forward, tile = kernels(state).forward_1d, tile_length(per_group, state)

    def task(b: int, g: int) -> None:
        forward(us[b, g], deltas[b, g], A2[g], Bs[b, g], Cs[b, g], Ds[g], bias[g], delta_softplus, tile,
                states_array[b, g], y_array[b, g])  # fmt: skip

    _run(task, [(b, g) for b in range(batch) for g in range(groups)])
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
    kind, per_group = _accumulation_type(u), dim // groups
    dys, us, deltas = (_array(m, kind).reshape(batch, groups, per_group, length) for m in (dy, u, delta))
    Bs, Cs = _array(B, kind), _array(C, kind)
    As, A2 = (_array(m, kind).reshape(groups, per_group, state) for m in (A, A * LOG2_E))
    Ds, bias = _vector(D, dim, groups, kind), _vector(delta_bias, dim, groups, kind)
    du, ddelta = (torch.zeros(batch, groups, per_group, length, dtype=kind) for _ in range(2))
    dB, dC = (torch.zeros(B.shape, dtype=kind) for _ in range(2))
    dA, dD, dbias = (torch.zeros(batch, groups, *shape, dtype=kind)
                     for shape in ((per_group, state), (per_group,), (per_group,)))  # fmt: skip
    outputs = [m.numpy() for m in (du, ddelta, dA, dB, dC, dD, dbias)]
    states_array = states.numpy()
    backward, tile = kernels(state).backward_1d, tile_length(per_group, state)

    def task(b: int, g: int) -> None:
        backward(dys[b, g], us[b, g], deltas[b, g], As[g], A2[g], Bs[b, g], Cs[b, g], Ds[g], bias[g], delta_softplus,
                 tile, states_array[b, g], *(m[b, g] for m in outputs))  # fmt: skip

    _run(task, [(b, g) for b in range(batch) for g in range(groups)])
    du, ddelta = (m.view(batch, dim, length) for m in (du, ddelta))
    return du, ddelta, dA.sum(0).flatten(0, 1), dB, dC, dD.sum(0).flatten(), dbias.sum(0).flatten()
