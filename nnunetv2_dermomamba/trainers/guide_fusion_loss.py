"""The Guide Fusion Loss in nnU-Net trainers."""

from __future__ import annotations

import torch
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunetv2_dermomamba.loss import GuideFusionLoss


class GuideFusionLossMixin:
    """Replaces a trainer's loss by the Guide Fusion Loss, inside nnU-Net's deep supervision where that is on."""

    attention = "scalar"

    def _build_loss(self) -> nn.Module:
        guide_fusion = GuideFusionLoss(
            self.attention,
            regions=self.label_manager.has_regions,
            ignore_label=self.label_manager.ignore_label,
            batch_dice=self.configuration_manager.batch_dice,
            ddp=self.is_ddp,
        )
        if not self.enable_deep_supervision:
            return guide_fusion
        loss = super()._build_loss()
        assert isinstance(loss, DeepSupervisionWrapper)
        loss.loss = guide_fusion
        return loss

    def _loss_parts(self) -> dict[str, torch.Tensor]:
        return self.loss.parts._asdict()


class nnUNetTrainerGuideFusionLoss(GuideFusionLossMixin, nnUNetTrainer):
    """nnU-Net's own network and optimizer with the Guide Fusion Loss."""
