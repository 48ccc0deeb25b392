"""The Guide Fusion Loss in nnU-Net trainers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_dermomamba.loss import GuideFusionLoss
from nnunetv2_dermomamba.loss.guide_fusion import Attention

from .finite import skip_broken_steps
from .interruptible import InterruptibleMixin


class GuideFusionLossMixin(nnUNetTrainer):
    """Replaces a trainer's loss by the Guide Fusion Loss, inside nnU-Net's deep supervision where that is on.

    The means of its two parts go to the log after every epoch; with deep supervision, those of the coarsest scale that
    has a weight.

    Attributes:
        attention: ``"pixel"`` draws borders better than nnU-Net's own loss does, ``"scalar"``, the arithmetic released
            with the paper, does not (docs/accuracy.md).
    """

    attention: Attention = "pixel"

    def _build_loss(self) -> nn.Module:
        self.guide_fusion_loss = GuideFusionLoss(
            self.attention,
            regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
            batch_dice=self.configuration_manager.batch_dice,
            ddp=self.is_ddp,
        )
        if not self.enable_deep_supervision:
            return self.guide_fusion_loss
        loss = super()._build_loss()
        assert isinstance(loss, DeepSupervisionWrapper)
        loss.loss = self.guide_fusion_loss
        return loss

    def train_step(self, batch: dict) -> dict:
        """The trainer's own step; the loss, of nnU-Net's step an array, and its parts as tensors on the device."""
        outputs = super().train_step(batch)
        loss = torch.as_tensor(outputs["loss"], device=self.device)
        return {**outputs, "loss": loss, "loss_parts": torch.stack(self.guide_fusion_loss.parts)}

    def on_train_epoch_end(self, train_outputs: list[dict]) -> None:
        """As the trainer's own; logs the means of the loss's two parts."""
        parts = torch.stack([output["loss_parts"] for output in train_outputs]).mean(0)
        if self.is_ddp:
            dist.all_reduce(parts)
            parts /= dist.get_world_size()
        super().on_train_epoch_end([{"loss": output["loss"]} for output in train_outputs])
        cross_entropy, attention_dice = parts.tolist()
        self.print_to_log_file(
            f"train_loss parts: cross_entropy {cross_entropy:.4f}, attention_dice {attention_dice:.4f}"
        )


class nnUNetTrainerGuideFusionLoss(GuideFusionLossMixin, InterruptibleMixin):
    """nnU-Net's own network, optimizer and step with the Guide Fusion Loss."""

    def initialize(self) -> None:
        """As nnU-Net, whose step on the CPU would put gradients that are not finite into the weights."""
        super().initialize()
        if self.grad_scaler is None:
            skip_broken_steps(self.optimizer)
