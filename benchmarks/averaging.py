"""Exponential moving average (EMA) of the weights of a training that is not interrupted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from nnunetv2_dermomamba.trainers.interruptible import REPAIR_INTERVAL, InterruptibleMixin


def ramped_average(decay: float) -> Callable[[list, list, torch.Tensor], None]:
    """Average of ``AveragedModel`` whose decay is (1 + n) / (10 + n) at update n as long as that is less.

    TensorFlow's ``ExponentialMovingAverage`` has this ramp (``num_updates``): without it the first weights, which are
    random, would stay in the average of a short training.

    Args:
        decay: share of the old average that an update keeps.
    """

    def update(averaged: list, current: list, updates: torch.Tensor) -> None:
        n = float(updates)
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, updates)

    return update


class AveragedWeightsMixin(InterruptibleMixin):
    """Validates, saves and predicts with an average of the weights; it trains as before. List it first.

    The average takes in the weights and BatchNorm's running statistics every ten steps, behind the repair of those
    statistics, and once more before validation. Checkpoints hold nothing else, so that no training goes on from them.
    """

    network: nn.Module
    ema_decay = 0.999
    """Share of the average that one training step keeps."""

    def initialize(self) -> None:
        """As the trainer's own; the average starts at the initial weights."""
        super().initialize()
        average = ramped_average(self.ema_decay**REPAIR_INTERVAL)
        self.averaged = AveragedModel(self.plain_network(), multi_avg_fn=average, use_buffers=True)
        self.averaged.requires_grad_(False)

    def inference_network(self) -> nn.Module:
        """The network to predict with."""
        return self.averaged.module

    def _average(self) -> None:
        self.averaged.update_parameters(self.plain_network())

    def _look_after_numbers(self) -> None:
        super()._look_after_numbers()
        if self.iteration % REPAIR_INTERVAL == 0:
            self._average()

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net, with the average up to date."""
        super().on_validation_epoch_start()
        self._average()
        self.averaged.eval()

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net, of the averaged weights."""
        trained, self.network = self.network, self.averaged.module
        try:
            return super().validation_step(batch)
        finally:
            self.network = trained

    def _checkpoint(self, within_epoch: bool) -> dict[str, Any]:
        return super()._checkpoint(within_epoch) | {"network_weights": self.averaged.module.state_dict()}
