"""The trainer option, with a real trainer on a small preprocessed data set."""

import copy
from functools import partial

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from preprocessed_dataset import DATASET, spoil_image
from scipy import stats

from nnunetv2_dermomamba.augmentation import trainer_mixin
from nnunetv2_dermomamba.augmentation.parameters import UntranslatableTransformError
from nnunetv2_dermomamba.augmentation.resident import ResidentDataLoader
from nnunetv2_dermomamba.augmentation.trainer_mixin import OPTION, AugmentedBatches, DeviceAugmentationMixin
from nnunetv2_dermomamba.finite_images import NotFiniteError

BATCHES = 60
P_VALUE = 1e-3


class Trainer(DeviceAugmentationMixin, nnUNetTrainer):
    pass


class WithUnknownTransform(Trainer):
    @staticmethod
    def get_training_transforms(*arguments, **options):
        transforms = nnUNetTrainer.get_training_transforms(*arguments, **options)
        transforms.transforms[0].p_elastic_deform = 0.1
        return transforms


@pytest.fixture
def make(preprocessed, plans, dataset_json, monkeypatch):
    """Builds a trainer of a class, initialized, on the CPU without worker processes."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")

    def build(kind=Trainer, regions: bool = False, deep_supervision: bool = True):
        if regions:
            dataset_json["labels"] = {"background": 0, "whole": [1, 2], "core": 2}
            dataset_json["regions_class_order"] = [1, 2]
        np.random.seed(0)
        torch.manual_seed(0)
        trainer = kind(copy.deepcopy(plans), "2d", 0, dataset_json, torch.device("cpu"))
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
        trainer.enable_deep_supervision = deep_supervision
        trainer.initialize()
        return trainer

    return build


def log(trainer) -> str:
    with open(trainer.log_file) as file:
        return file.read()


def test_off_the_gpu_nothing_changes(make):
    assert all(isinstance(loader, SingleThreadedAugmenter) for loader in make().get_dataloaders())


@pytest.mark.parametrize(
    ("attribute", "environment", "expected"), [(True, None, True), (False, "1", True), (True, "0", False)]
)
def test_option(make, monkeypatch, attribute, environment, expected):
    if environment is not None:
        monkeypatch.setenv(OPTION, environment)
    trainer = make()
    trainer.augment_on_device = attribute
    assert all(isinstance(loader, AugmentedBatches) == expected for loader in trainer.get_dataloaders())


def test_wrong_option(make, monkeypatch):
    monkeypatch.setenv(OPTION, "perhaps")
    with pytest.raises(ValueError, match="DERMOMAMBA_AUGMENT_ON_DEVICE is 'perhaps'"):
        make().get_dataloaders()


def test_who_seeds_numpy_and_torch_gets_the_same_batches(make):
    batches = []
    for _ in range(2):
        trainer = make()  # seeds both
        trainer.augment_on_device = True
        batches.append(next(trainer.get_dataloaders()[0])["data"])
    assert torch.equal(*batches)


def test_untranslatable(make, monkeypatch):
    trainer = make(WithUnknownTransform)
    trainer.augment_on_device = True
    with pytest.raises(UntranslatableTransformError, match=r"p_elastic_deform=0\.1\. WithUnknownTransform .*=0\."):
        trainer.get_dataloaders()
    trainer.augment_on_device = None
    monkeypatch.setattr(trainer_mixin, "FASTER_ON", ("cpu",))
    assert isinstance(trainer.get_dataloaders()[0], SingleThreadedAugmenter)
    assert "Augmentation in worker processes: no counterpart for batches of SpatialTransform" in log(trainer)


def test_another_loader_is_not_replaced(make, monkeypatch):
    class Loader(trainer_mixin.nnUNetDataLoader):
        def generate_train_batch(self):
            return {**super().generate_train_batch(), "more": 1}

    # Not by the module's name: nnU-Net's trainer search, in another test, may have imported it anew.
    monkeypatch.setitem(nnUNetTrainer.get_dataloaders.__globals__, "nnUNetDataLoader", Loader)
    monkeypatch.setattr(trainer_mixin, "FASTER_ON", ("cpu",))
    train, _ = make().get_dataloaders()
    assert next(train)["more"] == 1


@pytest.mark.parametrize("deep_supervision", [True, False])
@pytest.mark.parametrize("regions", [False, True])
def test_batches_look_like_nnunets(make, deep_supervision, regions):
    trainer = make(Trainer, regions, deep_supervision)
    theirs = [next(loader) for loader in trainer.get_dataloaders()]
    trainer.augment_on_device = True
    ours = [next(loader) for loader in trainer.get_dataloaders()]
    for own, their in zip(ours, theirs, strict=True):
        assert own.keys() == their.keys()
        assert (own["data"].shape, own["data"].dtype) == (their["data"].shape, their["data"].dtype)
        pairs = [(own["target"], their["target"])]
        if deep_supervision:
            assert isinstance(own["target"], list)
            pairs = list(zip(own["target"], their["target"], strict=True))
        for own_target, their_target in pairs:
            assert (own_target.shape, own_target.dtype) == (their_target.shape, their_target.dtype)


def statistics(loader) -> dict[str, np.ndarray]:
    """One number a sample each."""
    batches = [next(loader) for _ in range(BATCHES)]
    image = torch.cat([batch["data"] for batch in batches])
    target = torch.cat([batch["target"] for batch in batches])
    return {
        "mean": image.mean((1, 2, 3)).numpy(),
        "standard deviation": image.std((1, 2, 3)).numpy(),
        "rim": (target == 1).float().mean((1, 2, 3)).numpy(),
        "core": (target == 2).float().mean((1, 2, 3)).numpy(),
        "background": (image == 0).float().mean((1, 2, 3)).numpy(),
    }


@pytest.mark.parametrize("fits", [True, False])
def test_distribution_of_batches(make, monkeypatch, fits):
    trainer = make(deep_supervision=False)
    theirs = [statistics(loader) for loader in trainer.get_dataloaders()]
    trainer.augment_on_device = True
    if not fits:
        monkeypatch.setattr(trainer_mixin, "RESIDENT_SHARE", 0)
    loaders = trainer.get_dataloaders()
    assert all(isinstance(loader.source, ResidentDataLoader) == fits for loader in loaders)
    for loader, their in zip(loaders, theirs, strict=True):
        own = statistics(loader)
        for name in their:
            assert stats.ks_2samp(own[name], their[name]).pvalue > P_VALUE, name


@pytest.mark.parametrize("fits", [True, False])
def test_a_case_with_nan_is_named(make, monkeypatch, preprocessed, fits):
    """Before it is on the device, where looking for it would mean to wait for the device at every step."""
    trainer = make()
    for number in range(7):
        spoil_image(preprocessed / DATASET / "nnUNetPlans_2d", f"case_{number:02d}", np.nan)
    trainer.augment_on_device = True
    if not fits:
        monkeypatch.setattr(trainer_mixin, "RESIDENT_SHARE", 0)
    attempt = trainer.get_dataloaders if fits else partial(next, trainer.get_dataloaders()[0])
    with pytest.raises(NotFiniteError, match="in the image of case_0"):
        attempt()


def test_training_and_worker_processes_end(make, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    monkeypatch.setattr(trainer_mixin, "RESIDENT_SHARE", 0)
    trainer = make()
    trainer.augment_on_device = True
    trainer.run_training()
    source = trainer.dataloader_train.source
    assert isinstance(source, NonDetMultiThreadedAugmenter)
    assert not source._processes
    assert "read and cropped by worker processes" in log(trainer)
    assert np.isfinite(trainer.logger.local_logger.my_fantastic_logging["train_losses"][0])


def test_free_memory_where_the_system_does_not_tell_it(monkeypatch):
    monkeypatch.delattr(trainer_mixin.os, "sysconf", raising=False)
    assert trainer_mixin._free_bytes(torch.device("cpu")) == 0
