"""Guide Fusion Loss."""

from nnunetv2_dermomamba.loss.distance import distance_to_opposite
from nnunetv2_dermomamba.loss.guide_fusion import GuideFusionLoss, GuideFusionParts, attention_map, guide_fusion_loss

__all__ = ["GuideFusionLoss", "GuideFusionParts", "attention_map", "distance_to_opposite", "guide_fusion_loss"]
