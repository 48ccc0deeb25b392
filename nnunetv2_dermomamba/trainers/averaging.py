"""Exponential moving average (EMA) of the weights, as a trainer's option."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .interruptible import REPAIR_INTERVAL, InterruptibleMixin


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
    """Validates, saves and predicts with an average of the weights, where ``ema_decay`` is set; it trains as before.

    The average takes in the weights and BatchNorm's running statistics every ten steps, behind the repair of those
    statistics, and once more before validation. ``network_weights`` of a checkpoint are the averaged ones; those to go
    on with are beside them.
    """

    network: nn.Module
    ema_decay: float | None = None
    """Share of the average that one training step keeps, such as 0.999; None for no average."""

    def initialize(self) -> None:
        """As the trainer's own; the average starts at the initial weights."""
        super().initialize()
        self.averaged: AveragedModel | None = None
        if self.ema_decay is not None:
            average = ramped_average(self.ema_decay**REPAIR_INTERVAL)
            self.averaged = AveragedModel(self.plain_network(), multi_avg_fn=average, use_buffers=True)
            self.averaged.requires_grad_(False)

    def inference_network(self) -> nn.Module:
        """The network to predict with, without wrappers."""
        return self.plain_network() if self.averaged is None else self.averaged.module

    def _average(self) -> None:
        if self.averaged is not None:
            self.averaged.update_parameters(self.plain_network())

    def _look_after_numbers(self) -> None:
        super()._look_after_numbers()
        if self.iteration % REPAIR_INTERVAL == 0:
            self._average()

    def on_validation_epoch_start(self) -> None:
        """As nnU-Net, with the average up to date."""
        super().on_validation_epoch_start()
        self._average()
        if self.averaged is not None:
            self.averaged.eval()

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        trained = self.network
        if self.averaged is not None:
            self.network = self.averaged.module
        try:
            yield
        finally:
            self.network = trained

    def validation_step(self, batch: dict) -> dict:
        """As nnU-Net, of the averaged weights."""
        with self._averaged_weights():
            return super().validation_step(batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """As nnU-Net, of the averaged weights."""
        with self._averaged_weights():
            super().perform_actual_validation(save_probabilities)

    def _checkpoint(self, within_epoch: bool) -> dict[str, Any]:
        checkpoint = super()._checkpoint(within_epoch)
        if self.averaged is not None:
            checkpoint["trained_weights"] = checkpoint["network_weights"]
            checkpoint["network_weights"] = self.averaged.module.state_dict()
            checkpoint["average_updates"] = int(self.averaged.n_averaged)
        return checkpoint

    def _last_good(self, wanted: Path, continuing: bool) -> tuple[Path, dict]:
        path, checkpoint = super()._last_good(wanted, continuing)
        self._restored = {name: checkpoint.get(name) for name in ("trained_weights", "average_updates")}
        return path, checkpoint

    def load_checkpoint(self, filename_or_checkpoint: dict | str) -> None:
        """As the trainer's own: ``network_weights`` become the average, and the training goes on from its own."""
        super().load_checkpoint(filename_or_checkpoint)
        if self.averaged is None:
            return
        self.averaged.module.load_state_dict(self.plain_network().state_dict())
        if self._restored["trained_weights"] is not None:
            self.plain_network().load_state_dict(self._restored["trained_weights"])
            self.averaged.n_averaged.fill_(self._restored["average_updates"])
