"""A training that takes seconds: our trainer with a small network, on the data set of preprocessed_dataset.py.

As a script it trains as ``nnUNetv2_train`` does, or kills such trainings: processes forked from one that has imported
PyTorch start in milliseconds.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from torch import nn

from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMambaDiceCE, safe_checkpoints


class SmallNetwork(nn.Module):
    """Convolutions and BatchNorm; a million further weights make its checkpoints take as long to write as steps do."""

    def __init__(self, input_channels: int, num_classes: int) -> None:
        super().__init__()
        self.encode = nn.Sequential(
            nn.Conv2d(input_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.gate = nn.Sequential(nn.Linear(8, 60_000), nn.Dropout(0.1), nn.ReLU(), nn.Linear(60_000, 8), nn.Sigmoid())
        self.decode = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, num_classes, 3, padding=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.encode(x)
        return self.decode(features * self.gate(features.mean((2, 3)))[..., None, None])


class SmallTrainer(nnUNetTrainerDermoMambaDiceCE):
    """Epochs of eight steps."""

    epochs = 6

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cpu")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = self.epochs, 8, 2
        self.logger.plot_progress_png = lambda folder: None  # takes longer than an epoch

    @staticmethod
    def build_network_architecture(
        plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ):
        return SmallNetwork(num_input_channels, num_output_channels)


def make(
    folder: Path, continue_training: bool = False, device: str = "cpu", kind: type[SmallTrainer] = SmallTrainer
) -> SmallTrainer:
    """A trainer for ``plans.json`` and ``dataset.json`` of a folder."""
    plans, dataset = (json.loads((folder / name).read_text()) for name in ("plans.json", "dataset.json"))
    plans["continue_training"] = continue_training
    return kind(plans, "2d", 0, dataset, torch.device(device))


def results(folder: Path, kind: type[SmallTrainer] = SmallTrainer) -> Path:
    """Where the trainer leaves its log and checkpoints."""
    return folder / "Dataset999_Ellipses" / f"{kind.__name__}__nnUNetPlans__2d" / "fold_0"


def train(folder: Path, continue_training: bool, device: str = "cpu") -> None:
    """What ``nnUNetv2_train`` does, without the final validation."""
    trainer = make(folder, continue_training, device)
    maybe_load_checkpoint(trainer, continue_training, False)
    trainer.run_training()


def train_in_child(folder: Path) -> int:
    """Go on with a training in a forked process; its id."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        log = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        train(folder, True)
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        print(f"FAILED: {error!r}", flush=True)
    finally:
        sys.stdout.flush()
        os._exit(code)


def kill_again_and_again(folder: Path, kills: int, longest: float) -> None:
    """Kill a training at random moments, then let it end; prints how many kills hit a file that was being written."""
    rng = random.Random(0)
    hits = 0
    for _ in range(kills):
        process = train_in_child(folder)
        time.sleep(rng.uniform(0, longest))
        os.kill(process, signal.SIGKILL)
        _, status = os.waitpid(process, 0)
        if status == 0:  # it was quicker: from the start
            shutil.rmtree(results(folder))
        elif not os.WIFSIGNALED(status):
            sys.exit(f"ended before it was killed, with status {status}")
        hits += any(folder.glob("**/.*.partial"))
    _, status = os.waitpid(train_in_child(folder), 0)
    print(json.dumps({"hits": hits, "status": status}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--c", action="store_true")
    parser.add_argument("--epochs", type=int, default=SmallTrainer.epochs)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--longest", type=float, default=1.0, help="seconds until a kill")
    parser.add_argument("--interval", type=float, default=safe_checkpoints.SAVE_INTERVAL)
    parser.add_argument("--share", type=float, default=safe_checkpoints.SAVE_SHARE)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    SmallTrainer.epochs = arguments.epochs
    safe_checkpoints.SAVE_INTERVAL, safe_checkpoints.SAVE_SHARE = arguments.interval, arguments.share
    if arguments.kills:
        kill_again_and_again(arguments.folder, arguments.kills, arguments.longest)
    else:
        train(arguments.folder, arguments.c)


if __name__ == "__main__":
    main()
