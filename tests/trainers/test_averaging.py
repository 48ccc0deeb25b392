"""The average of the weights, in a training that takes seconds."""

import copy

import pytest
import torch
from small_training import SmallTrainer, make, results

from nnunetv2_dermomamba.trainers.averaging import ramped_average
from nnunetv2_dermomamba.trainers.interruptible import REPAIR_INTERVAL

DECAY = 0.99


@pytest.fixture
def averaging(small, monkeypatch):
    """Folder of a training of two epochs of 24 steps that averages its weights."""
    original = SmallTrainer.initialize

    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch = 2, 24
        original(self)

    monkeypatch.setattr(SmallTrainer, "initialize", initialize)
    monkeypatch.setattr(SmallTrainer, "ema_decay", DECAY)
    return small


def final(folder) -> dict:
    return torch.load(results(folder) / "checkpoint_final.pth", weights_only=False)


def floats(state: dict) -> dict:
    return {name: value.double() for name, value in state.items() if value.is_floating_point()}


def test_ramp() -> None:
    values = []
    for n in (1, 100, 10_000):
        average = [torch.zeros(1)]
        ramped_average(0.95)(average, [torch.ones(1)], torch.tensor(n))
        values.append(float(average[0]))
    assert values == pytest.approx([1 - 2 / 11, 1 - 101 / 110, 0.05], rel=1e-5)


def test_average_is_of_weights_and_statistics_every_ten_steps(averaging, monkeypatch) -> None:
    taken = []

    def average(self):
        taken.append(floats(copy.deepcopy(self.plain_network().state_dict())))
        original(self)

    original = SmallTrainer._average
    monkeypatch.setattr(SmallTrainer, "_average", average)
    trainer = make(averaging)
    trainer.run_training()
    assert len(taken) == 2 * (24 // REPAIR_INTERVAL + 1)
    expected = taken[0]
    for n, state in enumerate(taken[1:], 1):
        decay = min(DECAY**REPAIR_INTERVAL, (1 + n) / (10 + n))
        expected = {name: decay * expected[name] + (1 - decay) * state[name] for name in state}
    checkpoint = final(averaging)
    for name, value in floats(checkpoint["network_weights"]).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)
    for name, value in floats(checkpoint["trained_weights"]).items():
        assert torch.equal(value, taken[-1][name])
    assert any("running_mean" in name for name in expected)
    inference = trainer.inference_network().state_dict()
    assert all(torch.equal(inference[name], value) for name, value in checkpoint["network_weights"].items())


def test_validation_is_of_the_average(averaging) -> None:
    trainer = make(averaging)
    trainer.on_train_start()
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


def test_resumed_run_ends_with_the_same_weights(averaging, monkeypatch) -> None:
    make(averaging).run_training()
    whole = final(averaging)

    def step(self, batch):
        if (self.current_epoch, self.iteration) == (1, 13):
            self.save_progress()
            raise InterruptedError
        return original(self, batch)

    original = SmallTrainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(SmallTrainer, "train_step", step)
        with pytest.raises(InterruptedError):
            make(averaging).run_training()
    resumed = make(averaging, continue_training=True)
    resumed.load_checkpoint(str(results(averaging) / "checkpoint_latest.pth"))
    resumed.run_training()
    again = final(averaging)
    for weights in ("network_weights", "trained_weights"):
        assert all(torch.equal(value, again[weights][name]) for name, value in whole[weights].items())
    assert again["average_updates"] == whole["average_updates"]


def test_off_by_default(small) -> None:
    trainer = make(small)
    trainer.on_train_start()
    assert trainer.averaged is None
    assert trainer.inference_network() is trainer.network
    assert "trained_weights" not in trainer._checkpoint(within_epoch=True)
