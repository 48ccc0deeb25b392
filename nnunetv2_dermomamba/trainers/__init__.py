"""Trainers that stock nnU-Net finds by name (``-tr``)."""

from .dermomamba import (
    nnUNetTrainerDermoMamba,
    nnUNetTrainerDermoMamba_5epochs,
    nnUNetTrainerDermoMamba_50epochs,
    nnUNetTrainerDermoMamba_demo,
    nnUNetTrainerDermoMambaDiceCE,
)
from .guide_fusion_loss import nnUNetTrainerGuideFusionLoss

__all__ = [
    "nnUNetTrainerDermoMamba",
    "nnUNetTrainerDermoMambaDiceCE",
    "nnUNetTrainerDermoMamba_5epochs",
    "nnUNetTrainerDermoMamba_50epochs",
    "nnUNetTrainerDermoMamba_demo",
    "nnUNetTrainerGuideFusionLoss",
]
