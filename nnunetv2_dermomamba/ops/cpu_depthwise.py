"""Depthwise convolution on the CPU: Numba kernels over the rows of channels-last maps.

A row of a map, all columns with their channels, is one long vector: a tap adds a multiple of a shifted row, its weights
repeated as the channels are. So 4 channels, as in the network's first stage, fill vectors of eight as well as 64 do.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.nn import functional as F

from .cpu_kernels import _OPTIONS
from .cpu_lanes import LANES, load, splat, store
from .cpu_threads import run_shared

FEW = 2**15
"""Elements of a map below which waking a thread takes longer than the convolution."""


@njit(**_OPTIONS)
def _add_tap(x, source, weight, tap, offset, out, row):  # type: ignore[no-untyped-def]
    """Adds ``weight[tap]`` times row ``source`` of x, shifted by ``offset`` elements, to a row of out."""
    period = weight.shape[1] - LANES
    start, end = max(0, -offset), x.shape[1] - max(0, offset)
    for m in range(start, start + period, LANES):
        factor = load(weight, tap, m % period)
        for j in range(m, end - LANES + 1, period):
            store(out, row, j, load(out, row, j) + factor * load(x, source, j + offset))
    for j in range(max(start, end - (end - start) % LANES), end):
        out[row, j] += weight[tap, j % period] * x[source, j + offset]


@njit(**_OPTIONS)
def _add_tap_gradient(x, source, dy, row, offset, dweight, tap):  # type: ignore[no-untyped-def]
    """Gradient of ``_add_tap``'s weights, added to ``dweight[tap]``."""
    period = dweight.shape[1] - LANES
    start, end = max(0, -offset), x.shape[1] - max(0, offset)
    for m in range(start, start + period, LANES):
        one = load(dweight, tap, m % period)
        other = splat(dy.dtype.type(0.0))
        stop = end - LANES + 1
        for j in range(m, stop - period, 2 * period):  # two sums, for an addition waits for the one before
            one = one + load(dy, row, j) * load(x, source, j + offset)
            other = other + load(dy, row, j + period) * load(x, source, j + offset + period)
        if m < stop and (stop - 1 - m) // period % 2 == 0:
            j = m + (stop - 1 - m) // period * period
            one = one + load(dy, row, j) * load(x, source, j + offset)
        store(dweight, tap, m % period, one + other)
    for j in range(max(start, end - (end - start) % LANES), end):
        dweight[tap, j % period] += dy[row, j] * x[source, j + offset]


@njit(**_OPTIONS)
def _fill_row(values, out, row):  # type: ignore[no-untyped-def]
    """Sets a row of out to values (1, period + 8), repeated."""
    period, length, phase = values.shape[1] - LANES, out.shape[1], 0
    whole = length // LANES * LANES
    for j in range(0, whole, LANES):
        store(out, row, j, load(values, 0, phase))
        phase += LANES
        if phase >= period:
            phase -= period
    for j in range(whole, length):
        out[row, j] = values[0, j % period]


@njit(**_OPTIONS)
def convolve(x, weight, bias, channels, taps_h, taps_w, dilation, first, last, out):  # type: ignore[no-untyped-def]
    """Rows ``first`` to ``last`` of out; x and out (H, W c), weight (taps, period + 8) and bias repeated likewise."""
    for row in range(first, last):
        _fill_row(bias, out, row)
        for a in range(taps_h):
            source = row + (a - taps_h // 2) * dilation
            if 0 <= source < x.shape[0]:
                for b in range(taps_w):
                    offset = (b - taps_w // 2) * dilation * channels
                    _add_tap(x, source, weight, a * taps_w + b, offset, out, row)


@njit(**_OPTIONS)
def _weight_gradients(dy, x, ones, channels, taps_h, taps_w, dilation, dweight, dbias):  # type: ignore[no-untyped-def]
    """Adds the gradients of ``convolve``'s weight and bias, repeated as those are; ``ones`` (1, W c)."""
    for row in range(x.shape[0]):
        _add_tap_gradient(ones, 0, dy, row, 0, dbias, 0)
        for a in range(taps_h):
            source = row + (a - taps_h // 2) * dilation
            if 0 <= source < x.shape[0]:
                for b in range(taps_w):
                    offset = (b - taps_w // 2) * dilation * channels
                    _add_tap_gradient(x, source, dy, row, offset, dweight, a * taps_w + b)


def _rows(x: Tensor) -> np.ndarray:
    """(B, C, H, W) as (B, H, W C), copied if it is not channels last."""
    return x.detach().permute(0, 2, 3, 1).contiguous().flatten(2).numpy()


def _repeated(values: Tensor) -> np.ndarray:
    """(C, taps) as (taps, period + 8): whole vectors from any channel on."""
    channels = values.shape[0]
    order = np.arange(math.lcm(channels, LANES) + LANES) % channels
    return np.ascontiguousarray(values.detach().numpy().T[:, order])


def _summed(gradient: Tensor, channels: int) -> Tensor:
    """The inverse for gradients: (..., period + 8) added up as (C, ...)."""
    padded = F.pad(gradient, (0, -gradient.shape[-1] % channels))
    return padded.unflatten(-1, (-1, channels)).sum(-2).mT.contiguous()


def _bands(batch: int, height: int, width: int) -> list[tuple[int, int, int]]:
    """(image, first row, last row): whole images, or with fewer images than threads bands of them if they are large."""
    if height * width < FEW:
        return [(b, 0, height) for b in range(batch)]
    share = -(-height // max(1, -(-2 * torch.get_num_threads() // max(1, batch))))
    return [(b, first, min(first + share, height)) for b in range(batch) for first in range(0, height, share)]


def convolution(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Depthwise convolution with "same" padding of (B, C, H, W), to the same, channels last in memory."""
    batch, channels, height, width = x.shape
    out = torch.empty(batch, height, width, channels, dtype=x.dtype)
    source, target = _rows(x), out.flatten(2).numpy()
    weights, biases = _repeated(weight.flatten(1)), _repeated(bias[:, None])
    taps_h, taps_w = weight.shape[2:]

    def task(b: int, first: int, last: int) -> None:
        convolve(source[b], weights, biases, channels, taps_h, taps_w, dilation, first, last, target[b])

    run_shared(task, _bands(batch, height, width * channels))
    return out.permute(0, 3, 1, 2)


def _as(like: Tensor, y: Tensor) -> Tensor:
    """``y`` with the strides that ``torch.empty_like(like)`` has."""
    out = torch.empty_like(like)
    return y if y.stride() == out.stride() else out.copy_(y)


def depthwise_forward(x: Tensor, weight: Tensor, bias: Tensor, dilation: int) -> Tensor:
    """Depthwise convolution with "same" padding of a training: PyTorch's own, which is as fast.

    Args:
        x: (B, C, H, W), float32 or float64, any strides.
        weight: (C, 1, kh, kw), odd.
        bias: (C,).
        dilation: of both axes.

    Returns:
        (B, C, H, W), strides as ``torch.empty_like(x)``.
    """
    return _as(x, F.conv2d(x, weight, bias, padding="same", dilation=dilation, groups=x.shape[1]))


def depthwise_backward(dy: Tensor, x: Tensor, weight: Tensor, dilation: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (strides as ``torch.empty_like(x)``), weight and bias."""
    (batch, channels, _, width), (taps_h, taps_w) = x.shape, weight.shape[2:]
    dx = convolution(dy, weight.flip(2, 3), weight.new_zeros(channels), dilation)
    length = math.lcm(channels, LANES) + LANES
    # one sum an image, added in a fixed order: results do not depend on the threads
    dweights = torch.zeros(batch, taps_h * taps_w, length, dtype=x.dtype)
    dbiases = torch.zeros(batch, 1, length, dtype=x.dtype)
    dys, xs, ones = _rows(dy), _rows(x), np.ones((1, width * channels), _rows(x).dtype)
    dweight_arrays, dbias_arrays = dweights.numpy(), dbiases.numpy()

    def task(b: int) -> None:
        _weight_gradients(dys[b], xs[b], ones, channels, taps_h, taps_w, dilation, dweight_arrays[b], dbias_arrays[b])

    run_shared(task, [(b,) for b in range(batch)])
    dweight = _summed(dweights.sum(0), channels).view(weight.shape)
    return _as(x, dx), dweight, _summed(dbiases.sum(0), channels).view(channels)


def axial_depthwise(chunks: list[Tensor], layers: list[list[nn.Conv2d]]) -> Tensor:
    """``x + conv(conv(conv(x)))`` of every chunk (B, C, H, W) with its own layers, for inference.

    Args:
        chunks: maps of one shape.
        layers: for each chunk its convolutions, with ``weight``, ``bias`` and ``dilation`` as ``nn.Conv2d`` has them.

    Returns:
        (chunks B, C, H, W), one chunk after the other, channels last in memory.
    """
    batch, channels, height, width = chunks[0].shape
    out = torch.empty(len(chunks), batch, height, width, channels, dtype=chunks[0].dtype)
    target = out.flatten(3).numpy()
    kernels = [[(_repeated(layer.weight.flatten(1)), _repeated(layer.bias[:, None]), channels, *layer.weight.shape[2:],
                 layer.dilation[0], 0, height) for layer in chain] for chain in layers]  # fmt: skip

    def task(i: int, b: int) -> None:
        source = _rows(chunks[i][b : b + 1])[0]
        x = source
        for kernel in kernels[i]:
            y = np.empty_like(x)
            convolve(x, *kernel, y)
            x = y
        np.add(source, x, out=target[i, b])

    run_shared(task, [(i, b) for i in range(len(chunks)) for b in range(batch)])
    return out.flatten(0, 1).permute(0, 3, 1, 2)
