"""Colour jitter for dermoscopy: lamps, filters and white balances differ from clinic to clinic."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.intensity.brightness import (
    BrightnessAdditiveTransform,
    MultiplicativeBrightnessTransform,
)
from batchgeneratorsv2.transforms.utils.random import RandomTransform

PROBABILITY = 0.5
GAIN = (0.8, 1.2)
SHIFT = 0.2  # in standard deviations of an image's channel, nnU-Net's unit after z-score normalisation


class ColourJitterMixin:
    """Multiplies and shifts each colour channel by its own amount, before nnU-Net's augmentations; list it first.

    On z-scored images these change contrast and colour balance. nnU-Net's own pipeline has the gain, for 15 % of the
    images, but no shift. Images scaled to 0..1 vary less, so the same shift is several times as strong there.
    """

    @classmethod
    def get_training_transforms(cls, *arguments: Any, **options: Any) -> BasicTransform:
        """The trainer's, with the jitter in front."""
        pipeline = super().get_training_transforms(*arguments, **options)
        gain = MultiplicativeBrightnessTransform(GAIN, synchronize_channels=False)
        shift = BrightnessAdditiveTransform(0.0, SHIFT, synchronize_channels=False)
        pipeline.transforms[:0] = [RandomTransform(gain, PROBABILITY), RandomTransform(shift, PROBABILITY)]
        return pipeline
