"""nnU-Net's transforms as transforms of batches."""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.intensity.contrast import ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from batchgeneratorsv2.transforms.utils.nnunet_masking import MaskImageTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from batchgeneratorsv2.transforms.utils.remove_label import RemoveLabelTansform
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from .base import BatchTransform, Segmentation
from .blur import GaussianBlur
from .intensity import Brightness, Contrast, Gamma, GaussianNoise, Shift
from .labels import DeepSupervisionTargets, MaskOutside, Regions, ReplaceLabel
from .low_resolution import LowResolution
from .parameters import UntranslatableTransformError, scalar_sampler, to_device
from .spatial import Mirror, RotateScaleCrop


class BatchAugmenter:
    """Applies nnU-Net's 2D transforms to batches on their device.

    Args:
        transforms: nnU-Net's own pipeline, from which probabilities and ranges are read.
        labels: all values that a raw segmentation can have.
        device: of the batches.
        rng: source of all parameters.

    Raises:
        UntranslatableTransformError: The pipeline holds a transform or a setting without counterpart here.
    """

    def __init__(
        self, transforms: BasicTransform, labels: Collection[int], device: torch.device, rng: np.random.Generator
    ) -> None:
        self.device = device
        self.rng = rng
        self.labels = tuple(labels)
        self.generator = torch.Generator(device).manual_seed(int(rng.integers(2**63)))
        self.transforms = self._translate(transforms, None)

    @torch.no_grad()
    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor) -> tuple[torch.Tensor, Segmentation]:
        """Augment a batch; its tensors may be overwritten.

        Args:
            image: (samples, channels, height, width), float32, of the loader's patch size.
            segmentation: (samples, channels, height, width), integer.

        Returns:
            Image and segmentation of the network's patch size; the latter boolean after conversion to regions, and a
            list with deep supervision.
        """
        drawn, shape = [], image.shape
        for transform in self.transforms:
            drawn.append(transform.draw(self.rng, shape))
            shape = transform.output_shape(shape)
        result: Segmentation = segmentation
        for transform, parameters in zip(self.transforms, to_device(drawn, self.device), strict=True):
            image, result = transform.apply(image, result, **parameters)
        return image, result

    def _translate(self, transform: BasicTransform, probability: float | None) -> list[BatchTransform]:
        """Counterparts of one of nnU-Net's transforms; ``probability`` that it is applied, None for always."""
        kind = type(transform)
        if kind is ComposeTransforms and probability is None:
            return [part for inner in transform.transforms for part in self._translate(inner, None)]
        if kind is RandomTransform and probability is None:
            return self._translate(transform.transform, transform.apply_probability)
        if kind in PLANE_TRANSFORMS:
            return [PLANE_TRANSFORMS[kind](transform, 1.0 if probability is None else probability, self)]
        if kind in OTHER_TRANSFORMS and probability is None:
            return [OTHER_TRANSFORMS[kind](transform, self)]
        occasionally = "" if probability is None else " applied at random"
        raise UntranslatableTransformError(f"no counterpart for batches of {kind.__name__}{occasionally}")


def _require(transform: BasicTransform, **settings: object) -> None:
    for name, value in settings.items():
        found = getattr(transform, name, value)  # older releases lack some settings; theirs were today's defaults
        if found != value:
            kind = type(transform).__name__
            raise UntranslatableTransformError(f"no counterpart for batches of {kind} with {name}={found!r}")


def _noise(t: GaussianNoiseTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    sigma = scalar_sampler(t.noise_variance)
    return GaussianNoise(probability, t.p_per_channel, sigma, t.synchronize_channels, to.generator)


def _blur(t: GaussianBlurTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    sigma = scalar_sampler(t.blur_sigma)
    return GaussianBlur(probability, t.p_per_channel, sigma, t.synchronize_channels, t.synchronize_axes)


def _brightness(t: MultiplicativeBrightnessTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    return Brightness(probability, t.p_per_channel, scalar_sampler(t.multiplier_range), t.synchronize_channels)


def _shift(t: BrightnessAdditiveTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    _require(t, synchronize_channels=False)
    return Shift(probability, t.p_per_channel, t.mu, t.sigma)


def _contrast(t: ContrastTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    factor = scalar_sampler(t.contrast_range)
    return Contrast(probability, t.p_per_channel, factor, t.synchronize_channels, t.preserve_range)


def _low_resolution(t: SimulateLowResolutionTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    _require(t, ignore_axes=None, allowed_channels=None)
    scale = scalar_sampler(t.scale)
    return LowResolution(probability, t.p_per_channel, scale, t.synchronize_channels, t.synchronize_axes)


def _gamma(t: GammaTransform, probability: float, to: BatchAugmenter) -> BatchTransform:
    gamma = scalar_sampler(t.gamma)
    return Gamma(probability, t.p_per_channel, gamma, t.synchronize_channels, t.p_invert_image, t.p_retain_stats)


def _spatial(t: SpatialTransform, to: BatchAugmenter) -> BatchTransform:
    _require(t, random_crop=False, p_elastic_deform=0, p_rot_per_axis=1, mode_seg="bilinear", seg_tiebreak="nearest")
    _require(t, mode_image="bilinear", padding_mode_image="zeros", align_corners=False)
    if len(t.patch_size) != 2:
        raise UntranslatableTransformError(f"no counterpart for batches of patches of size {tuple(t.patch_size)}")
    if t.border_mode_seg not in ("zeros", "constant"):
        _require(t, border_mode_seg="constant")
    return RotateScaleCrop(
        tuple(t.patch_size),
        t.p_rotation,
        scalar_sampler(t.rotation),
        t.p_scaling,
        scalar_sampler(t.scaling),
        t.p_synchronize_scaling_across_axes,
        to.labels,
        int(t.padding_value_seg) if t.border_mode_seg == "constant" else 0,
    )


def _regions(t: ConvertSegmentationToRegionsTransform, to: BatchAugmenter) -> BatchTransform:
    return Regions([[int(label) for label in region] for region in t.regions], t.channel_in_seg)


PLANE_TRANSFORMS: dict[type, Callable[..., BatchTransform]] = {
    GaussianNoiseTransform: _noise,
    GaussianBlurTransform: _blur,
    MultiplicativeBrightnessTransform: _brightness,
    BrightnessAdditiveTransform: _shift,
    ContrastTransform: _contrast,
    SimulateLowResolutionTransform: _low_resolution,
    GammaTransform: _gamma,
}
OTHER_TRANSFORMS: dict[type, Callable[..., BatchTransform]] = {
    SpatialTransform: _spatial,
    MirrorTransform: lambda t, to: Mirror(t.allowed_axes),
    MaskImageTransform: lambda t, to: MaskOutside(t.apply_to_channels, t.channel_idx_in_seg, t.set_outside_to),
    RemoveLabelTansform: lambda t, to: ReplaceLabel(t.label_value, t.set_to, t.segmentation_channels),
    ConvertSegmentationToRegionsTransform: _regions,
    DownsampleSegForDSTransform: lambda t, to: DeepSupervisionTargets(t),
}
