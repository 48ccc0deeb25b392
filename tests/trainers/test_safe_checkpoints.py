import json
import os
import resource
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import small_training
import torch
from small_training import SmallTrainer, make, results

from nnunetv2_dermomamba.network import dermomamba
from nnunetv2_dermomamba.predict.model import load_checkpoint
from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMamba, safe_checkpoints
from nnunetv2_dermomamba.trainers.checkpoint_files import CheckpointError, write_checkpoint


class Breaking:
    """Fails when half of the file is written."""

    def __reduce__(self):
        raise KeyboardInterrupt


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def log_of(folder: Path) -> str:
    return "".join(file.read_text() for file in sorted(results(folder).glob("training_log*.txt")))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=False)["network_weights"]


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def interrupted(small, monkeypatch):
    """A run that was saved within epochs 0 and 1, and ended in the latter."""

    def step(self, batch):
        if (self.current_epoch, self.iteration) in ((0, 5), (1, 2)):
            self.save_progress()
        if (self.current_epoch, self.iteration) == (1, 4):
            raise InterruptedError
        return original(self, batch)

    original = SmallTrainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(SmallTrainer, "train_step", step)
        with pytest.raises(InterruptedError):
            make(small).run_training()
    (results(small) / "checkpoint_best.pth").unlink()
    return small


def test_earlier_file_outlives_a_failing_write(tmp_path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"step": 1}, path)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint({"weights": torch.zeros(1000), "then": Breaking()}, path)
    assert torch.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_earlier_file_outlives_a_full_disk(tmp_path) -> None:
    path = tmp_path / "checkpoint.pth"
    write_checkpoint({"step": 1}, path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))  # Python ignores the signal, so writing fails
    try:
        with pytest.raises(OSError, match=r"[Tt]oo large|cannot be written"):
            write_checkpoint({"weights": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert torch.load(path) == {"step": 1}
    assert os.listdir(tmp_path) == ["checkpoint.pth"]


def test_training_goes_on_where_a_timely_checkpoint_cannot_be_written(small, monkeypatch) -> None:
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safe_checkpoints, "SAVE_INTERVAL", 0)
    trainer = make(small)
    trainer.initialize()
    trainer.save_progress()
    before = weights(results(small) / "checkpoint_latest.pth")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        trainer.save_duration = 0
        trainer.save_progress_if_due()
        with pytest.raises(OSError, match="No space left"):
            trainer.save_checkpoint(str(results(small) / "checkpoint_best.pth"))
    assert "no checkpoint written: [Errno 28] No space left on device" in log_of(small)
    assert same(weights(results(small) / "checkpoint_latest.pth"), before)


def test_one_checkpoint_in_two_minutes_and_at_most_one_percent_of_the_time(small, monkeypatch) -> None:
    clock = Clock()
    monkeypatch.setattr(safe_checkpoints, "time", clock)
    trainer = make(small)
    trainer.initialize()
    saved = []

    def write(duration):
        def save(checkpoint, path, keep):
            saved.append(clock.now)
            clock.now += duration

        return save

    for duration in (0.5, 3.0):
        monkeypatch.setattr(safe_checkpoints, "write_checkpoint", write(duration))
        for _ in range(2000):
            clock.now += 1
            trainer.save_progress_if_due()
    gaps = [second - first for first, second in pairwise(saved)]
    assert set(gaps[:15]) == {120.5}
    assert gaps[-1] == 303
    fast = [gap for gap in gaps if gap < 200]
    assert 0.5 / min(fast) < 0.01


@pytest.mark.faults
def test_saving_as_often_as_allowed_takes_one_percent_of_a_training(small, monkeypatch) -> None:
    """Measured: every write may only come when a hundred times its duration has gone by."""
    durations = []

    def save(self, *arguments, **options):
        start = time.perf_counter()
        original(self, *arguments, **options)
        durations.append(time.perf_counter() - start)

    original = SmallTrainer._save
    monkeypatch.setattr(safe_checkpoints, "SAVE_INTERVAL", 0)
    monkeypatch.setattr(SmallTrainer, "_save", save)
    monkeypatch.setattr(SmallTrainer, "epochs", 10_000)
    monkeypatch.setattr(SmallTrainer, "save_checkpoint", lambda self, path: None)  # nnU-Net's, of each best epoch
    original_step, start = SmallTrainer.train_step, time.perf_counter()

    def step(self, batch):
        if len(durations) == 4:
            raise InterruptedError
        return original_step(self, batch)

    monkeypatch.setattr(SmallTrainer, "train_step", step)
    with pytest.raises(InterruptedError):
        make(small).run_training()
    share = sum(durations[:-1]) / (time.perf_counter() - start)
    print(f"{share:.2%} of the time went into {len(durations) - 1} checkpoints of {max(durations):.3f} s at most")
    assert share <= 0.01


def test_saved_within_an_epoch_and_read_by_others(interrupted) -> None:
    path = results(interrupted) / "checkpoint_latest.pth"
    checkpoint = load_checkpoint(path.read_bytes(), path.name)  # what `dermomamba predict` accepts unasked
    assert (checkpoint["current_epoch"], checkpoint["iteration"]) == (1, 2)
    assert len(checkpoint["train_outputs"]["loss"]) == 2
    assert {len(values) for values in checkpoint["logging"].values()} == {1}


def test_resumed_run_ends_as_an_uninterrupted_one(interrupted, monkeypatch, tmp_path) -> None:
    small_training.train(interrupted, continue_training=True)
    resumed = torch.load(results(interrupted) / "checkpoint_final.pth", weights_only=False)
    assert log_of(interrupted).count(": Epoch 0") == 1
    assert not list(results(interrupted).glob("*latest*")) + list(results(interrupted).glob("*previous*"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "again"))
    small_training.train(interrupted, continue_training=False)
    straight = torch.load(results(tmp_path / "again") / "checkpoint_final.pth", weights_only=False)
    assert same(resumed["network_weights"], straight["network_weights"])
    for name in ("train_losses", "val_losses", "mean_fg_dice", "lrs"):
        assert resumed["logging"][name] == straight["logging"][name]
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "other"))
    monkeypatch.setenv("DERMOMAMBA_SEED", "6")
    small_training.train(interrupted, continue_training=False)
    assert not same(weights(results(tmp_path / "other") / "checkpoint_final.pth"), straight["network_weights"])


def test_checkpoint_from_before_skipped_steps_were_in_it_is_gone_on_from(interrupted) -> None:
    path = results(interrupted) / "checkpoint_latest.pth"
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint["skipped_before"]
    write_checkpoint(checkpoint, path)
    trainer = make(interrupted, continue_training=True)
    trainer.load_checkpoint(str(path))
    assert (trainer.current_epoch, trainer.iteration, trainer.skipped_before) == (1, 2, 0)


def test_resumed_run_of_the_real_network_ends_as_an_uninterrupted_one(small, monkeypatch, tmp_path) -> None:
    """Narrow; stopped within the second epoch, behind a validation."""

    class Stopped(nnUNetTrainerDermoMamba):
        stops = True

        def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 3, 1
            self.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch

        def train_step(self, batch):
            if self.stops and (self.current_epoch, self.iteration) == (1, 1):
                self.save_progress()
                raise InterruptedError
            return super().train_step(batch)

    def trained(folder: Path, continues: bool = False) -> dict[str, torch.Tensor]:
        monkeypatch.setenv("nnUNet_results", str(folder))
        plans, dataset = (json.loads((small / name).read_text()) for name in ("plans.json", "dataset.json"))
        trainer = Stopped({**plans, "continue_training": continues}, "2d", 0, dataset)
        small_training.maybe_load_checkpoint(trainer, continues, False)
        trainer.run_training()
        return trainer.network.state_dict()

    monkeypatch.setattr(dermomamba, "WIDTHS", (4, 8))
    monkeypatch.setattr(dermomamba, "STRIDE", 4)
    with pytest.raises(InterruptedError):
        trained(tmp_path / "stopped")
    monkeypatch.setattr(Stopped, "stops", False)
    assert same(trained(tmp_path / "stopped", continues=True), trained(tmp_path / "straight"))


def test_moments_saved_for_another_layout_of_the_weights_are_taken_over(interrupted) -> None:
    path = results(interrupted) / "checkpoint_latest.pth"
    batch = {"data": torch.rand(2, 3, 32, 40), "target": torch.ones(2, 1, 32, 40)}

    def weights_after_a_step() -> dict[str, torch.Tensor]:
        trainer = make(interrupted, continue_training=True)
        small_training.maybe_load_checkpoint(trainer, True, False)
        torch.manual_seed(0)  # of the dropout
        trainer.train_step(batch)
        return trainer.network.state_dict()

    expected = weights_after_a_step()
    checkpoint = torch.load(path, weights_only=False)
    for moments in checkpoint["optimizer_state"]["state"].values():
        for name, moment in moments.items():
            if moment.ndim == 4:
                moments[name] = moment.to(memory_format=torch.channels_last)
    torch.save(checkpoint, path)
    assert same(weights_after_a_step(), expected)


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    checkpoint = torch.load(path, weights_only=False)
    path.unlink()  # the kept file is a hard link
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("<html>404</html>")
    elif how == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :])
    elif how == "list":
        torch.save([1, 2], path)
    elif how == "other program":
        torch.save({"state_dict": {}}, path)
    elif how == "other network":
        checkpoint["network_weights"]["encode.0.weight"] = torch.zeros(4, 3, 3, 3)
        torch.save(checkpoint, path)
    elif how == "not finite":
        checkpoint["network_weights"]["encode.0.weight"][0] = torch.nan
        torch.save(checkpoint, path)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("truncated", "it is damaged"),
        ("empty", "it is damaged"),
        ("text", "it is damaged"),
        ("flipped", "it is damaged"),
        ("list", "it is no checkpoint of nnU-Net"),
        ("other program", "it is no checkpoint of nnU-Net"),
        ("other network", "it is of another network (1 weights differ, such as 'encode.0.weight')"),
        ("not finite", "its weights are not finite, such as 'encode.0.weight'"),
    ],
)
def test_damaged_checkpoint_is_passed_over(interrupted, how: str, reason: str) -> None:
    folder = results(interrupted)
    spoil(folder / "checkpoint_latest.pth", how)
    trainer = make(interrupted, continue_training=True)
    small_training.maybe_load_checkpoint(trainer, True, False)
    assert (trainer.current_epoch, trainer.iteration) == (0, 5)
    assert same(trainer.network.state_dict(), weights(folder / "checkpoint_previous.pth"))
    log = log_of(interrupted)
    assert f"{folder / 'checkpoint_latest.pth'} cannot be used: {reason}" in log
    assert f"{folder / 'checkpoint_previous.pth'} (epoch 0, iteration 5)" in log


def test_the_furthest_good_checkpoint_is_taken(interrupted) -> None:
    folder = results(interrupted)
    checkpoint = torch.load(folder / "checkpoint_latest.pth", weights_only=False)
    torch.save(checkpoint, folder / "checkpoint_best.pth")
    (folder / "checkpoint_final.pth").write_bytes(b"")
    spoil(folder / "checkpoint_latest.pth", "truncated")
    trainer = make(interrupted, continue_training=True)
    small_training.maybe_load_checkpoint(trainer, True, False)
    assert (trainer.current_epoch, trainer.iteration) == (1, 2)


def test_no_good_checkpoint_is_a_clear_error(interrupted) -> None:
    for name in ("latest", "previous"):
        spoil(results(interrupted) / f"checkpoint_{name}.pth", "truncated")
    trainer = make(interrupted, continue_training=True)
    with pytest.raises(CheckpointError, match=r"(?s)latest.*previous.*Train again without --c"):
        small_training.maybe_load_checkpoint(trainer, True, False)


def test_validation_takes_no_other_checkpoint_than_asked_for(interrupted) -> None:
    spoil(results(interrupted) / "checkpoint_latest.pth", "truncated")
    trainer = make(interrupted)
    with pytest.raises(CheckpointError, match="No checkpoint can be used"):
        trainer.load_checkpoint(str(results(interrupted) / "checkpoint_latest.pth"))


@pytest.mark.faults
def test_killed_fifty_times_it_ends_as_if_it_had_not_been(small, monkeypatch, tmp_path) -> None:
    script = [sys.executable, small_training.__file__, str(small), "--epochs", "60"]
    killing = [*script, "--interval", "0", "--share", "1e9", "--kills", "50"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    done = subprocess.run(killing, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    output = (small / "output.txt").read_text()
    assert report["status"] == 0, output[-2000:]
    assert report["hits"] >= 5  # kills during a write
    assert "FAILED" not in output
    assert "cannot be used" not in output
    resumed = weights(results(small) / "checkpoint_final.pth")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "straight"))
    subprocess.run(script, check=True, capture_output=True)
    assert same(resumed, weights(results(tmp_path / "straight") / "checkpoint_final.pth"))
