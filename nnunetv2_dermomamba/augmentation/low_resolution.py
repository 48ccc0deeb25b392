"""Low resolution: batchgeneratorsv2's ``SimulateLowResolutionTransform`` for many planes at once."""

from __future__ import annotations

import numpy as np
import torch

from .base import Parameters, PlaneTransform, channels_drawn
from .parameters import Sampler


class LowResolution(PlaneTransform):
    """Nearest-neighbour sampling down to a fraction of the size, and bilinear interpolation back.

    Args:
        sample_probability: that a sample is changed at all.
        channel_probability: that a channel of such a sample is.
        scale: the fraction.
        synchronize_channels: one scale for all channels of a sample.
        synchronize_axes: one scale for both axes.
    """

    def __init__(
        self,
        sample_probability: float,
        channel_probability: float,
        scale: Sampler,
        synchronize_channels: bool,
        synchronize_axes: bool,
    ) -> None:
        super().__init__(sample_probability, channel_probability)
        self.scale = scale
        self.synchronize_channels = synchronize_channels
        self.synchronize_axes = synchronize_axes

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        samples, channels = channels_drawn(shape, self.synchronize_channels)
        scale = self.scale(rng, (samples, channels, 1 if self.synchronize_axes else 2))
        return {"low_size": low_sizes(scale, shape)}

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:  # noqa: D102
        low_size = parameters["low_size"]
        return _through_low_size(_through_low_size(planes, low_size[:, 0], 1), low_size[:, 1], 2)


def low_sizes(scale: np.ndarray, shape: torch.Size) -> np.ndarray:
    """Sizes (..., 2) in pixels, int64, of images (..., height, width) reduced by ``scale`` (..., 1 or 2)."""
    return np.rint(scale.astype(np.float64) * np.array(shape[-2:])).astype(np.int64)


def _through_low_size(planes: torch.Tensor, low_size: torch.Tensor, axis: int) -> torch.Tensor:
    """One axis of ``interpolate``'s "nearest-exact" to ``low_size`` (n,) and then "bilinear" back."""
    size = planes.shape[axis]
    low = low_size.to(torch.float32)[:, None]
    position = torch.arange(size, device=planes.device, dtype=torch.float32) + 0.5
    source = (position * (low / size) - 0.5).clamp_(min=0)  # in pixels of the small image
    left = source.floor()
    right = torch.minimum(left + 1, low - 1)
    weight = (source - left).unsqueeze(3 - axis)
    stride = torch.full_like(low, size) / low  # ``size / low`` would multiply by a rounded reciprocal
    values = []
    for index in (left, right):
        original = ((index + 0.5) * stride).long().clamp_(max=size - 1)
        values.append(planes.gather(axis, original.unsqueeze(3 - axis).expand_as(planes)))
    return torch.lerp(values[0], values[1], weight)
