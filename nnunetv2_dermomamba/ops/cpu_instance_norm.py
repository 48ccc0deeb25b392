"""Numba kernels of ``instance_norm``: channels-last maps are read three times and written once, backward twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .cpu_kernels import _OPTIONS
from .cpu_threads import run_shared
from .unrecorded import apply

SMALL = 2**18  # elements
RUN = 64
"""Rows that are summed in a map's type before they are added in float64."""


@njit(**_OPTIONS)
def _moments(rows, centre, sums, power):  # type: ignore[no-untyped-def]
    """Adds the sums of (rows - centre)**power over n of (n, c), in runs to float64."""
    part = np.empty_like(centre)
    for start in range(0, rows.shape[0], RUN):
        part[:] = 0
        for p in range(start, min(start + RUN, rows.shape[0])):
            for c in range(rows.shape[1]):
                value = rows[p, c] - centre[c]
                part[c] += value if power == 1 else value * value
        for c in range(rows.shape[1]):
            sums[c] += part[c]


@njit(**_OPTIONS)
def _scale_leaky_add(rows, scale, shift, other, factor, slope, out):  # type: ignore[no-untyped-def]
    """Out = factor other + leaky_relu(scale rows + shift), all (n, c)."""
    zero = out.dtype.type(0.0)
    for p in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            value = rows[p, c] * scale[c] + shift[c]
            out[p, c] = factor * other[p, c] + (value * slope if value < zero else value)


@njit(**_OPTIONS)
def _gradient_sums(dout, rows, scale, shift, centre, other, slope, sums):  # type: ignore[no-untyped-def]
    """Adds to sums (3, c), in runs: the leaky ReLU's gradient g, g (rows - centre) and dout other."""
    zero, part = dout.dtype.type(0.0), np.empty((3, rows.shape[1]), dout.dtype)
    for start in range(0, rows.shape[0], RUN):
        part[:] = 0
        for p in range(start, min(start + RUN, rows.shape[0])):
            for c in range(rows.shape[1]):
                gradient = dout[p, c] if rows[p, c] * scale[c] + shift[c] > zero else dout[p, c] * slope
                part[0, c] += gradient
                part[1, c] += gradient * (rows[p, c] - centre[c])
                part[2, c] += dout[p, c] * other[p, c]
        for i in range(3):
            for c in range(rows.shape[1]):
                sums[i, c] += part[i, c]


@njit(**_OPTIONS)
def _gradients(dout, rows, scale, shift, centre, factors, factor, slope, drows, dother):  # type: ignore[no-untyped-def]
    """Of the map scale g + factors[0] (rows - centre) + factors[1] with g as in ``_gradient_sums``, and of other."""
    zero = dout.dtype.type(0.0)
    for p in range(rows.shape[0]):
        for c in range(rows.shape[1]):
            gradient = dout[p, c] if rows[p, c] * scale[c] + shift[c] > zero else dout[p, c] * slope
            drows[p, c] = scale[c] * gradient + factors[0, c] * (rows[p, c] - centre[c]) + factors[1, c]
            dother[p, c] = factor * dout[p, c]


def channels_last_rows(x: Tensor) -> np.ndarray:
    """(B, C, H, W) as (B, H W, C): a view of channels-last memory, elsewhere a copy."""
    return x.detach().permute(0, 2, 3, 1).contiguous().flatten(1, 2).numpy()


def shares(batch: int, length: int, channels: int) -> list[tuple[int, slice]]:
    """(image, run of positions), about as many as threads; whole images where waking a thread takes longer."""
    threads = torch.get_num_threads() if length * channels > SMALL else 1
    share = -(-length // -(-threads // max(1, batch)))
    return [(b, slice(first, first + share)) for b in range(batch) for first in range(0, length, share)]


def _summed(shape: torch.Size, count: int, add: Callable[..., None]) -> np.ndarray:
    """What ``add(sums, b, part)`` adds to (count, C), float64, over all parts of each image, (B, count, C)."""
    batch, channels, height, width = shape
    parts = shares(batch, height * width, channels)
    sums = np.zeros((len(parts), count, channels))
    run_shared(lambda i, b, part: add(sums[i], b, part), [(i, *part) for i, part in enumerate(parts)])
    return sums.reshape(batch, -1, count, channels).sum(1)


class _InstanceNormLeakyAdd(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, slope: float, other: Tensor, factor: Tensor
    ) -> Tensor:
        batch, channels, height, width = x.shape
        length, kind = height * width, x.detach().numpy().dtype
        out = torch.empty_like(x, memory_format=torch.channels_last)
        rows, others, outs = (channels_last_rows(m) for m in (x, other, out))

        def mean_of(centre: np.ndarray, power: int) -> np.ndarray:
            def add(sums: np.ndarray, b: int, part: slice) -> None:
                _moments(rows[b, part], centre[b], sums[0], power)

            return _summed(x.shape, 1, add)[:, 0] / length

        mean = mean_of(np.zeros((batch, channels), kind), 1)
        inverse = 1 / np.sqrt(mean_of(mean.astype(kind), 2) + eps)
        scale = weight.detach().numpy() * inverse
        shift = bias.detach().numpy() - mean * scale
        ctx.moments, ctx.slope = (mean, inverse), kind.type(slope)
        ctx.affine = scale, shift = scale.astype(kind), shift.astype(kind)
        ctx.save_for_backward(x, weight, other, factor)
        number = kind.type(factor.item())

        def task(b: int, part: slice) -> None:
            _scale_leaky_add(rows[b, part], scale[b], shift[b], others[b, part], number, ctx.slope, outs[b, part])

        run_shared(task, shares(batch, length, channels))
        return out

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, other, factor = ctx.saved_tensors
        (mean, inverse), (scale, shift) = ctx.moments, ctx.affine
        batch, channels, height, width = x.shape
        length, kind = height * width, scale.dtype
        dx, dother = (torch.empty_like(m, memory_format=torch.channels_last) for m in (x, other))
        douts, rows, others, dxs, dothers = (channels_last_rows(m) for m in (dout, x, other, dx, dother))
        centre, number = mean.astype(kind), kind.type(factor.item())

        def of_part(b: int, part: slice) -> tuple[np.ndarray, ...]:
            return douts[b, part], rows[b, part], scale[b], shift[b], centre[b]

        def add(sums: np.ndarray, b: int, part: slice) -> None:
            _gradient_sums(*of_part(b, part), others[b, part], ctx.slope, sums)

        of_bias, of_scale, of_factor = _summed(x.shape, 3, add).transpose(1, 0, 2)
        of_weight = of_scale * inverse
        scaled = -weight.detach().numpy() * inverse / length
        factors = np.stack([scaled * inverse * of_weight, scaled * of_bias], axis=1).astype(kind)

        def task(b: int, part: slice) -> None:
            _gradients(*of_part(b, part), factors[b], number, ctx.slope, dxs[b, part], dothers[b, part])

        run_shared(task, shares(batch, length, channels))
        dweight, dbias = (torch.from_numpy(m.sum(0)).to(weight.dtype) for m in (of_weight, of_bias))
        return dx, dweight, dbias, None, None, dother, factor.new_full(factor.shape, of_factor.sum())


def instance_norm_leaky_add_cpu(
    x: Tensor, norm: nn.InstanceNorm2d, slope: float, other: Tensor, factor: Tensor
) -> Tensor:
    """``instance_norm_leaky_add`` of float32 or float64 maps; channels last in memory."""
    return apply(
        _InstanceNormLeakyAdd,  # type: ignore[no-any-return]
        x,
        norm.weight,
        norm.bias,
        norm.eps,
        slope,
        other,
        factor,
    )
