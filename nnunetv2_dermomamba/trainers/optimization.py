"""AdamW for a Mamba network, and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

SCAN_PARAMETERS = ("A_logs", "Ds", "dt_projs_bias")
"""The scan's own dynamics: Mamba keeps weight decay away from them (it would pull A to -1 and the step sizes to
0.7)."""


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's two groups: matrices and kernels with weight decay; vectors, scalars and the scan's own without."""
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in network.named_parameters():
        is_scan = name.rsplit(".", 1)[-1] in SCAN_PARAMETERS
        (free if is_scan or parameter.ndim < 2 else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


def build_adamw(network: nn.Module, lr: float, weight_decay: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW as one kernel where PyTorch has that, so that a step neither loops over tensors nor waits for the GPU."""
    groups = parameter_groups(network, weight_decay)
    return torch.optim.AdamW(groups, lr, fused=device.type in ("cuda", "cpu"))


class WarmupPolyLRScheduler(PolyLRScheduler):
    """nnU-Net's polynomial decay behind a linear warm-up, at any fraction of an epoch.

    ``step(epoch)`` takes fractions, so the trainer sets the rate at every iteration; nothing is remembered between
    steps, so a resumed run goes on where it was.

    Args:
        optimizer: whose groups all get the same rate.
        initial_lr: rate at the end of the warm-up, before decay.
        max_steps: epochs.
        warmup: epochs of warm-up.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, initial_lr: float, max_steps: int, warmup: float) -> None:
        self.warmup = warmup
        super().__init__(optimizer, initial_lr, max_steps)

    def step(self, current_step: float | None = None) -> None:  # noqa: D102
        super().step(current_step)
        if current_step is None or current_step >= self.warmup:
            return
        for group in self.optimizer.param_groups:
            group["lr"] *= current_step / self.warmup
        self._last_lr = [group["lr"] for group in self.optimizer.param_groups]


class PlateauScheduler:
    """PyTorch's ``ReduceLROnPlateau``, called as nnU-Net calls a schedule: once at the start of every epoch.

    It goes through the scores of all epochs so far each time. They are in nnU-Net's log, which checkpoints hold, so
    that a resumed run goes on where it was.

    Args:
        optimizer: whose groups all get the same rate.
        initial_lr: rate of the first epoch.
        scores: returns one score for each finished epoch; higher is better.
        factor: by which the rate is multiplied.
        patience: epochs in a row without a new best that are waited for; the rate falls with the next one.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        initial_lr: float,
        scores: Callable[[], list[float]],
        factor: float,
        patience: int,
    ) -> None:
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.scores = scores
        self.factor = factor
        self.patience = patience

    def step(self, epoch: int) -> None:
        """Set the rate of an epoch, from the scores of those before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.initial_lr
        plateau = ReduceLROnPlateau(self.optimizer, "max", factor=self.factor, patience=self.patience)
        for score in self.scores()[:epoch]:
            plateau.step(score)
