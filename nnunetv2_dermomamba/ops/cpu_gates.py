"""Numba kernels of CBAM's two gates for inference: a channels-last map is read twice and its product written once.

Fresh memory costs as much as arithmetic here, so the second gate multiplies behind the decoder's 1x1 convolution, in
place.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .cpu_instance_norm import SMALL, channels_last_rows, shares
from .cpu_kernels import _OPTIONS
from .cpu_lanes import LANES, at_least, largest, load, splat, store, total
from .cpu_threads import run_shared


@njit(**_OPTIONS)
def _pool(rows, maximum, sums):  # type: ignore[no-untyped-def]
    """Maximum (c) and, in runs of 64 rows to float64, sum over n of (n, c)."""
    part, top = np.empty_like(maximum), maximum.copy()  # other threads' maxima lie in the same line of cache
    for start in range(0, rows.shape[0], 64):
        part[:] = 0
        for p in range(start, min(start + 64, rows.shape[0])):
            for c in range(rows.shape[1]):
                value = rows[p, c]
                part[c] += value
                top[c] = top[c] if value <= top[c] else value
        for c in range(rows.shape[1]):
            sums[c] += part[c]
    maximum[:] = top


@njit(**_OPTIONS)
def _gate(rows, gate, out, summary):  # type: ignore[no-untyped-def]
    """Out = rows * gate, (n, c) times (1, c), and its maximum and mean over c, (n, 2)."""
    channels = rows.shape[1]
    for p in range(rows.shape[0]):
        top = load(rows, p, 0) * load(gate, 0, 0)
        added = splat(rows.dtype.type(0.0))
        for c in range(0, channels, LANES):
            value = load(rows, p, c) * load(gate, 0, c)
            store(out, p, c, value)
            top = at_least(value, top)
            added = added + value
        summary[p, 0] = largest(top)
        summary[p, 1] = total(added) / rows.dtype.type(channels)


@njit(**_OPTIONS)
def _gate_and_add(rows, gate, low, width):  # type: ignore[no-untyped-def]
    """Rows of one line of a map (W, c) times gate (W, 1), plus its line of the map of half the size (W / 2, c)."""
    for p in range(width):
        factor = splat(gate[p, 0])
        for c in range(0, rows.shape[1], LANES):
            store(rows, p, c, load(rows, p, c) * factor + load(low, p // 2, c))


@njit(**_OPTIONS)
def _gate_and_add_lines(rows, gate, low, width, first, last):  # type: ignore[no-untyped-def]
    """``_gate_and_add`` of lines ``first`` to ``last``; rows (H W, c), gate (H W, 1), low (H W / 4, c)."""
    for line in range(first, last):
        here, half = line * width, line // 2 * (width // 2)
        _gate_and_add(rows[here : here + width], gate[here : here + width], low[half : half + width // 2], width)


def pool_positions(x: Tensor) -> Tensor:
    """Maximum and mean over the positions of (B, C, H, W) float32, (2, B, C); a NaN is in the mean."""
    batch, channels, height, width = x.shape
    rows, parts = channels_last_rows(x), shares(batch, height * width, channels)
    maxima, sums = np.full((len(parts), channels), -np.inf, np.float32), np.zeros((len(parts), channels))
    run_shared(
        lambda i, b, part: _pool(rows[b, part], maxima[i], sums[i]), [(i, *part) for i, part in enumerate(parts)]
    )
    mean = sums.reshape(batch, -1, channels).sum(1) / (height * width)
    return torch.from_numpy(np.stack([maxima.reshape(batch, -1, channels).max(1), mean.astype(np.float32)]))


def gate_channels(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``x * gate`` and its maximum and mean over the channels; a NaN is in the mean.

    Args:
        x: (B, C, H, W), float32, C in whole vectors.
        gate: (B, C, 1, 1).

    Returns:
        (B, C, H, W) and (B, 2, H, W), channels last in memory.
    """
    batch, channels, height, width = x.shape
    out, summary = torch.empty(batch, height, width, channels), torch.empty(batch, height, width, 2)
    rows, gates = channels_last_rows(x), gate.reshape(batch, 1, channels).contiguous().numpy()
    outs, summaries = out.flatten(1, 2).numpy(), summary.flatten(1, 2).numpy()
    run_shared(
        lambda b, part: _gate(rows[b, part], gates[b], outs[b, part], summaries[b, part]),
        shares(batch, height * width, channels),
    )
    return out.permute(0, 3, 1, 2), summary.permute(0, 3, 1, 2)


def gate_and_add(x: Tensor, gate: Tensor, low: Tensor) -> Tensor:
    """``x * gate`` plus ``low`` upsampled to twice its size (nearest), in place.

    Args:
        x: (B, C, 2 H, 2 W), float32, channels last in memory, C in whole vectors.
        gate: (B, 1, 2 H, 2 W).
        low: (B, C, H, W).

    Returns:
        x.

    Raises:
        ValueError: the sizes do not match.
    """
    batch, channels, height, width = x.shape
    if low.shape != (batch, channels, height / 2, width / 2) or gate.shape != (batch, 1, height, width):
        raise ValueError(f"{tuple(low.shape)} and a gate {tuple(gate.shape)} do not match {tuple(x.shape)}")
    x = x.contiguous(memory_format=torch.channels_last)  # what it is, or the kernel would fill a copy
    rows, gates, lows = (channels_last_rows(m) for m in (x, gate, low))
    share = height if height * width * channels < SMALL else -(-height // torch.get_num_threads())
    run_shared(
        lambda b, first: _gate_and_add_lines(rows[b], gates[b], lows[b], width, first, min(first + share, height)),
        [(b, first) for b in range(batch) for first in range(0, height, share)],
    )
    return x
