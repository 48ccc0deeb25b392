"""Trainers that stock nnU-Net finds by name (``-tr``)."""

from .dermomamba import (
    nnUNetTrainerDermoMamba,
    nnUNetTrainerDermoMamba_5epochs,
    nnUNetTrainerDermoMamba_demo,
    nnUNetTrainerDermoMambaDiceCE,
)
from .guide_fusion_loss import nnUNetTrainerGuideFusionLoss
from .paper import nnUNetTrainerDermoMambaPaper

__all__ = [
    "nnUNetTrainerDermoMamba",
    "nnUNetTrainerDermoMambaDiceCE",
    "nnUNetTrainerDermoMambaPaper",
    "nnUNetTrainerDermoMamba_5epochs",
    "nnUNetTrainerDermoMamba_demo",
    "nnUNetTrainerGuideFusionLoss",
]
