"""The network of a trained model with the size of its input, to count its cost; importing this imports no torch."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_dermomamba.predict.options import FINAL_CHECKPOINT

if TYPE_CHECKING:
    from torch import nn

__all__ = ["SizedNetwork", "trained_model"]


@dataclass(frozen=True)
class SizedNetwork:
    """The network of a trained model, or the published one, and the input it is made for.

    Attributes:
        name: Trainer, plans and configuration, or the network's name.
        network: On the CPU.
        channels: Input channels.
        patch_size: (height, width) in pixels.
        details: What else its files say, for people.
    """

    name: str
    network: nn.Module
    channels: int
    patch_size: tuple[int, ...]
    details: dict[str, str]


def trained_model(
    path: Path, folds: list[str] | None = None, checkpoint: str = FINAL_CHECKPOINT, trust: bool = False
) -> SizedNetwork:
    """Read a trained model as prediction does, without trusting who made it.

    Args:
        path: nnU-Net's results folder of one trainer and configuration, or the zip file that
            ``nnUNetv2_export_model_to_zip`` writes.
        folds: Their names; None for all.
        checkpoint: File name of the checkpoints.
        trust: Load a model that could run any code.

    Raises:
        ModelError: It cannot be used, or holds what a model has no need of.
    """
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    from nnunetv2_dermomamba.predict.model import build_network, load_model

    with redirect_stdout(sys.stderr):  # trainers and nnU-Net print
        model = load_model(path, folds, checkpoint, trust)
        plans = PlansManager(model.plans)
        network = build_network(model, plans, trust)
    configuration = plans.get_configuration(model.configuration)
    channels = determine_num_input_channels(plans, configuration, model.dataset)
    details = {
        "data set": str(plans.dataset_name),
        "trainer": model.trainer,
        "labels": ", ".join(model.dataset["labels"]),
        "folds": ", ".join(model.folds),
        "checkpoint": model.checkpoint,
    }
    return SizedNetwork(model.name, network, channels, tuple(configuration.patch_size), details)
