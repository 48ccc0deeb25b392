"""Numba kernel of ``norm_linear``: a tile of rows is normalised and gated in cache and multiplied by the matrix."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_kernels import _OPTIONS, LOG2_E, _exp2, products, scatter_rows
from .cpu_scan import _pad_channels, _run

ROWS = 64  # a tile of them; with 256 channels 64 KiB


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
def _gate(gate, rows, tile, steps):  # type: ignore[no-untyped-def]
    """Multiplies ``steps`` rows by silu(gate); ``rows`` is a buffer like ``tile``."""
    for t in range(steps):
        for i in range(gate.shape[1]):
            rows[t, i] = gate[t, i]
    one, log2_e = tile.dtype.type(1.0), tile.dtype.type(LOG2_E)
    tile_row, gate_row = tile.reshape(tile.size), rows.reshape(rows.size)
    for i in range(steps * tile.shape[1]):
        g = gate_row[i]
        e = _exp2(-abs(g) * log2_e)
        tile_row[i] *= g * (one if g >= 0 else e) / (one + e)


@njit(**_OPTIONS)
def _norm_linear(x, gate, weight, bias, eps, matrix, out):  # type: ignore[no-untyped-def]
    """Rows x (n, c), gate (n, c) or (0, c) for none, matrix (c, m padded to whole vectors); fills out (n, m)."""
    tile, rows = np.zeros((ROWS, x.shape[1]), x.dtype), np.empty((ROWS, x.shape[1]), x.dtype)
    projected = np.empty((ROWS, matrix.shape[1]), x.dtype)
    for start in range(0, x.shape[0], ROWS):
        end = min(start + ROWS, x.shape[0])
        _normalise(x[start:end], weight, bias, eps, tile, end - start)
        if gate.shape[0]:
            _gate(gate[start:end], rows, tile, end - start)
        products(tile, matrix, projected, end - start)
        scatter_rows(projected, out, start, 1, end - start, out.shape[0], 1, False, False)


def norm_linear_cpu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, gate: Tensor | None
) -> Tensor:
    """``norm_linear`` of float32 tensors, without gradients.

    Args:
        x: (..., c).
        norm_weight: (c,).
        norm_bias: (c,).
        eps: of the LayerNorm.
        weight: (m, c).
        gate: as ``x``, or None.

    Returns:
        (..., m).
    """
    channels = x.shape[-1]
    out = torch.empty(*x.shape[:-1], weight.shape[0])
    rows, out_rows = x.reshape(-1, channels).numpy(), out.view(-1, weight.shape[0]).numpy()
    gates = (x.new_empty(0, channels) if gate is None else gate.reshape(-1, channels)).numpy()
    vectors = norm_weight.detach().numpy(), norm_bias.detach().numpy(), np.float32(eps)
    matrix = _pad_channels(weight.detach().t()).contiguous().numpy()
    share = max(1024, -(-len(rows) // torch.get_num_threads()))  # waking a thread takes as long as fewer rows do

    def task(start: int) -> None:
        part = slice(start, start + share)
        _norm_linear(rows[part], gates[part], *vectors, matrix, out_rows[part])

    _run(task, [(start,) for start in range(0, len(rows), share)])
    return out
