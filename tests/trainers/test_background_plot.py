"""progress.png is drawn beside the training."""

from __future__ import annotations

from pathlib import Path
from threading import Event

import pytest
import small_training


@pytest.fixture
def trainer(small, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = small_training.make(small)
    trainer.num_epochs = 3
    return trainer


def test_training_does_not_wait_for_the_plot_and_draws_every_epoch_s_one_after_the_other(trainer) -> None:
    trains = [Event() for _ in range(trainer.num_epochs + 1)]
    trains[-1].set()  # the last epoch has none behind it
    at_work, drawn = [], []

    def draw(folder: str) -> None:
        at_work.append(folder)
        assert len(at_work) == 1
        assert trains[len(drawn) + 1].wait(60)
        drawn.append(at_work.pop())

    step = trainer.train_step

    def train_step(batch: dict) -> dict:
        trains[trainer.current_epoch].set()
        return step(batch)

    trainer.logger.plot_progress_png, trainer.train_step = draw, train_step
    trainer.run_training()
    assert drawn == [trainer.output_folder] * trainer.num_epochs


def test_a_plot_that_cannot_be_written_is_told_in_the_log(trainer) -> None:
    def draw(folder: str) -> None:
        raise OSError("no space left")

    trainer.logger.plot_progress_png = draw
    trainer.run_training()
    assert "progress.png was not written: no space left" in Path(trainer.log_file).read_text()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()
