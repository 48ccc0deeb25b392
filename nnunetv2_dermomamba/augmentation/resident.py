"""Patches from a data set that lies on the training device as a whole."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset

from nnunetv2_dermomamba.finite_images import check_images

from .parameters import to_device

CASES_MEASURED = 32  # spread evenly; enough to tell whether a data set fits
READING_THREADS = 8  # blosc2 decompresses outside Python's global lock


class Case(NamedTuple):
    """One preprocessed case: image and segmentation, flat, on the device; where each class is, on the host."""

    shape: tuple[int, ...]
    image: torch.Tensor
    segmentation: torch.Tensor
    class_locations: dict


def estimated_bytes(dataset: nnUNetBaseDataset) -> int:
    """Size of a data set's images and segmentations on the device, from some of its cases."""
    keys = dataset.identifiers[:: max(1, len(dataset.identifiers) // CASES_MEASURED)]
    sizes = [_stored_bytes(dataset, key) for key in keys]
    return round(sum(sizes) / len(sizes) * len(dataset.identifiers))


def _stored_bytes(dataset: nnUNetBaseDataset, key: str) -> int:
    data, segmentation, _, _ = dataset.load_case(key)
    return 4 * math.prod(data.shape) + np.dtype(segmentation.dtype).itemsize * math.prod(segmentation.shape)


class ResidentDataLoader:
    """Draws the patches that an ``nnUNetDataLoader`` would, without its transforms, from copies on the device.

    Cases and bounding boxes come from the loader's own methods. All cases are read once, here.

    Args:
        loader: nnU-Net's loader of 2D patches.
        device: where the data set is kept.
        compiles: whether to compile the cropping, forty short kernels else, which take longer to launch than to run.

    Raises:
        NotFiniteError: an image holds NaN or infinite values.
    """

    def __init__(self, loader: nnUNetDataLoader, device: torch.device, compiles: bool = False) -> None:
        self.loader = loader
        self.device = device
        keys = list(loader.indices)
        self.rows = {key: row for row, key in enumerate(keys)}
        with ThreadPoolExecutor(READING_THREADS) as pool:
            cases = list(pool.map(self._read, keys))
        self.image_channels = cases[0].shape[0]
        self.images = torch.cat([case.image for case in cases])
        self.segmentations = torch.cat([case.segmentation for case in cases])
        self.class_locations = [case.class_locations for case in cases]
        self.shapes = np.array([case.shape[1:] for case in cases])  # (cases, 3): slices, height, width
        self.starts = np.cumsum([0, *self.shapes.prod(1)])[:-1]  # in pixels
        self._crop = torch.compile(self._gather, dynamic=False) if compiles else self._gather

    def _read(self, key: str) -> Case:
        data, segmentation, _, properties = self.loader._data.load_case(key)
        image = torch.from_numpy(np.ascontiguousarray(data[:], dtype=np.float32))
        check_images({"data": image[None], "keys": [key]})
        labels = torch.from_numpy(np.ascontiguousarray(segmentation[:]))
        # int32 halves nnU-Net's tables of up to thousands of pixels a case
        locations = {name: np.asarray(pixels, np.int32) for name, pixels in properties["class_locations"].items()}
        return Case(tuple(data.shape), image.flatten().to(self.device), labels.flatten().to(self.device), locations)

    @torch.no_grad()
    def __next__(self) -> dict:
        """The next random batch: ``data`` (float32) and ``target`` (int16), (samples, channels, height, width)."""
        keys = self.loader.get_indices()
        rows = np.array([self.rows[key] for key in keys])
        corners = np.array([self._corner(sample, row) for sample, row in enumerate(rows)])
        shapes = self.shapes[rows]
        drawn = {
            "start": self.starts[rows] + corners[:, 0] * shapes[:, 1] * shapes[:, 2],
            "channel_start": self.starts[rows] * (self.image_channels - 1),
            "pixels": shapes.prod(1),
            "corner": corners[:, 1:],
            "size": shapes[:, 1:],
        }
        data, target = self._crop(**to_device([drawn], self.device)[0])
        return {"data": data, "target": target, "keys": keys}

    def _corner(self, sample: int, row: int) -> list[int]:
        shape = self.shapes[row].tolist()  # get_bbox computes faster with Python's numbers than with NumPy's
        return self.loader.get_bbox(shape, self.loader.get_do_oversample(sample), self.class_locations[row])[0]

    def _gather(
        self,
        start: torch.Tensor,
        channel_start: torch.Tensor,
        pixels: torch.Tensor,
        corner: torch.Tensor,
        size: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Crop patches, padded as nnU-Net does: the image by 0, the segmentation by -1.

        Args:
            start: (n,) of the chosen slice in the segmentations, in pixels.
            channel_start: (n,) what is added to ``start`` for the case's image, in pixels: images have more channels.
            pixels: (n,) in one channel of the case.
            corner: (n, 2) row and column of the patch's first pixel in the slice; may lie outside.
            size: (n, 2) height and width of the slice.
        """
        indices, inside = [], []
        for axis, length in enumerate(self.loader.patch_size[1:]):
            index = corner[:, axis, None] + torch.arange(length, device=self.device)
            last = size[:, axis, None] - 1
            inside.append((index >= 0) & (index <= last))
            indices.append(torch.minimum(index.clamp_(min=0), last))
        outside = ~(inside[0][:, :, None] & inside[1][:, None, :])
        index = (start[:, None] + indices[0] * size[:, 1:])[:, :, None] + indices[1][:, None, :]

        target = self.segmentations.take(index).to(torch.int16).masked_fill_(outside, -1)[:, None]
        index += channel_start[:, None, None]
        channels = [
            self.images.take(index + n * pixels[:, None, None]).masked_fill_(outside, 0)
            for n in range(self.image_channels)
        ]
        return torch.stack(channels, 1), target
