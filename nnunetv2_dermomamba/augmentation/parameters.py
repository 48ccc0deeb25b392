"""Random parameters: drawn on the host, sent to the device in one transfer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast

Sampler = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
ALIGNMENT = 8  # bytes; of int64, the widest type sent


class UntranslatableTransformError(ValueError):
    """A transform, or a setting of one, that has no counterpart for batches."""


def scalar_sampler(source: object) -> Sampler:
    """What batchgeneratorsv2's ``sample_scalar`` draws one by one, as a function that draws arrays.

    Args:
        source: a number, a (low, high) pair for the uniform distribution, or a ``BGContrast`` of such a pair (below or
            above 1 with equal probability, uniform there).

    Raises:
        UntranslatableTransformError: it is something else, such as a function.
    """
    if isinstance(source, int | float):
        return lambda rng, shape: np.full(shape, source, np.float32)
    if isinstance(source, BGContrast) and not callable(source.contrast_range):
        return _around_one(*source.contrast_range)
    if isinstance(source, tuple | list) and len(source) == 2:
        low, high = source
        return lambda rng, shape: rng.uniform(low, high, shape).astype(np.float32)
    raise UntranslatableTransformError(f"cannot draw many values at once from {source!r}")


def _around_one(low: float, high: float) -> Sampler:
    def sample(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        above = rng.uniform(max(low, 1), high, shape)
        if low >= 1:
            return above.astype(np.float32)
        return np.where(rng.random(shape) < 0.5, rng.uniform(low, 1, shape), above).astype(np.float32)

    return sample


def to_device(groups: Sequence[dict[str, np.ndarray]], device: torch.device) -> list[dict[str, torch.Tensor]]:
    """Copy all arrays to the device at once, from pinned memory, without waiting for it."""
    arrays = [np.ascontiguousarray(array) for group in groups for array in group.values()]
    if device.type != "cuda":
        tensors = iter([torch.from_numpy(array).to(device) for array in arrays])
        return [{name: next(tensors) for name in group} for group in groups]
    starts = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)])
    packed = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=True)
    view = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        view[start : start + array.nbytes] = array.reshape(-1).view(np.uint8)
    packed = packed.to(device, non_blocking=True)
    pairs = zip(starts, arrays, strict=False)
    tensors = iter(
        [
            packed[start : start + array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
            for start, array in pairs
        ]
    )
    return [{name: next(tensors) for name in group} for group in groups]
