"""Numba kernels of CBAM's two gates on the CPU: a channels-last map is read twice and its product written once.

Fresh memory costs as much as arithmetic here, so the second gate multiplies behind the decoder's 1x1 convolution, in
inference in place.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cpu_instance_norm import RUN, SMALL, channels_last_rows, shares
from .cpu_kernels import _OPTIONS
from .cpu_lanes import LANES, at_least, largest, load, splat, store, total
from .cpu_threads import run_shared
from .unrecorded import apply


@njit(**_OPTIONS)
def _pool(rows, maximum, where, sums):  # type: ignore[no-untyped-def]
    """Maximum (c), its first place and, in runs to float64, sum over n of (n, c)."""
    part, top, best = np.empty_like(maximum), maximum.copy(), maximum.copy()
    for start in range(0, rows.shape[0], RUN):
        end = min(start + RUN, rows.shape[0])
        part[:] = 0
        for p in range(start, end):
            for c in range(rows.shape[1]):
                value = rows[p, c]
                part[c] += value
                top[c] = top[c] if value <= top[c] else value
        for c in range(rows.shape[1]):
            sums[c] += part[c]
            if top[c] > best[c]:
                best[c] = top[c]
                where[c] = start
                while rows[where[c], c] != top[c]:
                    where[c] += 1
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
def _gate_backward(dout, dsummary, rows, gate, summary, drows, dgate):  # type: ignore[no-untyped-def]
    """Gradients of ``_gate``: writes drows and adds to dgate (c), float64; the maximum's goes to the first."""
    channels = rows.shape[1]
    part = np.empty_like(gate)
    for start in range(0, rows.shape[0], RUN):
        part[:] = 0
        for p in range(start, min(start + RUN, rows.shape[0])):
            of_mean = splat(dsummary[p, 1] / rows.dtype.type(channels))
            for c in range(0, channels, LANES):
                gradient = load(dout, p, c) + of_mean
                store(drows, p, c, gradient * load(gate, 0, c))
                store(part, 0, c, load(part, 0, c) + gradient * load(rows, p, c))
            for c in range(channels):
                if rows[p, c] * gate[0, c] == summary[p, 0]:
                    drows[p, c] += dsummary[p, 0] * gate[0, c]
                    part[0, c] += dsummary[p, 0] * rows[p, c]
                    break
        for c in range(channels):
            dgate[c] += part[0, c]


@njit(**_OPTIONS)
def _gate_and_add(rows, gate, low, out, width):  # type: ignore[no-untyped-def]
    """Rows of one line of a map (W, c) times gate (W, 1), plus its line of the map of half the size (W / 2, c)."""
    for p in range(width):
        factor = splat(gate[p, 0])
        for c in range(0, rows.shape[1], LANES):
            store(out, p, c, load(rows, p, c) * factor + load(low, p // 2, c))


@njit(**_OPTIONS)
def _gate_and_add_lines(rows, gate, low, out, width, first, last):  # type: ignore[no-untyped-def]
    """``_gate_and_add`` of lines ``first`` to ``last``; rows and out (H W, c), gate (H W, 1), low (H W / 4, c)."""
    for line in range(first, last):
        here, half = slice(line * width, (line + 1) * width), line // 2 * (width // 2)
        _gate_and_add(rows[here], gate[here], low[half : half + width // 2], out[here], width)


@njit(**_OPTIONS)
def _gate_and_add_backward(dout, rows, gate, drows, dgate, dlow, width, first, last):  # type: ignore[no-untyped-def]
    """Gradients of ``_gate_and_add_lines``; ``first`` and ``last`` are even."""
    for half in range(first // 2 * (width // 2), last // 2 * (width // 2)):
        corner = half // (width // 2) * 2 * width + half % (width // 2) * 2
        for pixel in range(4):
            p = corner + pixel // 2 * width + pixel % 2
            factor, added = splat(gate[p, 0]), splat(rows.dtype.type(0.0))
            for c in range(0, rows.shape[1], LANES):
                gradient = load(dout, p, c)
                store(drows, p, c, gradient * factor)
                added = added + gradient * load(rows, p, c)
                store(dlow, half, c, load(dlow, half, c) + gradient if pixel else gradient)
            dgate[p, 0] = total(added)


class _PoolPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        batch, channels, height, width = x.shape
        rows, parts = channels_last_rows(x), shares(batch, height * width, channels)
        maxima = np.full((len(parts), channels), -np.inf, rows.dtype)
        places, sums = np.zeros((len(parts), channels), np.int64), np.zeros((len(parts), channels))
        run_shared(
            lambda i, b, part: _pool(rows[b, part], maxima[i], places[i], sums[i]),
            [(i, *part) for i, part in enumerate(parts)],
        )
        mean = sums.reshape(batch, -1, channels).sum(1) / (height * width)
        maxima = maxima.reshape(batch, -1, channels)
        if ctx.needs_input_grad[0]:
            places += np.array([[part.start] for _, part in parts])
            ctx.save_for_backward(_of_first_maximum(places.reshape(maxima.shape), maxima))
            ctx.shape = x.shape
        return torch.from_numpy(np.stack([maxima.max(1), mean.astype(rows.dtype)]))

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dpooled: Tensor) -> Tensor:
        (places,) = ctx.saved_tensors
        batch, channels, height, width = ctx.shape
        dmaximum, dmean = (m[:, None] for m in dpooled)
        dx = (dmean / (height * width)).repeat(1, height * width, 1).scatter_add_(1, places, dmaximum)
        return dx.view(batch, height, width, channels).permute(0, 3, 1, 2)


def _of_first_maximum(values: np.ndarray, maxima: np.ndarray) -> Tensor:
    """Along the second axis, which stays."""
    return torch.from_numpy(np.take_along_axis(values, maxima.argmax(1, keepdims=True), 1))


class _GateChannels(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        batch, channels, height, width = x.shape
        out, summary = (
            torch.empty(batch, size, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
            for size in (channels, 2)
        )
        rows, outs, summaries = (channels_last_rows(m) for m in (x, out, summary))
        gates = gate.detach().reshape(batch, 1, channels).contiguous().numpy()
        run_shared(
            lambda b, part: _gate(rows[b, part], gates[b], outs[b, part], summaries[b, part]),
            shares(batch, height * width, channels),
        )
        ctx.save_for_backward(x, gate, summary)
        return out, summary

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dout: Tensor, dsummary: Tensor) -> tuple[Tensor, Tensor]:
        x, gate, summary = ctx.saved_tensors
        batch, channels, height, width = x.shape
        dx = torch.empty_like(x, memory_format=torch.channels_last)
        douts, dsummaries, rows, summaries, dxs = (channels_last_rows(m) for m in (dout, dsummary, x, summary, dx))
        gates, parts = gate.reshape(batch, 1, channels).contiguous().numpy(), shares(batch, height * width, channels)
        sums = np.zeros((len(parts), channels))

        def task(i: int, b: int, part: slice) -> None:
            of_part = (m[b, part] for m in (douts, dsummaries, rows))
            _gate_backward(*of_part, gates[b], summaries[b, part], dxs[b, part], sums[i])

        run_shared(task, [(i, *part) for i, part in enumerate(parts)])
        dgate = torch.from_numpy(sums.reshape(batch, -1, channels).sum(1)).to(gate.dtype)
        return dx, dgate.view(gate.shape)


class _GateAndAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, low: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, gate)
        return _gated_and_added(x, gate, low, torch.empty_like(x, memory_format=torch.channels_last))

    @staticmethod
    @once_differentiable  # type: ignore[misc]
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        dx, dgate = (torch.empty_like(m, memory_format=torch.channels_last) for m in (x, gate))
        dlow = torch.empty_like(x[..., ::2, ::2], memory_format=torch.channels_last)
        maps = [channels_last_rows(m) for m in (dout, x, gate, dx, dgate, dlow)]
        run_shared(
            lambda b, first, last: _gate_and_add_backward(*(m[b] for m in maps), x.shape[3], first, last),
            _pairs_of_lines(x.shape),
        )
        return dx, dgate, dlow


def _pairs_of_lines(shape: torch.Size) -> list[tuple[int, int, int]]:
    """(image, first line, end): whole images where waking a thread takes longer."""
    batch, channels, height, width = shape
    share = height if height * width * channels < SMALL else 2 * -(-height // (2 * torch.get_num_threads()))
    return [(b, first, min(first + share, height)) for b in range(batch) for first in range(0, height, share)]


def _gated_and_added(x: Tensor, gate: Tensor, low: Tensor, out: Tensor) -> Tensor:
    """Fills ``out``, channels last, and returns it."""
    rows, gates, lows, outs = (channels_last_rows(m) for m in (x, gate, low, out))
    run_shared(
        lambda b, first, last: _gate_and_add_lines(rows[b], gates[b], lows[b], outs[b], x.shape[3], first, last),
        _pairs_of_lines(x.shape),
    )
    return out


def _check_channels(x: Tensor, *others: Tensor) -> None:
    """Kernels look at no bounds."""
    if x.shape[1] % LANES:
        raise ValueError(f"channels must be a multiple of {LANES}, not {x.shape[1]}")
    if any(m.dtype != x.dtype for m in others):
        raise ValueError(f"{[m.dtype for m in others]} do not match {x.dtype}")


def pool_positions(x: Tensor) -> Tensor:
    """Maximum and mean over the positions of (B, C, H, W), (2, B, C); a NaN is in the mean.

    Of equal maxima the first has the gradient.
    """
    return apply(_PoolPositions, x)  # type: ignore[no-any-return]


def gate_channels(x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """``x * gate`` and its maximum and mean over the channels; a NaN is in the mean.

    Of equal maxima the first has the gradient.

    Args:
        x: (B, C, H, W), float32 or float64, C in whole vectors.
        gate: (B, C, 1, 1).

    Returns:
        (B, C, H, W) and (B, 2, H, W), channels last in memory.

    Raises:
        ValueError: sizes or types do not match, or C does not.
    """
    _check_channels(x, gate)
    if gate.shape != (*x.shape[:2], 1, 1):
        raise ValueError(f"a gate {tuple(gate.shape)} does not match {tuple(x.shape)}")
    return apply(_GateChannels, x, gate)  # type: ignore[no-any-return]


def gate_and_add(x: Tensor, gate: Tensor, low: Tensor) -> Tensor:
    """``x * gate`` plus ``low`` upsampled to twice its size (nearest); where no gradients are recorded in place.

    Args:
        x: (B, C, 2 H, 2 W), float32 or float64, channels last in memory, C in whole vectors.
        gate: (B, 1, 2 H, 2 W).
        low: (B, C, H, W).

    Returns:
        As x, channels last in memory.

    Raises:
        ValueError: sizes or types do not match, or C does not.
    """
    _check_channels(x, gate, low)
    batch, channels, height, width = x.shape
    if low.shape != (batch, channels, height / 2, width / 2) or gate.shape != (batch, 1, height, width):
        raise ValueError(f"{tuple(low.shape)} and a gate {tuple(gate.shape)} do not match {tuple(x.shape)}")
    if torch.is_grad_enabled():
        return _GateAndAdd.apply(x, gate, low)  # type: ignore[no-any-return]
    x = x.contiguous(memory_format=torch.channels_last)  # what it is, or the kernel would fill a copy
    return _gated_and_added(x, gate, low, x)
