"""Noise, brightness, contrast and gamma: batchgeneratorsv2's ``transforms.intensity`` for many planes at once."""

from __future__ import annotations

import numpy as np
import torch

from .base import Parameters, PlaneTransform, channels_drawn, per_plane
from .parameters import Sampler

EPSILON = 1e-7  # GammaTransform's, against division by zero in constant planes


def plane_statistics(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean, minimum and maximum of each plane, (n, 1, 1)."""
    minimum, maximum = planes.flatten(1).aminmax(dim=1)
    return planes.mean((1, 2), keepdim=True), per_plane(minimum), per_plane(maximum)


class GaussianNoise(PlaneTransform):
    """Adds normal noise (``GaussianNoiseTransform``).

    Args:
        sample_probability: that a sample is changed at all.
        channel_probability: that a channel of such a sample is.
        sigma: its standard deviation (nnU-Net calls it a variance and uses it so).
        synchronize: one sigma for all channels of a sample.
        generator: of the noise, on the training device.
    """

    def __init__(
        self,
        sample_probability: float,
        channel_probability: float,
        sigma: Sampler,
        synchronize: bool,
        generator: torch.Generator,
    ) -> None:
        super().__init__(sample_probability, channel_probability)
        self.sigma = sigma
        self.synchronize = synchronize
        self.generator = generator

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        return {"sigma": self.sigma(rng, channels_drawn(shape, self.synchronize))}

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:  # noqa: D102
        noise = torch.empty_like(planes).normal_(generator=self.generator)
        return planes.addcmul_(noise, per_plane(parameters["sigma"]))


class Brightness(PlaneTransform):
    """Multiplies (``MultiplicativeBrightnessTransform``)."""

    def __init__(
        self, sample_probability: float, channel_probability: float, factor: Sampler, synchronize: bool
    ) -> None:
        super().__init__(sample_probability, channel_probability)
        self.factor = factor
        self.synchronize = synchronize

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        return {"factor": self.factor(rng, channels_drawn(shape, self.synchronize))}

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:  # noqa: D102
        return planes.mul_(per_plane(parameters["factor"]))


class Shift(PlaneTransform):
    """Adds a normally distributed constant to each plane (``BrightnessAdditiveTransform``).

    Args:
        sample_probability: that a sample is changed at all.
        channel_probability: that a channel of such a sample is.
        mean: of the constant.
        sigma: its standard deviation.
    """

    def __init__(self, sample_probability: float, channel_probability: float, mean: float, sigma: float) -> None:
        super().__init__(sample_probability, channel_probability)
        self.mean = mean
        self.sigma = sigma

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        return {"shift": rng.normal(self.mean, self.sigma, shape[:2]).astype(np.float32)}

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:  # noqa: D102
        return planes.add_(per_plane(parameters["shift"]))


class Contrast(PlaneTransform):
    """Scales the distance to the mean, within the old range where that is to be kept (``ContrastTransform``)."""

    def __init__(
        self,
        sample_probability: float,
        channel_probability: float,
        factor: Sampler,
        synchronize: bool,
        preserve_range: bool,
    ) -> None:
        super().__init__(sample_probability, channel_probability)
        self.factor = factor
        self.synchronize = synchronize
        self.preserve_range = preserve_range

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        return {"factor": self.factor(rng, channels_drawn(shape, self.synchronize))}

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:  # noqa: D102
        mean, minimum, maximum = plane_statistics(planes)
        planes.sub_(mean).mul_(per_plane(parameters["factor"])).add_(mean)
        return planes.clamp_(minimum, maximum) if self.preserve_range else planes


class Gamma(PlaneTransform):
    """Raises intensities, mapped to [0, 1], to a power (``GammaTransform``).

    Args:
        sample_probability: that a sample is changed at all.
        channel_probability: that a channel of such a sample is.
        gamma: the exponent.
        synchronize: one exponent for all channels of a sample.
        invert_probability: that a plane is negated before and after.
        retain_probability: that its mean and standard deviation are restored.
    """

    def __init__(
        self,
        sample_probability: float,
        channel_probability: float,
        gamma: Sampler,
        synchronize: bool,
        invert_probability: float,
        retain_probability: float,
    ) -> None:
        super().__init__(sample_probability, channel_probability)
        self.gamma = gamma
        self.synchronize = synchronize
        self.invert_probability = invert_probability
        self.retain_probability = retain_probability

    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        inverted = rng.random(shape[:2]) < self.invert_probability
        return {
            "gamma": self.gamma(rng, channels_drawn(shape, self.synchronize)),
            "sign": np.where(inverted, np.float32(-1), np.float32(1)),
            "retain": (rng.random(shape[:2]) < self.retain_probability).astype(np.float32),
        }

    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:  # noqa: D102
        gamma, sign, retain = (per_plane(parameters[name]) for name in ("gamma", "sign", "retain"))
        planes.mul_(sign)
        mean, minimum, maximum = plane_statistics(planes)
        deviation = planes.std((1, 2), keepdim=True)
        extent = maximum - minimum
        planes.sub_(minimum).div_(extent.clamp(min=EPSILON)).pow_(gamma).mul_(extent).add_(minimum)

        new_mean = planes.mean((1, 2), keepdim=True)
        ratio = deviation / planes.std((1, 2), keepdim=True).clamp(min=EPSILON)
        kept = retain > 0
        scale = torch.where(kept, ratio, 1)
        planes.sub_(torch.where(kept, new_mean, 0)).mul_(scale).add_(torch.where(kept, mean, 0))
        return planes.mul_(sign)
