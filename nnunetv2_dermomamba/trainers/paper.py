"""The paper's own recipe inside nnU-Net, for comparison."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from .dermomamba import nnUNetTrainerDermoMamba
from .optimization import PlateauScheduler

BATCH_SIZE = 4
ROTATION = math.radians(15)
ITERATIONS = 519  # a pass over the 2 074 images that the released code trains on
STALLED_EPOCHS = 5


class nnUNetTrainerDermoMambaPaper(nnUNetTrainerDermoMamba):
    """The paper's recipe: Adam at 1e-4, halved when validation Dice stalls for 5 epochs; batches of 4.

    200 epochs of 519 iterations, half precision on CUDA; rotation by up to 15 degrees, flips and a rare crop; the loss
    with ``attention="scalar"``. Whole images without oversampling of lesions, no warm-up, weight decay or clipping.

    The paper scales images to 0 to 1. nnU-Net takes the normalisation from the channel names of the data set, not from
    a trainer: convert it with ``--normalization rgb_to_0_1`` for that.

    Not in what we know of the paper, so chosen here: half of the images are rotated; one in ten is cropped, to 80 to
    100 % of its sides, and enlarged; validation Dice is nnU-Net's pseudo Dice of an epoch.
    """

    learning_rate = 1e-4
    epochs = 200
    warmup_epochs = 0.0
    gradient_clip = math.inf
    attention = "scalar"

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),
    ) -> None:
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_iterations_per_epoch = ITERATIONS
        self.oversample_foreground_percent = 0.0
        self.configuration_manager.configuration["batch_size"] = BATCH_SIZE

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, PlateauScheduler]:  # type: ignore[override]
        """Adam, and halving of its rate, by nnU-Net's log of the pseudo Dice."""
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.Adam(self.network.parameters(), self.initial_lr, fused=fused)
        # PyTorch waits for `patience` epochs and acts on the next
        scheduler = PlateauScheduler(optimizer, self.initial_lr, self._validation_dice, 0.5, STALLED_EPOCHS - 1)
        return optimizer, scheduler

    def _validation_dice(self) -> list[float]:
        return self.logger.get_value("mean_fg_dice", step=None)

    def _set_learning_rate(self) -> None:
        """Nothing within an epoch."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self) -> tuple[Any, bool, Any, Any]:
        """As nnU-Net, with the paper's angles."""
        _, dummy_2d, patch_size, mirror_axes = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        return (-ROTATION, ROTATION), dummy_2d, patch_size, mirror_axes

    @staticmethod
    def get_training_transforms(
        patch_size: np.ndarray | tuple[int, ...], rotation_for_DA: tuple[float, float], *arguments: Any, **options: Any
    ) -> BasicTransform:
        """nnU-Net's without noise, blur, contrast and the like (all that is applied at random but flips)."""
        pipeline = nnUNetTrainer.get_training_transforms(patch_size, rotation_for_DA, *arguments, **options)
        pipeline.transforms = [t for t in pipeline.transforms if not isinstance(t, RandomTransform)]
        spatial = next(t for t in pipeline.transforms if isinstance(t, SpatialTransform))
        spatial.p_rotation = 0.5
        spatial.p_scaling, spatial.scaling = 0.1, (0.8, 1.0)  # below 1 the image is enlarged
        return pipeline
