"""What every transform of a batch is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TypeAlias

import numpy as np
import torch

Parameters: TypeAlias = dict[str, torch.Tensor]
Segmentation: TypeAlias = torch.Tensor | list[torch.Tensor]


class BatchTransform(ABC):
    """A transform of a batch, in two steps so that the device never waits for the host nor the host for the device.

    ``draw`` decides on the host, in NumPy, which samples change and how; ``apply`` changes them on the device. As the
    host knows how many samples are concerned, only those are computed.
    """

    def draw(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:
        """Random parameters (float32 or int64) for a batch of images of shape (samples, channels, height, width)."""
        return {}

    def output_shape(self, shape: torch.Size) -> torch.Size:
        """Shape of the images that ``apply`` makes of images of a shape."""
        return shape

    @abstractmethod
    def apply(
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        """Change a batch, in place where possible, by parameters on its device.

        Args:
            image: (samples, channels, height, width), float32, contiguous.
            segmentation: (samples, channels, height, width), integer; a list of them after deep supervision.
            **parameters: what ``draw`` returned, on the device of the image.
        """


class PlaneTransform(BatchTransform):
    """Changes some channels of some samples, each channel (a plane) by its own parameters.

    Args:
        sample_probability: that a sample is changed at all.
        channel_probability: that a channel of such a sample is.
    """

    def __init__(self, sample_probability: float, channel_probability: float) -> None:
        self.sample_probability = sample_probability
        self.channel_probability = channel_probability

    def draw(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        samples, channels = shape[:2]
        changed = rng.random((samples, 1)) < self.sample_probability
        changed = changed & (rng.random((samples, channels)) < self.channel_probability)
        planes = np.flatnonzero(changed)
        values = self.draw_planes(rng, shape)
        return {"planes": planes} | {
            name: np.broadcast_to(v, (samples, channels, *v.shape[2:]))[changed] for name, v in values.items()
        }

    @abstractmethod
    def draw_planes(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:
        """Parameters of all planes, each array of shape (samples, channels, ...) or (samples, 1, ...)."""

    @abstractmethod
    def change(self, planes: torch.Tensor, parameters: Parameters) -> torch.Tensor:
        """Change planes (n, height, width), a copy of the image's, by parameters (n, ...)."""

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        index = parameters.pop("planes")
        if index.numel():
            planes = image.view(-1, *image.shape[2:])
            planes.index_copy_(0, index, self.change(planes.index_select(0, index), parameters))
        return image, segmentation


def channels_drawn(shape: torch.Size, synchronize: bool) -> tuple[int, int]:
    """Shape (samples, channels) of independent draws: one channel's where channels share it."""
    return shape[0], 1 if synchronize else shape[1]


def per_plane(values: torch.Tensor) -> torch.Tensor:
    """(n,) as (n, 1, 1), to combine with planes."""
    return values[:, None, None]
