"""The whole job through stock nnU-Net's own commands, with the installed package, on a handful of images."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.synthetic import write_isic2018_layout

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]
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
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "trainers").mkdir()
        (folder / "trainers" / "tiny.py").write_text(TINY)
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


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("pipeline"))
    write_isic2018_layout(workspace.folder / "source", training=10, test=2, seed=3)
    script = ROOT / "dataset_conversion" / "isic2018.py"
    workspace.run(sys.executable, script, "--source", "source", "--size", "64x96")
    plan = "nnUNetv2_plan_and_preprocess -d 118 -c 2d --verify_dataset_integrity -np 1 -npfp 1"
    workspace.run(*plan.split())
    return workspace


def test_from_images_to_masks(workspace: Workspace) -> None:
    plans = json.loads((workspace.folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json").read_text())
    assert plans["configurations"]["2d"]["patch_size"] == [64, 96]

    train = ["nnUNetv2_train", "118", "2d", "0", "-tr", "nnUNetTrainerDermoMambaTiny", "-device", "cpu"]
    workspace.run(*train, code=1, STOP_AFTER_ONE="1")
    resumed = workspace.run(*train, "--c")
    assert "Epoch 1" in resumed
    assert "Epoch 0" not in resumed
    assert "Selective scan backend: numba for cpu" in resumed
    assert "cross_entropy" in resumed
    assert "attention_dice" in resumed

    results = workspace.folder / "nnUNet_results" / DATASET / "nnUNetTrainerDermoMambaTiny__nnUNetPlans__2d"
    assert (results / "fold_0" / "checkpoint_final.pth").is_file()
    summary = json.loads((results / "fold_0" / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == 2

    images = workspace.folder / "nnUNet_raw" / DATASET / "imagesTs"
    predicted = workspace.run(
        "nnUNetv2_predict", "-i", images, "-o", "out", "-d", "118", "-c", "2d", "-tr", "nnUNetTrainerDermoMambaTiny",
        "-f", "0", "-device", "cpu", "-npp", "1", "-nps", "1", "--disable_tta",
    )  # fmt: skip
    assert "Selective scan backend: numba for cpu" in predicted
    masks = sorted((workspace.folder / "out").glob("*.png"))
    assert len(masks) == 2
    for mask in masks:
        labels = np.asarray(Image.open(mask))
        assert labels.shape == (64, 96)
        assert set(np.unique(labels)) <= {0, 1}

    export = "nnUNetv2_export_model_to_zip -d 118 -c 2d -tr nnUNetTrainerDermoMambaTiny -o model.zip -f 0"
    workspace.run(*export.split())
    shutil.rmtree(results)
    workspace.run("nnUNetv2_install_pretrained_model_from_zip", "model.zip")
    assert (results / "fold_0" / "checkpoint_final.pth").is_file()


def test_3d_configuration_is_refused_clearly(workspace: Workspace) -> None:
    file = workspace.folder / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"] = {**plans["configurations"]["2d"], "patch_size": [16, 64, 96]}
    file.write_text(json.dumps(plans))
    message = workspace.run(
        *["nnUNetv2_train", "118", "3d_fullres", "0", "-tr", "nnUNetTrainerDermoMamba", "-device", "cpu"], code=1
    )  # fmt: skip
    assert "Use nnU-Net's 2d configuration" in message
