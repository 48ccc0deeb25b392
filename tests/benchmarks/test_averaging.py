"""The average of the weights, in a training that takes seconds."""

import copy

import pytest
import torch
from averaging import AveragedWeightsMixin, ramped_average
from small_training import SmallTrainer, make, results

from nnunetv2_dermomamba.trainers.interruptible import REPAIR_INTERVAL

DECAY = 0.99


class AveragedTrainer(AveragedWeightsMixin, SmallTrainer):
    """Two epochs of 24 steps."""

    ema_decay = DECAY

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch = 2, 24
        super().initialize()


def floats(state: dict) -> dict:
    return {name: value.double() for name, value in state.items() if value.is_floating_point()}


def test_ramp() -> None:
    values = []
    for n in (1, 100, 10_000):
        average = [torch.zeros(1)]
        ramped_average(0.95)(average, [torch.ones(1)], torch.tensor(n))
        values.append(float(average[0]))
    assert values == pytest.approx([1 - 2 / 11, 1 - 101 / 110, 0.05], rel=1e-5)


def test_average_is_of_weights_and_statistics_every_ten_steps(small, monkeypatch) -> None:
    taken = []

    def average(self):
        taken.append(floats(copy.deepcopy(self.plain_network().state_dict())))
        original(self)

    original = AveragedTrainer._average
    monkeypatch.setattr(AveragedTrainer, "_average", average)
    trainer = make(small, kind=AveragedTrainer)
    trainer.run_training()
    assert len(taken) == 2 * (24 // REPAIR_INTERVAL + 1)
    expected = taken[0]
    for n, state in enumerate(taken[1:], 1):
        decay = min(DECAY**REPAIR_INTERVAL, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in state}
    final = results(small, AveragedTrainer) / "checkpoint_final.pth"
    saved = torch.load(final, weights_only=False)["network_weights"]
    for name, value in floats(saved).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    assert any("running_mean" in name for name in expected)
    inference = trainer.inference_network().state_dict()
    assert all(torch.equal(inference[name], value) for name, value in saved.items())


@pytest.mark.parametrize("captures", [False, True])
def test_validation_is_of_the_average(small, monkeypatch, captures) -> None:
    trainer = make(small, kind=AveragedTrainer)
    trainer.on_train_start()
    monkeypatch.setattr(trainer, "_captures", lambda: captures)
    seen = []
    trainer.averaged.module.register_forward_hook(lambda *_: seen.append("average"))
    trainer.network.register_forward_hook(lambda *_: seen.append("trained"))
    trained = trainer.network
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        trainer.validation_step(next(trainer.dataloader_val))
    assert seen == ["average"]
    assert trainer.network is trained
    assert not trainer.averaged.module.training
