"""Numba kernels of ``norm_linear``: a tile of rows is normalised, gated and multiplied by the matrix in cache.

The backward pass makes a tile's rows again from the inputs, so that a training keeps nothing else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_kernels import _OPTIONS, LOG2_E, _exp2, products
from .cpu_lanes import LANES, load, splat, store
from .cpu_scan import pad_channels
from .cpu_threads import run_shared
from .unrecorded import apply

ROWS = 64  # a tile of them, a multiple of 4; with 256 channels 64 KiB
SUMMED = 4096
"""Rows whose gradients of the weights are summed by one task: results do not depend on the number of threads."""


@njit(inline="always")
def _moments(x, t, eps):  # type: ignore[no-untyped-def]
    """Mean of a row and the inverse of its standard deviation."""
    channels = x.shape[1]
    mean = x.dtype.type(0.0)
    for i in range(channels):
        mean += x[t, i]
    mean /= x.dtype.type(channels)
    variance = x.dtype.type(0.0)
    for i in range(channels):
        variance += (x[t, i] - mean) * (x[t, i] - mean)
    return mean, x.dtype.type(1.0) / np.sqrt(variance / x.dtype.type(channels) + eps)


@njit(**_OPTIONS)
def _normalise(x, weight, bias, eps, tile, steps):  # type: ignore[no-untyped-def]
    """LayerNorm of ``steps`` rows."""
    for t in range(steps):
        mean, scale = _moments(x, t, eps)
        for i in range(x.shape[1]):
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
def _gate_backward(gate, ungated, gradient, dgate):  # type: ignore[no-untyped-def]
    """Of the gradient of ``ungated * silu(gate)`` those of both, the first in place."""
    one, log2_e = gate.dtype.type(1.0), gate.dtype.type(LOG2_E)
    gate_row, dgate_row = gate.reshape(gate.size), dgate.reshape(gate.size)
    ungated_row, row = ungated.reshape(ungated.size), gradient.reshape(gradient.size)
    for i in range(gate.size):
        g = gate_row[i]
        e = _exp2(-abs(g) * log2_e)
        sigmoid = (one if g >= 0 else e) / (one + e)
        dgate_row[i] = row[i] * ungated_row[i] * sigmoid * (one + g * (one - sigmoid))
        row[i] *= g * sigmoid


@njit(**_OPTIONS)
def _normalise_backward(x, weight, eps, gradient, dweight, dbias, dx, steps):  # type: ignore[no-untyped-def]
    """Gradients of ``_normalise``: writes dx, adds to dweight and dbias."""
    channels, zero = x.shape[1], x.dtype.type(0.0)
    for t in range(steps):
        centre, scale = _moments(x, t, eps)
        mean, product = zero, zero
        for i in range(channels):
            value = (x[t, i] - centre) * scale
            dweight[i] += gradient[t, i] * value
            dbias[i] += gradient[t, i]
            mean += gradient[t, i] * weight[i]
            product += gradient[t, i] * weight[i] * value
        mean /= x.dtype.type(channels)
        product /= x.dtype.type(channels)
        for i in range(channels):
            dx[t, i] = (gradient[t, i] * weight[i] - mean - (x[t, i] - centre) * scale * product) * scale


@njit(**_OPTIONS)
def _add_outer_products(a, b, sums, steps):  # type: ignore[no-untyped-def]
    """Adds the sum over ``steps`` rows of a's columns (in fours) times b's (in whole vectors) to sums (c, m)."""
    for i in range(0, a.shape[1], 4):
        for j in range(0, b.shape[1], LANES):
            s0, s1, s2, s3 = load(sums, i, j), load(sums, i + 1, j), load(sums, i + 2, j), load(sums, i + 3, j)
            for t in range(steps):
                row = load(b, t, j)
                s0 = s0 + splat(a[t, i]) * row
                s1 = s1 + splat(a[t, i + 1]) * row
                s2 = s2 + splat(a[t, i + 2]) * row
                s3 = s3 + splat(a[t, i + 3]) * row
            store(sums, i, j, s0)
            store(sums, i + 1, j, s1)
            store(sums, i + 2, j, s2)
            store(sums, i + 3, j, s3)


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
def _read(source, first, steps, tile, column):  # type: ignore[no-untyped-def]
    """The inverse of ``_write``."""
    whole = source.shape[1] // LANES * LANES
    for t in range(steps):
        for c in range(0, whole, LANES):
            store(tile, t, column + c, load(source, first + t, c))
        for c in range(whole, source.shape[1]):
            tile[t, column + c] = source[first + t, c]


@njit(**_OPTIONS)
def _forward(x, gate, weight, bias, eps, matrix, outs, first, last):  # type: ignore[no-untyped-def]
    """``linear(norm(x) * silu(gate))`` of rows ``first`` to ``last`` into those of ``outs``.

    x (n, c), gate (n, c) or (0, c) for none, matrix (c, m) in whole vectors, every out (n, m / outs).
    """
    tile, projected = np.zeros((ROWS, x.shape[1]), x.dtype), np.empty((ROWS, matrix.shape[1]), x.dtype)
    for start in range(first, last, ROWS):
        end = min(start + ROWS, last)
        _normalise(x[start:end], weight, bias, eps, tile, end - start)
        if gate.shape[0]:
            _gate(gate[start:end], tile)
        products(tile, matrix, projected, end - start)
        for p in range(len(outs)):
            _write(projected, p * outs[p].shape[1], end - start, outs[p], start)


@njit(**_OPTIONS)
def _backward(  # type: ignore[no-untyped-def]
    dys, x, gate, weight, bias, eps, matrix, first, last, dx, dgate, dweight, dbias, dmatrix
):
    """Gradients of ``_forward``: writes dx and dgate, adds to the others.

    matrix (m in whole vectors, c in whole vectors); dmatrix (c, m), both in whole vectors.
    """
    channels, wide, kind = x.shape[1], matrix.shape[1], x.dtype
    ungated, gradient = np.empty((ROWS, channels), kind), np.empty((ROWS, channels), kind)
    padded = np.zeros((ROWS, wide), kind)
    dy, dinput = np.zeros((ROWS, matrix.shape[0]), kind), np.empty((ROWS, wide), kind)
    for start in range(first, last, ROWS):
        end = min(start + ROWS, last)
        steps = end - start
        for p in range(len(dys)):
            _read(dys[p], start, steps, dy, p * dys[p].shape[1])
        _normalise(x[start:end], weight, bias, eps, ungated, steps)
        products(dy, matrix, dinput, steps)
        _write(dinput, 0, steps, gradient, 0)
        if gate.shape[0]:
            gated = ungated.copy()
            _gate(gate[start:end], gated)
            _read(gated, 0, steps, padded, 0)
            _gate_backward(gate[start:end], ungated, gradient, dgate[start:end])
        else:
            _read(ungated, 0, steps, padded, 0)
        _add_outer_products(padded, dy, dmatrix, steps)
        _normalise_backward(x[start:end], weight, eps, gradient, dweight, dbias, dx[start:end], steps)


def _rows(x: Tensor) -> np.ndarray:
    return x.detach().reshape(-1, x.shape[-1]).contiguous().numpy()


def _vectors(norm_weight: Tensor, norm_bias: Tensor, eps: float) -> tuple[Any, ...]:
    weight = norm_weight.detach().numpy()
    return weight, norm_bias.detach().numpy(), weight.dtype.type(eps)


class _NormLinear(torch.autograd.Function):
    """Every part of the last axis is a result of its own, so that their gradients need not lie side by side."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        gate: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        parts: int,
    ) -> tuple[Tensor, ...]:
        outs = tuple(x.new_empty(*x.shape[:-1], weight.shape[0] // parts) for _ in range(parts))
        targets = tuple(_rows(out) for out in outs)
        rows, gates, vectors = _rows(x), _rows(gate), _vectors(norm_weight, norm_bias, eps)
        matrix = pad_channels(weight.detach().t()).contiguous().numpy()
        share = max(1024, -(-len(rows) // torch.get_num_threads()))  # waking a thread takes as long as fewer rows do
        run_shared(
            lambda start: _forward(rows, gates, *vectors, matrix, targets, start, min(start + share, len(rows))),
            [(start,) for start in range(0, len(rows), share)],
        )
        ctx.save_for_backward(x, gate, norm_weight, norm_bias, weight)
        ctx.eps = eps
        return outs

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, norm_weight, norm_bias, weight = ctx.saved_tensors
        dx, dgate = (m.new_empty(m.shape) for m in (x, gate))
        rows, gates, vectors = _rows(x), _rows(gate), _vectors(norm_weight, norm_bias, ctx.eps)
        matrix = pad_channels(pad_channels(weight.detach().t()).t())
        gradients, dx_rows, dgate_rows = tuple(_rows(dy) for dy in dys), _rows(dx), _rows(dgate)
        starts = range(0, len(rows), SUMMED)
        sums = [x.new_zeros(len(starts), *shape) for shape in (norm_weight.shape, norm_bias.shape, matrix.t().shape)]
        arrays, matrix_array = [m.numpy() for m in sums], matrix.contiguous().numpy()

        def task(i: int) -> None:
            last = min(starts[i] + SUMMED, len(rows))
            _backward(gradients, rows, gates, *vectors, matrix_array, starts[i], last,
                      dx_rows, dgate_rows, *(m[i] for m in arrays))  # fmt: skip

        run_shared(task, [(i,) for i in range(len(starts))])
        dscale, dshift, dmatrix = (m.sum(0) for m in sums)
        dmatrix = dmatrix.t()[: weight.shape[0], : weight.shape[1]].contiguous()
        return dx, dgate, dscale, dshift, None, dmatrix, None


def norm_linear_cpu(
    x: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float, weight: Tensor, gate: Tensor | None, parts: int
) -> tuple[Tensor, ...]:
    """``norm_linear``, its last axis in ``parts``.

    Args:
        x: (..., c), float32 or float64.
        norm_weight: (c,).
        norm_bias: (c,).
        eps: of the LayerNorm.
        weight: (m, c).
        gate: as ``x``, or None.
        parts: a divisor of m.

    Returns:
        ``parts`` times (..., m / parts).
    """
    gate = x.new_empty(0, x.shape[-1]) if gate is None else gate
    return apply(_NormLinear, x, gate, norm_weight, norm_bias, eps, weight, parts)  # type: ignore[no-any-return]
