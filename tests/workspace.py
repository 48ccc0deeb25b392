"""Dermoscopy-like images, converted, planned and preprocessed by nnU-Net's own commands; and a user's own trainer."""

import os
import subprocess
import sys
from pathlib import Path

from nnunetv2_dermomamba.synthetic import write_isic2018_layout

ROOT = Path(__file__).resolve().parents[1]
DATASET = "Dataset118_ISIC2018"
# A user's own trainer, in a user's own nnUNet_extTrainer: two epochs of two iterations.
TINY = """
from nnunetv2_dermomamba.trainers import nnUNetTrainerDermoMamba

class nnUNetTrainerDermoMambaTiny(nnUNetTrainerDermoMamba):
    def __init__(self, plans, configuration, fold, dataset_json, device=None):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1
        self.save_every = 1

    def on_epoch_end(self):
        super().on_epoch_end()
        if self.current_epoch == 1 and "STOP_AFTER_ONE" in __import__("os").environ:
            raise KeyboardInterrupt
"""


class Workspace:
    def __init__(self, folder: Path, trainer: str) -> None:
        self.folder = folder
        (folder / "trainers").mkdir()
        (folder / "trainers" / "tiny.py").write_text(trainer)
        self.environment = {
            **os.environ,
            **{name: str(folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
            "nnUNet_extTrainer": str(folder / "trainers"),
            "nnUNet_n_proc_DA": "1",
            "nnUNet_def_n_proc": "1",
            "OMP_WAIT_POLICY": "PASSIVE",  # see examples/demo.py
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        }
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (folder / name).mkdir()

    def run(self, *command: str | Path, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert (done.returncode == 0) == (code == 0), done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout + done.stderr


def preprocessed_workspace(folder: Path, trainer: str = TINY) -> Workspace:
    """Ten training images and two others."""
    workspace = Workspace(folder, trainer)
    write_isic2018_layout(workspace.folder / "source", training=10, test=2, seed=3)
    script = ROOT / "dataset_conversion" / "isic2018.py"
    workspace.run(sys.executable, script, "--source", "source", "--size", "64x96")
    plan = "nnUNetv2_plan_and_preprocess -d 118 -c 2d --verify_dataset_integrity -np 1 -npfp 1"
    workspace.run(*plan.split())
    return workspace
