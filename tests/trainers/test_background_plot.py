"""progress.png is drawn beside the training."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import small_training

from nnunetv2_dermomamba.trainers import background_plot

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nnU-Net draws")


@pytest.fixture
def trainer(small, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = small_training.make(small)
    trainer.num_epochs = 3
    return trainer


def log(trainer) -> str:
    return Path(trainer.log_file).read_text()


def test_training_does_not_wait_for_the_plot_and_draws_every_epoch_s_one_after_the_other(trainer, tmp_path) -> None:
    trains = [multiprocessing.get_context("fork").Event() for _ in range(trainer.num_epochs + 1)]
    trains[-1].set()  # the last epoch has none behind it
    drawn = tmp_path / "drawn.txt"

    def draw(folder: str) -> None:
        epoch = trainer.current_epoch
        with open(drawn, "a") as file:
            print("begin", epoch, file=file, flush=True)
            assert trains[epoch + 1].wait(60)
            print("end", epoch, folder, file=file)

    step = trainer.train_step

    def train_step(batch: dict) -> dict:
        trains[trainer.current_epoch].set()
        return step(batch)

    trainer.logger.plot_progress_png, trainer.train_step = draw, train_step
    trainer.run_training()
    expected = [line for epoch in range(3) for line in (f"begin {epoch}", f"end {epoch} {trainer.output_folder}")]
    assert drawn.read_text().splitlines() == expected


def test_a_plot_that_cannot_be_written_is_told_in_the_log(trainer) -> None:
    def draw(folder: str) -> None:
        raise OSError("no space left")

    trainer.logger.plot_progress_png = draw
    trainer.run_training()
    assert "progress.png was not written: no space left" in log(trainer)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()


def test_a_plot_that_never_ends_holds_nothing_up(trainer, monkeypatch) -> None:
    monkeypatch.setattr(background_plot, "PATIENCE", 0.1)
    trainer.num_epochs = 1
    trainer.logger.plot_progress_png = lambda folder: time.sleep(600)
    trainer.run_training()
    assert "progress.png was not drawn within" in log(trainer)
    assert not multiprocessing.active_children()


def test_nnunets_own_plot_is_there_when_the_training_ends(trainer) -> None:
    trainer.num_epochs = 1
    del trainer.logger.plot_progress_png  # the small trainer's, which draws nothing
    trainer.run_training()
    assert (Path(trainer.output_folder) / "progress.png").stat().st_size > 10_000
