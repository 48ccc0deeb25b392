"""nnU-Net's augmentations without its simulated low resolution: photographs at 192 x 256 have lost most of theirs."""

from __future__ import annotations

from typing import Any

from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform


class WithoutLowResolutionMixin:
    """Leaves the simulated low resolution out; list it first."""

    @classmethod
    def get_training_transforms(cls, *arguments: Any, **options: Any) -> BasicTransform:
        """The trainer's without that transform."""
        pipeline = super().get_training_transforms(*arguments, **options)
        pipeline.transforms = [
            transform
            for transform in pipeline.transforms
            if not isinstance(getattr(transform, "transform", transform), SimulateLowResolutionTransform)
        ]
        return pipeline
