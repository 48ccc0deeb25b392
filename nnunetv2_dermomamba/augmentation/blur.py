"""Gaussian blur: batchgeneratorsv2's ``GaussianBlurTransform`` for many planes at once."""

from __future__ import annotations

import numpy as np
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import _compute_kernel_size
from torch.nn.functional import pad

from .base import Parameters, PlaneTransform, channels_drawn, per_plane
from .parameters import Sampler

TRUNCATE = 6  # width of the kernel in standard deviations, GaussianBlurTransform's


def gaussian_kernels(sigma: np.ndarray) -> np.ndarray:
    """Normalised kernels of standard deviations ``sigma``, in pixels; (..., width of the widest), zero outside each."""
    sizes = np.vectorize(lambda s: _compute_kernel_size(s, TRUNCATE), otypes=[int])(sigma)[..., None]
    half = int(sizes.max(initial=1)) // 2
    offsets = np.arange(-half, half + 1)
    weights = np.exp(-0.5 * (offsets / sigma[..., None]) ** 2) * (np.abs(offsets) <= sizes // 2)
    return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)


class GaussianBlur(PlaneTransform):
    """Separable Gaussian blur with reflected borders.

    Args:
        sample_probability: that a sample is changed at all.
        channel_probability: that a channel of such a sample is.
        sigma: standard deviation in pixels.
        synchronize_channels: one sigma for all channels of a sample.
        synchronize_axes: one sigma for both axes.
    """

    def __init__(
        self,
        sample_probability: float,
        channel_probability: float,
        sigma: Sampler,
        synchronize_channels: bool,
        synchronize_axes: bool,
    ) -> None:
        super().__init__(sample_probability, channel_probability)
        self.sigma = sigma
        self.synchronize_channels = synchronize_channels
        self.synchronize_axes = synchronize_axes

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        samples, channels = channels_drawn(shape, self.synchronize_channels)
        sigma = self.sigma(rng, (samples, channels, 1 if self.synchronize_axes else 2))
        return {"sigma": np.broadcast_to(sigma, (samples, channels, 2))}

    def draw(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        parameters = super().draw(rng, shape)
        return {"planes": parameters["planes"], "kernels": gaussian_kernels(parameters["sigma"])}

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Blur planes (n, height, width) by ``kernels`` (n, 2 axes, odd width).

        Sums of shifted planes rather than a convolution: cuDNN would time its algorithms anew for every number of
        planes (nnU-Net sets ``cudnn.benchmark``), and would round to TF32.
        """
        kernels = parameters["kernels"]
        half = kernels.shape[-1] // 2
        height, width = planes.shape[1:]
        padded = pad(planes, (0, 0, half, half), mode="reflect")
        rows = [padded[:, n : n + height] for n in range(2 * half + 1)]
        padded = pad(_weighted_sum(rows, kernels[:, 0]), (half, half), mode="reflect")
        columns = [padded[:, :, n : n + width] for n in range(2 * half + 1)]
        return _weighted_sum(columns, kernels[:, 1])


def _weighted_sum(terms: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    total = terms[0] * per_plane(weights[:, 0])
    for n, term in enumerate(terms[1:], 1):
        total.addcmul_(term, per_plane(weights[:, n]))
    return total
