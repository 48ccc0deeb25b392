"""Rotation, scaling, cropping and mirroring: batchgeneratorsv2's ``transforms.spatial`` for batches."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch.nn.functional import grid_sample

from .base import BatchTransform, Segmentation
from .parameters import Sampler

SCORE = 1000
"""SpatialTransform's score of a label that is alone; scores are float16, which makes near ties exact ones."""


class RotateScaleCrop(BatchTransform):
    """``SpatialTransform`` without elastic deformation and with the patch at the centre.

    Args:
        patch_size: (height, width) of the result.
        rotation_probability: that a sample is rotated.
        rotation: angle in radians.
        scaling_probability: that a sample is scaled.
        scaling: factor; over 1 makes things smaller.
        synchronize_scaling: probability that both axes are scaled alike.
        labels: all values that segmentations can have.
        padding_label: what lies outside the segmentation; 0 lies outside the image.
    """

    def __init__(
        self,
        patch_size: tuple[int, int],
        rotation_probability: float,
        rotation: Sampler,
        scaling_probability: float,
        scaling: Sampler,
        synchronize_scaling: float,
        labels: Collection[int],
        padding_label: int,
    ) -> None:
        self.patch_size = patch_size
        self.rotation_probability = rotation_probability
        self.rotation = rotation
        self.scaling_probability = scaling_probability
        self.scaling = scaling
        self.synchronize_scaling = synchronize_scaling
        self.labels = sorted({*labels, padding_label})
        self.padding_label = padding_label

    def draw(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        count = shape[0]
        rotated = rng.random(count) < self.rotation_probability
        scaled = rng.random(count) < self.scaling_probability
        angle = np.where(rotated, self.rotation(rng, (count,)), 0).astype(np.float64)
        scale = self.scaling(rng, (count, 2))
        same = rng.random((count, 1)) <= self.synchronize_scaling
        scale = np.where(scaled[:, None], np.where(same, scale[:, :1], scale), 1)
        affine = affine_matrices(angle, scale)
        changed = rotated | scaled
        return {"samples": np.flatnonzero(changed), "affine": affine[changed].astype(np.float32)}

    def output_shape(self, shape: torch.Size) -> torch.Size:  # noqa: D102
        return torch.Size((*shape[:2], *self.patch_size))

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        assert isinstance(segmentation, torch.Tensor)
        samples = parameters["samples"]
        cropped_image = centre_crop(image, self.patch_size)
        cropped_segmentation = centre_crop(segmentation, self.patch_size)
        if samples.numel():
            grid = sampling_grid(parameters["affine"], self.patch_size, image.shape[2:])
            changed = grid_sample(image.index_select(0, samples), grid, align_corners=False)
            cropped_image.index_copy_(0, samples, changed)
            changed = sample_labels(segmentation.index_select(0, samples), grid, self.labels, self.padding_label)
            cropped_segmentation.index_copy_(0, samples, changed)
        return cropped_image, cropped_segmentation


def affine_matrices(angle: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Rotation by ``angle`` (n,) after scaling by ``scale`` (n, 2), as matrices (n, 2, 2) of (row, column) vectors."""
    sine, cosine = np.sin(angle), np.cos(angle)
    rotation = np.stack([np.stack([cosine, -sine], -1), np.stack([sine, cosine], -1)], -2)
    return rotation * scale[:, None, :]


def centre_crop(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A copy of the middle of (..., height, width)."""
    top, left = (whole // 2 - part // 2 for whole, part in zip(values.shape[-2:], size, strict=True))
    return values[..., top : top + size[0], left : left + size[1]].contiguous()


def sampling_grid(affine: torch.Tensor, size: tuple[int, int], source: Sequence[int]) -> torch.Tensor:
    """``grid_sample``'s grid (n, height, width, 2) for affine maps about the centre of images of size ``source``.

    Written out rather than as a matrix product, which TF32, where enabled, would round to tenths of a pixel.
    """
    row, column = (torch.arange(s, device=affine.device, dtype=torch.float32) - (s - 1) / 2 for s in size)
    row, column = row[:, None], column[None, :]
    y, x = (affine[:, n, 0, None, None] * row + affine[:, n, 1, None, None] * column for n in range(2))
    return torch.stack([x / (source[1] / 2), y / (source[0] / 2)], -1)


def sample_labels(
    segmentation: torch.Tensor, grid: torch.Tensor, labels: Sequence[int], padding_label: int
) -> torch.Tensor:
    """The label with the highest bilinear weight at every point of the grid; the nearest one of several such labels.

    Args:
        segmentation: (n, channels, height, width), integer.
        grid: (n, height, width, 2), as for ``grid_sample``.
        labels: all values in the segmentation and the padding label, in increasing order.
        padding_label: what lies outside.
    """
    shifted = segmentation.to(torch.float32) - padding_label
    nearest = grid_sample(shifted, grid, mode="nearest", align_corners=False) + padding_label
    best = torch.full_like(nearest, -1)
    result = torch.zeros_like(nearest)
    nearest_score = torch.full_like(nearest, -1)
    for label in labels:
        outside = float(label == padding_label)
        indicator = (segmentation == label).to(torch.float32).sub_(outside).mul_(SCORE)
        score = grid_sample(indicator, grid, align_corners=False).add_(outside * SCORE).half().float()
        result.masked_fill_(score > best, label)
        torch.maximum(best, score, out=best)
        nearest_score = torch.where(nearest == label, score, nearest_score)
    return torch.where(nearest_score == best, nearest, result).to(segmentation.dtype)


class Mirror(BatchTransform):
    """Flips each allowed axis (0: rows, 1: columns) of each sample with probability 1/2 (``MirrorTransform``)."""

    def __init__(self, axes: Sequence[int]) -> None:
        self.axes = tuple(axes)

    def draw(self, rng: np.random.Generator, shape: torch.Size) -> dict[str, np.ndarray]:  # noqa: D102
        return {f"axis{axis}": np.flatnonzero(rng.random(shape[0]) < 0.5) for axis in self.axes}

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        assert isinstance(segmentation, torch.Tensor)
        for axis in self.axes:
            samples = parameters[f"axis{axis}"]
            if samples.numel():
                for values in (image, segmentation):
                    values.index_copy_(0, samples, values.index_select(0, samples).flip(axis + 2))
        return image, segmentation
