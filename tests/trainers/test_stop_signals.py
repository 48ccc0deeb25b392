"""SIGTERM and SIGINT in a training, alone and with nnU-Net's worker processes."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_training
import torch
from preprocessed_dataset import DATASET, spoil_image
from processes import left, living
from small_training import SmallTrainer, make, results

from nnunetv2_dermomamba.trainers.stop_signals import INTERRUPTED, STOPPED, StopRequest, stopping_at_once


@pytest.fixture
def heeding():
    """A shell starts background jobs, such as a CI run, with interrupts ignored; put the default back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGINT, "train_step"),
        *((signal.SIGTERM, moment) for moment in ("train_step", "validation_step", "on_train_start", "on_train_end")),
    ],
)
def test_stops_after_the_step_and_goes_on(small, heeding, monkeypatch, tmp_path, number, moment) -> None:
    def signalled(self, *arguments):
        if self.current_epoch in (1, self.num_epochs) or moment == "on_train_start":
            os.kill(os.getpid(), number)
        return original(self, *arguments)

    monkeypatch.setattr(SmallTrainer, "epochs", 3)
    original = getattr(SmallTrainer, moment)
    with monkeypatch.context() as patch:
        patch.setattr(SmallTrainer, moment, signalled)
        with pytest.raises(SystemExit) as stopped:
            make(small).run_training()
    assert stopped.value.code == STOPPED == 75
    assert signal.getsignal(number) is (signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
    log = "".join(file.read_text() for file in results(small).glob("training_log*"))
    assert f"Stopped by {number.name}" in log
    if moment == "on_train_end":
        assert "The training is complete" in log
    else:
        latest = torch.load(results(small) / "checkpoint_latest.pth", weights_only=False)
        expected = {"train_step": (1, 1), "validation_step": (1, 8), "on_train_start": (0, 0)}
        assert (latest["current_epoch"], latest["iteration"]) == expected[moment]
    small_training.train(small, continue_training=True)
    resumed = torch.load(results(small) / "checkpoint_final.pth", weights_only=False)
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "straight"))
    small_training.train(small, continue_training=False)
    straight = torch.load(results(tmp_path / "straight") / "checkpoint_final.pth", weights_only=False)
    for name, value in straight["network_weights"].items():
        assert torch.equal(value, resumed["network_weights"][name])
    assert resumed["logging"]["val_losses"] == straight["logging"]["val_losses"]


def test_without_checkpoints_a_stop_says_that_nothing_is_saved(small, heeding, monkeypatch) -> None:
    trainer = make(small)
    trainer.disable_checkpointing = True
    monkeypatch.setattr(trainer, "train_step", lambda batch: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        trainer.run_training()
    log = "".join(file.read_text() for file in results(small).glob("training_log*"))
    assert "Stopped by SIGTERM. Left after iteration" in log
    assert "nothing is saved" in log
    assert "--c" not in log.rpartition("Stopped by")[2]
    assert not list(results(small).glob("*.pth"))


@pytest.mark.gpu
def test_stops_between_replays_of_a_cuda_graph_and_goes_on(small, heeding, monkeypatch, tmp_path) -> None:
    def signalled(self, batch):
        outputs = original(self, batch)
        replayed.append(self._captured_pass.captured)
        if (self.current_epoch, self.iteration) == (1, 4):
            os.kill(os.getpid(), signal.SIGTERM)
        return outputs

    monkeypatch.setenv("nnUNet_compile", "f")
    monkeypatch.setattr(SmallTrainer, "epochs", 3)
    original, replayed = SmallTrainer.train_step, []
    with monkeypatch.context() as patch:
        patch.setattr(SmallTrainer, "train_step", signalled)
        with pytest.raises(SystemExit) as stopped:
            small_training.train(small, continue_training=False, device="cuda")
    assert stopped.value.code == STOPPED
    assert len(replayed) == 8 + 5
    assert replayed[-8:] == [True] * 8
    latest = torch.load(results(small) / "checkpoint_latest.pth", map_location="cpu", weights_only=False)
    assert (latest["current_epoch"], latest["iteration"]) == (1, 5)
    small_training.train(small, continue_training=True, device="cuda")
    resumed = torch.load(results(small) / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    assert all(torch.isfinite(value).all() for value in resumed["network_weights"].values())
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "straight"))
    small_training.train(small, continue_training=False, device="cuda")
    straight = torch.load(results(tmp_path / "straight") / "checkpoint_final.pth", weights_only=False)
    for name in ("train_losses", "val_losses"):  # alike only: a GPU adds up in any order
        assert resumed["logging"][name] == pytest.approx(straight["logging"][name], rel=0.05, abs=0.03)


def test_an_ignored_signal_stays_ignored(heeding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    request.install()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.received is None
    finally:
        request.restore()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def run_in_child(body, *numbers: int, pause: float = 0.3) -> int:
    """Exit code of a forked process that runs a function and is sent signals."""
    process = os.fork()
    if not process:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            body()
        finally:
            os._exit(0)
    for number in numbers:
        time.sleep(pause)
        os.kill(process, number)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_second_interrupt_stops_at_once() -> None:
    def deaf():
        StopRequest().install()
        end = time.monotonic() + 20
        while time.monotonic() < end:
            time.sleep(0.01)

    assert run_in_child(deaf, signal.SIGINT, signal.SIGINT) == INTERRUPTED


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_at_once_although_the_main_thread_waits(number) -> None:
    def waiting():
        with stopping_at_once("stopped"):
            subprocess.run(["sleep", "20"], start_new_session=True)

    assert run_in_child(waiting, number) == STOPPED


def test_nothing_is_changed_after_stopping_at_once(heeding) -> None:
    with stopping_at_once("stopped"):
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_the_first_pool_does_not_unblock_the_signal() -> None:
    """Starting Python's resource tracker does, and then each worker prints a stack trace at Ctrl-C."""
    script = """
import multiprocessing, signal
from nnunetv2_dermomamba.trainers.stop_signals import stopping_at_once
with stopping_at_once("stopped"):
    multiprocessing.get_context("spawn").Lock()
    assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
"""
    prepare = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    subprocess.run([sys.executable, "-c", script], check=True, preexec_fn=prepare)


class Run:
    """A training with two worker processes, in a process group of its own as a terminal and a cluster make it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.output = folder / "output.txt"
        self.log = results(folder)
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, small_training.__file__, str(folder), *arguments],
                env={**os.environ, "nnUNet_n_proc_DA": "2", "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
            )

    def wait_for(self, text: str) -> None:
        end = time.monotonic() + 120
        while text not in self.output.read_text():
            assert self.process.poll() is None, self.output.read_text()[-2000:]
            assert time.monotonic() < end
            time.sleep(0.1)

    def workers(self) -> list[int]:
        return [process for process in living(self.process.pid) if process != self.process.pid]


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_whole_group_is_signalled(small, number) -> None:
    run = Run(small, "--epochs", "1000")
    run.wait_for("Epoch 3\n")
    assert len(run.workers()) >= 3  # two for training, one for validation
    os.killpg(run.process.pid, number)
    assert run.process.wait(30) == STOPPED
    output = run.output.read_text()
    assert f"Stopped by {number.name}. Saved after iteration" in output
    assert "Traceback" not in output
    assert "Exception" not in output
    assert left(run.process.pid) == []
    resumed = Run(small, "--epochs", "5", "--c")
    assert resumed.process.wait(120) == 0, resumed.output.read_text()[-2000:]
    assert "Epoch 0\n" not in resumed.output.read_text()


@pytest.mark.faults
def test_no_worker_outlives_a_failure(small) -> None:
    for number in range(7):
        spoil_image(small / DATASET / "nnUNetPlans_2d", f"case_{number:02d}", math.nan)
    run = Run(small)
    assert run.process.wait(120) == 1
    assert "NotFiniteError: NaN or infinite values in the image of case_0" in run.output.read_text()
    assert left(run.process.pid) == []


@pytest.mark.faults
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone signals a parent's death")
def test_no_worker_outlives_a_kill(small) -> None:
    run = Run(small, "--epochs", "1000")
    run.wait_for("Epoch 1\n")
    assert len(run.workers()) >= 3
    run.process.kill()
    run.process.wait()
    assert left(run.process.pid) == []


@pytest.mark.faults
def test_group_interrupted_twice(small) -> None:
    run = Run(small, "--epochs", "1000")
    run.wait_for("Epoch 1\n")
    for _ in range(50):  # more than one, so that two come within a step
        os.killpg(run.process.pid, signal.SIGINT)
    assert run.process.wait(30) in (INTERRUPTED, STOPPED)
    assert "Traceback" not in run.output.read_text()
    assert left(run.process.pid) == []
