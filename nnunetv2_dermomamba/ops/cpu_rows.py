"""Numba kernel of ``norm_linear``: a tile of rows is normalised and gated in cache and multiplied by the matrix."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_kernels import _OPTIONS, LOG2_E, _exp2, products
from .cpu_lanes import LANES, load, store
from .cpu_scan import pad_channels
from .cpu_threads import run_shared

ROWS = 64  # a tile of them, a multiple of 4; with 256 channels 64 KiB


@njit(**_OPTIONS)
def _normalise(x, weight, bias, eps, tile, steps):  # type: ignore[no-untyped-def]
    """LayerNorm of ``steps`` rows."""
    channels = x.shape[1]
    for t in range(steps):
        mean = x.dtype.type(0.0)
        for i in range(channels):
            mean += x[t, i]
        mean /= x.dtype.type(channels)
        variance = x.dtype.type(0.0)
        for i in range(channels):
            variance += (x[t, i] - mean) * (x[t, i] - mean)
        scale = x.dtype.type(1.0) / np.sqrt(variance / x.dtype.type(channels) + eps)
        for i in range(channels):
            tile[t, i] = (x[t, i] - mean) * scale * weight[i] + bias[i]


@njit(**_OPTIONS)
def _gate(gate, tile):  # type: ignore[no-untyped-def]
    """Multiplies the first rows of the tile by silu(gate)."""
    one, log2_e = tile.dtype.type(1.0), tile.dtype.type(LOG2_E)
    # as one long row: rows of few channels are shorter than the vector loop
    tile_row, gate_row = tile.reshape(tile.size), gate.reshape(gate.size)
    for i in range(gate.size):
        g = gate_row[i]
        e = _exp2(-abs(g) * log2_e)
        tile_row[i] *= g * (one if g >= 0 else e) / (one + e)


@njit(**_OPTIONS)
def _write(tile, column, steps, target, first):  # type: ignore[no-untyped-def]
    """Columns from ``column`` on of a tile's first ``steps`` rows to target, from its row ``first`` on."""
    whole = target.shape[1] // LANES * LANES
    for t in range(steps):
        for c in range(0, whole, LANES):
            store(target, first + t, c, load(tile, t, column + c))
        for c in range(whole, target.shape[1]):
            target[first + t, c] = tile[t, column + c]


@njit(**_OPTIONS)
def _norm_linear(x, gate, weight, bias, eps, matrix, out, first):  # type: ignore[no-untyped-def]
    """``linear(norm(x) * silu(gate))`` of rows into the rows of ``out`` from ``first`` on.

    x (n, c), gate (n, c) or (0, c) for none, matrix (c, m) in whole vectors, out (parts, rows, m / parts).
    """
    tile = np.zeros((ROWS, x.shape[1]), x.dtype)
    projected = np.empty((ROWS, matrix.shape[1]), x.dtype)
    for start in range(0, x.shape[0], ROWS):
        end = min(start + ROWS, x.shape[0])
        _normalise(x[start:end], weight, bias, eps, tile, end - start)
        if gate.shape[0]:
            _gate(gate[start:end], tile)
        products(tile, matrix, projected, end - start)
        for p in range(out.shape[0]):
            _write(projected, p * out.shape[2], end - start, out[p], first + start)


def norm_linear_cpu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, gate: Tensor | None, parts: int
) -> Tensor:
    """``norm_linear`` of float32 tensors, without gradients, its last axis in ``parts`` that lie one after the other.

    Args:
        x: (..., c).
        norm_weight: (c,).
        norm_bias: (c,).
        eps: of the LayerNorm.
        weight: (m, c).
        gate: as ``x``, or None.
        parts: a divisor of m.

    Returns:
        (parts, ..., m / parts).
    """
    channels = x.shape[-1]
    out = torch.empty(parts, *x.shape[:-1], weight.shape[0] // parts)
    rows, outs = x.reshape(-1, channels).contiguous().numpy(), out.view(parts, -1, out.shape[-1]).numpy()
    gates = (x.new_empty(0, channels) if gate is None else gate.reshape(-1, channels).contiguous()).numpy()
    vectors = norm_weight.detach().numpy(), norm_bias.detach().numpy(), np.float32(eps)
    matrix = pad_channels(weight.detach().t()).contiguous().numpy()
    share = max(1024, -(-len(rows) // torch.get_num_threads()))  # waking a thread takes as long as fewer rows do

    def task(start: int) -> None:
        part = slice(start, start + share)
        _norm_linear(rows[part], gates[part], *vectors, matrix, outs, start)

    run_shared(task, [(start,) for start in range(0, len(rows), share)])
    return out
