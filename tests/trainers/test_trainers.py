"""Every trainer trains: two iterations and a validation step on a small data set with two classes, or regions."""

import copy
import io
import math
import sys

import numpy as np
import pytest
import small_training
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunetv2_dermomamba import trainers
from nnunetv2_dermomamba.network import DermoMamba

EPOCHS = {
    "nnUNetTrainerDermoMamba": 50,
    "nnUNetTrainerDermoMambaDiceCE": 50,
    "nnUNetTrainerDermoMambaPaper": 200,
    "nnUNetTrainerDermoMamba_5epochs": 5,
    "nnUNetTrainerDermoMamba_demo": 4,
    "nnUNetTrainerGuideFusionLoss": 1000,
}
LABELS = {
    "classes": {"labels": {"background": 0, "rim": 1, "core": 2}},
    "regions": {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
}


@pytest.fixture
def make(preprocessed, plans, dataset_json, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def build(name: str, labels: str):
        trainer_class = getattr(trainers, name)
        dataset = {**dataset_json, **LABELS[labels]}
        trainer = trainer_class(copy.deepcopy(plans), "2d", 0, dataset, torch.device("cpu"))
        assert trainer.num_epochs == EPOCHS[name]
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
        trainer.initialize()
        return trainer

    return build


def test_all_are_listed() -> None:
    assert set(trainers.__all__) == set(EPOCHS)


@pytest.mark.usefixtures("preprocessed")
@pytest.mark.parametrize(("larger", "share"), [((1, 1), 0.0), ((1, 2), 0.33), ((2, 1), 0.33), ((0.9, 0.9), 0.0)])
def test_lesions_are_oversampled_only_where_a_patch_is_part_of_an_image(plans, dataset_json, larger, share) -> None:
    configuration = plans["configurations"]["2d"]
    sizes = zip(configuration["patch_size"], larger, strict=True)
    configuration["median_image_size_in_voxels"] = [side * factor for side, factor in sizes]
    trainer = trainers.nnUNetTrainerDermoMamba(plans, "2d", 0, dataset_json, torch.device("cpu"))
    assert trainer.oversample_foreground_percent == share


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("nnUNetTrainerDermoMamba", "classes"),
        ("nnUNetTrainerDermoMamba", "regions"),
        ("nnUNetTrainerDermoMamba_5epochs", "classes"),
        ("nnUNetTrainerDermoMamba_demo", "classes"),
        ("nnUNetTrainerDermoMambaDiceCE", "classes"),
        ("nnUNetTrainerDermoMambaPaper", "classes"),
        ("nnUNetTrainerDermoMambaPaper", "regions"),
        ("nnUNetTrainerGuideFusionLoss", "classes"),
        ("nnUNetTrainerGuideFusionLoss", "regions"),
    ],
)
def test_trains(make, name: str, labels: str) -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    trainer = make(name, labels)
    before = {key: value.clone() for key, value in trainer.network.state_dict().items()}
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    outputs = [trainer.train_step(next(trainer.dataloader_train)) for _ in range(2)]
    assert {value.device for output in outputs for value in output.values()} == {trainer.device}
    trainer.on_train_epoch_end(outputs)
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.on_validation_epoch_end([trainer.validation_step(next(trainer.dataloader_val))])
    after = trainer.network.state_dict()
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert math.isfinite(trainer.logger.get_value("train_losses", step=-1))
    assert math.isfinite(trainer.logger.get_value("val_losses", step=-1))
    with open(trainer.log_file) as file:
        log = file.read()
    assert ("cross_entropy" in log) == (name != "nnUNetTrainerDermoMambaDiceCE")
    if "DermoMamba" in name:
        assert isinstance(trainer.network, DermoMamba)
        assert "Selective scan backend: numba for cpu" in log
        assert not trainer.enable_deep_supervision
        assert trainer.optimizer.param_groups[0]["lr"] > 0


def test_where_steps_are_captured_validation_calls_the_captured_network(make, monkeypatch) -> None:
    trainer = make("nnUNetTrainerDermoMamba", "classes")
    trainer.on_train_start()
    batch, network, seen = next(trainer.dataloader_val), trainer.network, []

    def captured(data):
        seen.append(data)
        return network(data)

    with torch.no_grad():
        trainer.on_validation_epoch_start()
        expected = trainer.validation_step(copy.deepcopy(batch))
        trainer._captured_inference = captured
        monkeypatch.setattr(trainer, "_captures", lambda: True)
        assert trainer.validation_step(copy.deepcopy(batch))["loss"] == expected["loss"]
        assert len(seen) == 1
        with pytest.raises(KeyError):
            trainer.validation_step({})
    assert trainer.network is network


def test_a_terminal_shows_the_steps_of_an_epoch(small, monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    shown = []
    for kind in (Terminal, io.StringIO):
        trainer = small_training.make(small)
        trainer.num_epochs = 1
        monkeypatch.setattr(sys, "stderr", kind())
        trainer.run_training()
        shown.append(sys.stderr.getvalue())
    assert "Epoch 0:" in shown[0]
    assert "0/8" in shown[0]
    assert "Epoch" not in shown[1]


def test_with_a_seed_each_process_and_a_run_that_goes_on_draw_their_own_augmentation(small) -> None:
    def drawn(rank: int, epoch: int) -> float:
        trainer = small_training.make(small)
        trainer.augment_on_device = True
        trainer.initialize()
        trainer.local_rank, trainer.current_epoch = rank, epoch
        return trainer.get_dataloaders()[0].augmenter.rng.random()

    assert drawn(0, 0) == drawn(0, 0)
    assert len({drawn(0, 0), drawn(1, 0), drawn(0, 3)}) == 3


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_of_nnunets_own_network_goes_on_within_an_epoch(preprocessed, plans, dataset_json, monkeypatch, device):
    class Stopped(trainers.nnUNetTrainerGuideFusionLoss):
        def train_step(self, batch):
            if self.iteration == 2 and not self.logger.resume:
                self.save_progress()
                raise InterruptedError
            return super().train_step(batch)

    def make(continues: bool) -> Stopped:
        trainer = Stopped({**copy.deepcopy(plans), "continue_training": continues}, "2d", 0, dataset_json, device)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 4, 1
        trainer.logger.plot_progress_png = lambda folder: None
        return trainer

    for name, value in {"nnUNet_n_proc_DA": "0", "nnUNet_compile": "f"}.items():
        monkeypatch.setenv(name, value)
    device = torch.device(device)
    with pytest.raises(InterruptedError):
        make(False).run_training()
    trainer = make(True)
    maybe_load_checkpoint(trainer, True, False)
    assert trainer.iteration == 2
    trainer.run_training()
    assert math.isfinite(trainer.logger.get_value("train_losses", step=-1))
