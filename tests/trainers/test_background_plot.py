"""progress.png is drawn beside the training."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import small_training

from nnunetv2_dermomamba.trainers import background_plot
from nnunetv2_dermomamba.trainers.stop_signals import STOPPED

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="nnU-Net draws")


@pytest.fixture
def trainer(small, monkeypatch):
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    trainer = small_training.make(small)
    trainer.num_epochs = 3
    return trainer


def log(trainer) -> str:
    return Path(trainer.log_file).read_text()


def test_training_does_not_wait_for_the_plot(trainer, tmp_path) -> None:
    next_trains = multiprocessing.get_context("fork").Event()
    drawn = tmp_path / "drawn.txt"

    def draw(folder: str) -> None:
        if trainer.current_epoch == 0:
            assert next_trains.wait(60)
        with open(drawn, "a") as file:
            print(trainer.current_epoch, file=file)

    step = trainer.train_step

    def train_step(batch: dict) -> dict:
        if trainer.current_epoch == 1:
            next_trains.set()
            trainer._drawing.join()  # or the second epoch's drawing might be left out
        return step(batch)

    trainer.num_epochs = 2
    trainer.logger.plot_progress_png, trainer.train_step = draw, train_step
    trainer.run_training()
    assert drawn.read_text().split() == ["0", "1"]
    assert "WARNING: progress.png" not in log(trainer)


def test_a_drawing_that_goes_on_is_the_only_one(trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(background_plot, "LAST_PATIENCE", 0.1)
    begun = tmp_path / "begun.txt"

    def draw(folder: str) -> None:
        with open(begun, "a") as file:
            print(trainer.current_epoch, file=file)
        time.sleep(600)

    trainer.logger.plot_progress_png = draw
    start = time.monotonic()
    trainer.run_training()
    assert time.monotonic() - start < 60
    assert begun.read_text().split() == ["0"]
    assert "draws progress.png ended with code -9" in log(trainer)
    assert not multiprocessing.active_children()


def test_a_drawing_that_had_its_time_makes_way_for_the_next(trainer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(background_plot, "PATIENCE", 0.0)
    trainer.num_epochs = 2

    def draw(folder: str) -> None:
        (tmp_path / str(trainer.current_epoch)).touch()
        time.sleep(600 if trainer.current_epoch == 0 else 0)

    trainer.logger.plot_progress_png = draw
    trainer.run_training()
    assert (tmp_path / "1").exists()
    assert log(trainer).count("ended with code -9") == 1


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (OSError("no space left"), "progress.png was not drawn: OSError('no space left')"),
        (ValueError("of Matplotlib"), "progress.png was not drawn: ValueError('of Matplotlib')"),
        (None, "draws progress.png ended with code -11"),
    ],
)
def test_a_plot_that_fails_is_told_in_the_log(trainer, problem, told) -> None:
    def draw(folder: str) -> None:
        if problem is None:
            os.kill(os.getpid(), signal.SIGSEGV)
        raise problem

    trainer.num_epochs = 1
    trainer.logger.plot_progress_png = draw
    trainer.run_training()
    assert told in log(trainer)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()


def test_without_a_process_training_goes_on(trainer, monkeypatch) -> None:
    def fork() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    trainer.num_epochs = 1
    monkeypatch.setattr(os, "fork", fork)
    trainer.run_training()
    assert "no process for it" in log(trainer)
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").exists()


def test_a_run_that_is_stopped_leaves_no_drawing(trainer, monkeypatch) -> None:
    monkeypatch.setattr(background_plot, "LAST_PATIENCE", 0.1)
    step = trainer.train_step

    def train_step(batch: dict) -> dict:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(batch)

    trainer.logger.plot_progress_png, trainer.train_step = lambda folder: time.sleep(600), train_step
    with pytest.raises(SystemExit, match=str(STOPPED)):
        trainer.run_training()
    assert not multiprocessing.active_children()


def test_nnunets_own_plot_is_there_when_the_training_ends(trainer) -> None:
    trainer.num_epochs = 1
    del trainer.logger.plot_progress_png  # the small trainer's, which draws nothing
    trainer.run_training()
    folder = Path(trainer.output_folder)
    assert (folder / "progress.png").stat().st_size > 10_000
    assert not (folder / ".progress.partial").exists()
