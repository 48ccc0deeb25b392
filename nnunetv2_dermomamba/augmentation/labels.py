"""What nnU-Net does to segmentations behind the augmentation, for batches; nothing here is random."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform

from .base import BatchTransform, Segmentation


class MaskOutside(BatchTransform):
    """Sets image channels to a value where the segmentation is negative (``MaskImageTransform``)."""

    def __init__(self, channels: Sequence[int], segmentation_channel: int, value: float) -> None:
        self.channels = tuple(channels)
        self.segmentation_channel = segmentation_channel
        self.value = value

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        assert isinstance(segmentation, torch.Tensor)
        outside = segmentation[:, self.segmentation_channel] < 0
        for channel in self.channels:
            image[:, channel].masked_fill_(outside, self.value)
        return image, segmentation


class ReplaceLabel(BatchTransform):
    """Replaces one label by another, in all channels or some (``RemoveLabelTransform``)."""

    def __init__(self, old: int, new: int, channels: Sequence[int] | None) -> None:
        self.old = old
        self.new = new
        self.channels = channels

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        assert isinstance(segmentation, torch.Tensor)
        for channel in range(segmentation.shape[1]) if self.channels is None else self.channels:
            values = segmentation[:, channel]
            values.masked_fill_(values == self.old, self.new)
        return image, segmentation


class Regions(BatchTransform):
    """Labels as one boolean channel a region, a region being a set of labels (``ConvertSegmentationToRegions...``)."""

    def __init__(self, regions: Sequence[Sequence[int]], channel: int) -> None:
        self.regions = [tuple(region) for region in regions]
        self.channel = channel

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        assert isinstance(segmentation, torch.Tensor)
        labels = segmentation[:, self.channel]
        result = labels.new_zeros((len(labels), len(self.regions), *labels.shape[1:]), dtype=torch.bool)
        for n, region in enumerate(self.regions):
            for label in region:
                result[:, n] |= labels == label
        return image, result


class DeepSupervisionTargets(BatchTransform):
    """The segmentation at the resolution of every output; nnU-Net's own transform, to which samples are channels."""

    def __init__(self, transform: DownsampleSegForDSTransform) -> None:
        self.transform = transform

    def apply(  # noqa: D102
        self, image: torch.Tensor, segmentation: Segmentation, **parameters: torch.Tensor
    ) -> tuple[torch.Tensor, Segmentation]:
        assert isinstance(segmentation, torch.Tensor)
        scales = self.transform._apply_to_segmentation(segmentation.flatten(0, 1))
        return image, [scale.unflatten(0, segmentation.shape[:2]) for scale in scales]
