"""Numba kernel of ``instance_norm``: channels-last maps are read three times and written once."""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn

from .cpu_kernels import _OPTIONS
from .cpu_threads import run_shared

SMALL = 2**18  # elements


@njit(**_OPTIONS)
def _moments(rows, centre, sums, power):  # type: ignore[no-untyped-def]
    """Adds the sums of (rows - centre)**power over n of (n, c), in runs of 64 to float64."""
    part = np.empty_like(centre)
    for start in range(0, rows.shape[0], 64):
        part[:] = 0
        for p in range(start, min(start + 64, rows.shape[0])):
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


def channels_last_rows(x: Tensor) -> np.ndarray:
    """(B, C, H, W) as (B, H W, C): a view of channels-last memory, elsewhere a copy."""
    return x.detach().permute(0, 2, 3, 1).contiguous().flatten(1, 2).numpy()


def shares(batch: int, length: int, channels: int) -> list[tuple[int, slice]]:
    """(image, run of positions), about as many as threads; whole images where waking a thread takes longer."""
    threads = torch.get_num_threads() if length * channels > SMALL else 1
    share = -(-length // -(-threads // max(1, batch)))
    return [(b, slice(first, first + share)) for b in range(batch) for first in range(0, length, share)]


def instance_norm_leaky_add_cpu(
    x: Tensor, norm: nn.InstanceNorm2d, slope: float, other: Tensor, factor: Tensor
) -> Tensor:
    """``instance_norm_leaky_add`` of float32 maps, without gradients; channels last in memory."""
    batch, channels, height, width = x.shape
    length = height * width
    out = torch.empty(batch, height, width, channels)
    rows, others, outs = channels_last_rows(x), channels_last_rows(other), out.flatten(1, 2).numpy()
    parts = shares(batch, length, channels)

    def mean_of(centre: np.ndarray, power: int) -> np.ndarray:
        sums = np.zeros((len(parts), channels))
        run_shared(lambda i, b, part: _moments(rows[b, part], centre[b], sums[i], power),
             [(i, *part) for i, part in enumerate(parts)])  # fmt: skip
        return sums.reshape(batch, -1, channels).sum(1) / length

    mean = mean_of(np.zeros((batch, channels), np.float32), 1)
    variance = mean_of(mean.astype(np.float32), 2)
    weight, bias = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    scale = weight / np.sqrt(variance + norm.eps)
    shift = (bias - mean * scale).astype(np.float32)
    scale, number, slope = scale.astype(np.float32), np.float32(factor.item()), np.float32(slope)

    def task(b: int, part: slice) -> None:
        _scale_leaky_add(rows[b, part], scale[b], shift[b], others[b, part], number, slope, outs[b, part])

    run_shared(task, parts)
    return out.permute(0, 3, 1, 2)
