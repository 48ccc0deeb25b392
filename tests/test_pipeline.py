"""The whole job through stock nnU-Net's own commands, with the installed package, on a handful of images."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from workspace import DATASET, Workspace, preprocessed_workspace

pytestmark = [pytest.mark.pipeline, pytest.mark.xdist_group("pipeline")]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return preprocessed_workspace(tmp_path_factory.mktemp("pipeline"))


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
