"""Numbers that break trainings: no step may leave NaN or infinity in the weights or in BatchNorm's statistics."""

import copy
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from preprocessed_dataset import DATASET, spoil_image
from small_training import SmallNetwork, SmallTrainer, make, results
from torch import nn

from nnunetv2_dermomamba import trainers
from nnunetv2_dermomamba.cuda_graph import WARM_UP
from nnunetv2_dermomamba.finite_images import NotFiniteError
from nnunetv2_dermomamba.network import dermomamba
from nnunetv2_dermomamba.trainers import interruptible
from nnunetv2_dermomamba.trainers.finite import RunningStatistics, skipped_at_end

STEPS = 10_000


def finite(network: nn.Module) -> bool:
    return all(torch.isfinite(value).all() for value in network.state_dict().values())


@pytest.fixture
def build(preprocessed, plans, dataset_json, monkeypatch):
    """A trainer of our network, narrow, for patches of 32 x 40."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(dermomamba, "STRIDE", 4)

    def make_trainer(name: str, device: str = "cpu"):
        monkeypatch.setattr(dermomamba, "WIDTHS", (8, 16) if device == "cuda" else (4, 8))
        trainer_class = getattr(trainers, name)
        trainer = trainer_class(copy.deepcopy(plans), "2d", 0, dataset_json, torch.device(device))
        torch.manual_seed(0)
        trainer.initialize()
        trainer.on_train_epoch_start()
        return trainer

    return make_trainer


def targets() -> dict[str, torch.Tensor]:
    """Labels of batches of two that a segmentation loss may divide by."""
    no_lesion = torch.zeros(2, 1, 32, 40, dtype=torch.int16)
    one_pixel = no_lesion.clone()
    one_pixel[:, :, 7, 9] = 1
    corner = no_lesion.clone()
    corner[0, :, 0, 0] = 2
    all_lesion = torch.ones_like(no_lesion)
    return {
        "no lesion": no_lesion,
        "all lesion": all_lesion,
        "one pixel": one_pixel,
        "one pixel in the corner of one image": corner,
        "one pixel of background": 1 - one_pixel,
        "one image without, one full": torch.stack([no_lesion[0], all_lesion[0]]),
    }


def images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "random": torch.randn(2, 3, 32, 40, generator=generator),
        "zero": torch.zeros(2, 3, 32, 40),
        "constant": torch.full((2, 3, 32, 40), -2.1),
        "constant and huge": torch.full((2, 3, 32, 40), 1e4),
        "one bright pixel": torch.zeros(2, 3, 32, 40).index_fill_(3, torch.tensor(5), 100.0),
    }


@pytest.mark.parametrize("name", ["nnUNetTrainerDermoMamba", "nnUNetTrainerDermoMambaDiceCE"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_extreme_batches_train(build, name: str, device: str) -> None:
    trainer = build(name, device)
    if device == "cuda":
        trainer.grad_scaler.load_state_dict(trainer.grad_scaler.state_dict() | {"scale": 1024.0})
    for kind, image in images().items():
        for what, target in targets().items():
            before = copy.deepcopy(trainer.network.state_dict())
            outputs = trainer.train_step({"data": image.clone(), "target": target.clone()})
            trainer.running_statistics.repair()
            assert finite(trainer.network)
            after = trainer.network.state_dict()
            changed = any(not torch.equal(before[key], after[key]) for key, _ in trainer.network.named_parameters())
            overflowed = skipped_at_end([outputs]) == 1
            assert changed != overflowed, (kind, what)
            assert not overflowed or (device == "cuda" and kind != "random"), (kind, what)  # of float16
    outputs = trainer.train_step({"data": images()["random"], "target": targets()["one pixel"]})
    assert skipped_at_end([outputs]) == 0
    assert trainer._captured_pass.captured == (device == "cuda")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_no_weight(build, bad: float) -> None:
    trainer = build("nnUNetTrainerDermoMambaDiceCE")
    data, target = images()["random"], targets()["one pixel"]
    trainer.train_step({"data": data, "target": target})
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    loss = trainer.loss
    trainer.loss = lambda output, target: loss(output, target) * bad
    outputs = trainer.train_step({"data": data, "target": target})
    assert skipped_at_end([outputs]) == 1
    assert all(torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(moments[key]["exp_avg_sq"], after[key]["exp_avg_sq"]) for key in moments)
    trainer.loss = loss
    trainer.train_step({"data": data, "target": target})
    assert finite(trainer.network)
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["forward pass", "gradients"])
@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("name", ["nnUNetTrainerDermoMamba", "nnUNetTrainerDermoMambaDiceCE"])
def test_an_overflow_of_float16_costs_the_step_alone(build, name: str, captures: bool, where: str) -> None:
    trainer = build(name, "cuda")
    trainer.cuda_graph = captures
    data, target = images()["random"], targets()["one pixel"]
    for _ in range(WARM_UP + 2):
        trainer.train_step({"data": data, "target": target})
    assert trainer._captured_pass.captured is captures
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    moments = copy.deepcopy(trainer.optimizer.state_dict()["state"])
    scale = trainer.grad_scaler.get_scale()
    overflowing = data.clone()
    if where == "forward pass":
        overflowing[0, 0, 3, 4] = 1e6  # float16 ends at 65 504
    else:
        scale = 2.0**60
        trainer.grad_scaler.load_state_dict(trainer.grad_scaler.state_dict() | {"scale": scale})
    outputs = trainer.train_step({"data": overflowing, "target": target})
    assert skipped_at_end([outputs]) == 1
    assert trainer.grad_scaler.get_scale() == scale / 2
    assert all(torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))
    after = trainer.optimizer.state_dict()["state"]
    assert all(torch.equal(value, after[key][kind]) for key, one in moments.items() for kind, value in one.items())
    trainer.grad_scaler.load_state_dict(trainer.grad_scaler.state_dict() | {"scale": 1024.0})
    assert skipped_at_end([trainer.train_step({"data": data, "target": target})]) == 0
    assert not all(torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))
    trainer.running_statistics.repair()
    assert finite(trainer.network)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_broken_step_of_nnunets_own_network_changes_no_weight(build, bad: float) -> None:
    trainer = build("nnUNetTrainerGuideFusionLoss")
    trainer.guide_fusion_loss.parts = (torch.zeros(()), torch.zeros(()))
    factor = torch.ones(())
    trainer.loss = lambda outputs, target: sum(output.square().mean() for output in outputs) * factor
    batch = {"data": images()["random"], "target": [targets()["one pixel"]]}
    trainer.train_step(batch)
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    factor.fill_(bad)
    trainer.train_step(batch)
    assert all(torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))
    factor.fill_(1)
    trainer.train_step(batch)
    assert finite(trainer.network)
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.network.parameters(), strict=True))


def test_statistics_of_a_batch_that_overflowed_are_forgotten() -> None:
    network = SmallNetwork(3, 2)
    statistics = RunningStatistics(network)
    network(torch.randn(2, 3, 8, 8))
    statistics.repair()
    good = copy.deepcopy(network.state_dict())
    network(torch.full((2, 3, 8, 8), 1e30) * torch.randn(2, 3, 8, 8))
    assert not finite(network)
    statistics.repair()
    assert finite(network)
    assert torch.equal(good["encode.1.running_var"], network.state_dict()["encode.1.running_var"])
    network(torch.randn(2, 3, 8, 8))
    assert not torch.equal(network.state_dict()["encode.1.running_var"], good["encode.1.running_var"])


def test_statistics_are_repaired_before_anything_reads_them(small, monkeypatch) -> None:
    trainer = make(small)
    trainer.num_epochs = 1
    trainer.save_every = 1
    seen = []

    def spoil(batch):
        outputs = type(trainer).train_step(trainer, batch)
        trainer.network.encode[1].running_var.fill_(math.nan)
        return outputs

    def look(name):
        original = getattr(trainer, name)

        def method(*arguments):
            result = original(*arguments)
            seen.append((name, bool(torch.isfinite(trainer.network.encode[1].running_var).all())))
            return result

        return method

    monkeypatch.setattr(trainer, "train_step", spoil)
    for name in ("on_validation_epoch_start", "save_checkpoint"):
        monkeypatch.setattr(trainer, name, look(name))
    trainer.run_training()
    assert {name for name, _ in seen} == {"on_validation_epoch_start", "save_checkpoint"}
    assert all(is_finite for _, is_finite in seen)
    trainer.train_outputs = []
    trainer.network.encode[1].running_var.fill_(math.nan)
    trainer.save_progress()
    assert finite(trainer.network)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_case_with_nan_is_named(small, bad: float) -> None:
    spoil_image(small / DATASET / "nnUNetPlans_2d", "case_03", bad)
    trainer = make(small)
    with pytest.raises(NotFiniteError, match="in the image of case_03, as preprocessed"):
        trainer.run_training()
    assert finite(trainer.network)


def test_skipped_steps_are_counted_from_the_end() -> None:
    good = {"loss": torch.tensor(1.0), "loss_parts": torch.ones(2)}
    bad = {"loss": torch.tensor(1.0), "loss_parts": torch.tensor([1.0, math.nan])}
    assert skipped_at_end([]) == 0
    assert skipped_at_end([bad, good]) == 0
    assert skipped_at_end([good, bad, bad]) == 2
    assert skipped_at_end([bad, bad]) == 2
    assert skipped_at_end([{"loss": np.float32(1)}, {"loss": np.array(np.inf)}]) == 1


def test_steps_that_stay_not_finite_end_the_run(small, monkeypatch) -> None:
    monkeypatch.setattr(interruptible, "MOST_SKIPPED", 20)
    trainer = make(small)
    trainer.num_iterations_per_epoch = 50
    trainer.initialize()
    loss = trainer.loss
    trainer.loss = lambda output, target: loss(output, target) * (math.nan if trainer.iteration >= 15 else 1)
    with pytest.raises(NotFiniteError, match=r"last 20 steps, up to iteration 40 of epoch 0.*Lower the learning rate"):
        trainer.run_training()
    assert finite(trainer.network)


def break_loss(trainer: SmallTrainer, broken: Callable[[int], bool]) -> None:
    """Make the loss NaN in those of all steps, counted over epochs, that are named."""
    trainer.num_iterations_per_epoch = 40
    trainer.initialize()
    loss = trainer.loss

    def loss_or_nan(output, target):
        return loss(output, target) * (math.nan if broken(40 * trainer.current_epoch + trainer.iteration) else 1)

    trainer.loss = loss_or_nan


def test_steps_that_stay_not_finite_end_a_run_of_short_epochs(small) -> None:
    trainer = make(small)
    break_loss(trainer, lambda step: step >= 25)
    with pytest.raises(NotFiniteError, match=r"last 100 steps, up to iteration 40 of epoch 3"):
        trainer.run_training()


def test_a_finite_step_in_an_epoch_begins_the_count_again(small) -> None:
    trainer = make(small)
    break_loss(trainer, lambda step: step % 80 != 0)  # 79 in a row, 197 in five epochs
    trainer.num_epochs = 5
    trainer.run_training()
    assert trainer.current_epoch == 5


@pytest.mark.parametrize("moment", [(2, 10), (2, 40)])  # within an epoch, and in its validation
def test_count_of_steps_goes_on_where_a_run_was_interrupted(small, monkeypatch, moment: tuple[int, int]) -> None:
    def next_batch(self, loader, step):
        if (self.current_epoch, self.iteration) == moment:
            self.save_progress()
            raise InterruptedError
        return original(self, loader, step)

    original = SmallTrainer._next_batch
    first = make(small)
    break_loss(first, lambda step: step >= 25)
    with monkeypatch.context() as patch:
        patch.setattr(SmallTrainer, "_next_batch", next_batch)
        with pytest.raises(InterruptedError):
            first.run_training()
    second = make(small, continue_training=True)
    break_loss(second, lambda step: step >= 25)
    second.load_checkpoint(str(results(small) / "checkpoint_latest.pth"))
    with pytest.raises(NotFiniteError, match=r"up to iteration 40 of epoch 3"):
        second.run_training()


@pytest.mark.faults
@pytest.mark.parametrize("name", ["nnUNetTrainerDermoMamba", "nnUNetTrainerDermoMambaDiceCE"])
@pytest.mark.parametrize("scale", [1.0, 1e15])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_ten_thousand_steps_at_extremes(build, name: str, scale: float, device: str) -> None:
    """Half of the steps for each loss, and half of them on images that may overflow."""
    trainer = build(name, device)
    generator = torch.Generator().manual_seed(1)
    rng = np.random.default_rng(1)
    labels = list(targets().values())
    start = copy.deepcopy(trainer.network.state_dict())
    scaler = None if trainer.grad_scaler is None else trainer.grad_scaler.state_dict()
    skipped = 0
    for step in range(STEPS // 4):
        if step % 250 == 0:  # weights that a huge rate has carried away would skip all further steps
            trainer.network.load_state_dict(start)
            if scaler is not None:
                trainer.grad_scaler.load_state_dict(scaler)
            trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
            trainer.lr_scheduler.initial_lr = 10.0 ** rng.uniform(-8, 8)
        data = torch.randn(2, 3, 32, 40, generator=generator) * scale ** rng.uniform(-2, 2)
        trainer.train_outputs = [trainer.train_step({"data": data, "target": labels[rng.integers(len(labels))]})]
        trainer.iteration = step % 250
        trainer._look_after_numbers()
        skipped += skipped_at_end(trainer.train_outputs)
        if not step % 10:
            assert finite(trainer.network), json.dumps({"step": step, "rate": trainer.lr_scheduler.initial_lr})
    trainer.running_statistics.repair()
    assert finite(trainer.network)
    assert skipped < STEPS // 4
    assert scale == 1 or skipped > 0
