"""The paper's recipe: what it trains with, and when its learning rate falls."""

import copy
import math

import pytest
import torch
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.spatial.spatial import SpatialTransform
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMambaPaper


@pytest.fixture
def make(preprocessed, plans, dataset_json, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def build(epochs: int, continue_training: bool = False):
        settings = {**copy.deepcopy(plans), "continue_training": continue_training}
        trainer = nnUNetTrainerDermoMambaPaper(settings, "2d", 0, dataset_json, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = epochs, 1, 1
        trainer.logger.plot_progress_png = lambda folder: None
        return trainer

    return build


def test_recipe(make) -> None:
    trainer = make(1)
    trainer.on_train_start()
    assert type(trainer.optimizer) is torch.optim.Adam
    assert {(group["lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups} == {(1e-4, 0)}
    assert trainer.guide_fusion_loss.attention == "scalar"
    assert next(trainer.dataloader_train)["data"].shape[0] == 4
    transforms = trainer.dataloader_train.data_loader.transforms.transforms
    spatial = next(t for t in transforms if isinstance(t, SpatialTransform))
    assert spatial.rotation == (-math.radians(15), math.radians(15))
    assert any(isinstance(t, MirrorTransform) for t in transforms)
    assert not any(isinstance(t, RandomTransform) for t in transforms)
    with open(trainer.log_file) as log:
        assert "warm-up" not in log.read()


def test_augments_on_the_device(make) -> None:
    trainer = make(1)
    trainer.augment_on_device = True
    trainer.initialize()
    train, _ = trainer.get_dataloaders()
    assert next(train)["data"].shape[0] == 4


def rates(trainer, scores: list[float]) -> list[float]:
    """The rates that its epochs train with when validation gives these scores."""
    seen = []

    def validated(outputs):
        trainer.logger.log("mean_fg_dice", scores[trainer.current_epoch], trainer.current_epoch)
        trainer.logger.log("dice_per_class_or_region", [0.0], trainer.current_epoch)
        trainer.logger.log("val_losses", 0.0, trainer.current_epoch)

    def step(batch):
        seen.append(trainer.optimizer.param_groups[0]["lr"])
        return {"loss": torch.zeros(()), "loss_parts": torch.zeros(2)}

    trainer.on_validation_epoch_end, trainer.train_step = validated, step
    trainer.validation_step = lambda batch: {}
    trainer.run_training()
    return seen


SCORES = [0.5, 0.6, *[0.6] * 5, 0.7, *[0.65] * 5, 0.7]
RATES = [1e-4] * 7 + [5e-5] * 6 + [2.5e-5]


def test_rate_is_halved_after_five_epochs_without_progress(make) -> None:
    assert rates(make(len(SCORES)), SCORES) == pytest.approx(RATES)


def test_rate_goes_on_after_a_restart(make) -> None:
    first = make(9)
    assert rates(first, SCORES) == pytest.approx(RATES[:9])
    second = make(len(SCORES), continue_training=True)
    second.load_checkpoint(f"{first.output_folder}/checkpoint_final.pth")
    assert rates(second, SCORES) == pytest.approx(RATES[9:])
