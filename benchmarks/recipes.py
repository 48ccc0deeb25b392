"""The named ways to train that ``accuracy.py`` compares. A new one is an entry here: one change at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from averaging import AveragedWeightsMixin
from colour_jitter import ColourJitterMixin
from low_resolution import WithoutLowResolutionMixin


@dataclass(frozen=True)
class Setting:
    """A trainer and what is changed of it.

    Attributes:
        trainer: what ``-tr`` would name.
        plans: nnU-Net's plans, where they must be others than those asked for.
        trainer_changes: attributes of the trainer that are set before it builds anything.
        plan_changes: entries of the plans' 2D configuration.
        mixins: listed before the trainer.
        epochs: into how many the presentations are split; None for passes over the training images.
        validation_images: validated after every epoch, for the log or for a schedule that follows it.
    """

    trainer: str
    plans: str | None = None
    trainer_changes: dict[str, Any] = field(default_factory=dict)
    plan_changes: dict[str, Any] = field(default_factory=dict)
    mixins: tuple[type, ...] = ()
    epochs: int | None = None
    validation_images: int = 32


UNET = Setting("nnUNetTrainer")
DERMOMAMBA = Setting("nnUNetTrainerDermoMamba")
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2  # nnUNetTrainerDermoMamba's

SETTINGS = {
    # The table.
    "unet": UNET,
    "resenc": replace(UNET, plans="nnUNetResEncUNetMPlans"),
    # Its schedule follows validation over 200 epochs, however many presentations these have.
    "paper": Setting("nnUNetTrainerDermoMambaPaper", epochs=200, validation_images=100),
    "dermomamba": DERMOMAMBA,
    "dermomamba-dice-ce": Setting("nnUNetTrainerDermoMambaDiceCE"),
    "unet-guide-fusion": Setting("nnUNetTrainerGuideFusionLoss"),
    # One change of DermoMamba's recipe each.
    "rate-x3": replace(DERMOMAMBA, trainer_changes={"initial_lr": 3 * LEARNING_RATE}),
    "rate-third": replace(DERMOMAMBA, trainer_changes={"initial_lr": LEARNING_RATE / 3}),
    "decay-x10": replace(DERMOMAMBA, trainer_changes={"weight_decay": 10 * WEIGHT_DECAY}),
    "decay-tenth": replace(DERMOMAMBA, trainer_changes={"weight_decay": WEIGHT_DECAY / 10}),
    "warm-up-none": replace(DERMOMAMBA, trainer_changes={"warmup_epochs": 0.0}),
    "warm-up-double": replace(DERMOMAMBA, trainer_changes={"warmup_epochs": 2.0}),
    "attention-scalar": replace(DERMOMAMBA, trainer_changes={"attention": "scalar"}),
    "ema": replace(DERMOMAMBA, mixins=(AveragedWeightsMixin,)),
    "colour-jitter": replace(DERMOMAMBA, mixins=(ColourJitterMixin,)),
    "no-low-resolution": replace(DERMOMAMBA, mixins=(WithoutLowResolutionMixin,)),
    "foreground-oversampled": replace(DERMOMAMBA, trainer_changes={"oversample_foreground_percent": 0.33}),
    "image-dice": replace(DERMOMAMBA, plan_changes={"batch_dice": False}),
    "dice-ce-image-dice": Setting("nnUNetTrainerDermoMambaDiceCE", plan_changes={"batch_dice": False}),
    # What may be wrong with stock nnU-Net on these images: docs/accuracy.md.
    "unet-whole-images": replace(UNET, trainer_changes={"oversample_foreground_percent": 0.0}),
    "unet-image-dice": replace(UNET, plan_changes={"batch_dice": False}),
    "unet-rate-third": replace(UNET, trainer_changes={"initial_lr": 1e-2 / 3}),
}
