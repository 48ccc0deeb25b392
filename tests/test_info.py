import json
import os
import shutil
import zipfile

import pytest
import torch
from masks import save_pairs

from nnunetv2_dermomamba import info
from nnunetv2_dermomamba.cli import main
from nnunetv2_dermomamba.cost import count_cost
from nnunetv2_dermomamba.info import versions
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.ops import BACKENDS, ENVIRONMENT_VARIABLE, backends
from nnunetv2_dermomamba.predict.sized_network import trained_model


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch):
    """As a command starts: no backend has been announced."""
    monkeypatch.setattr(backends, "_ANNOUNCED", set())


def test_text_and_json(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "4,953,425" in text
    assert "3 x 192 x 256" in text
    assert main(["info", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["versions"] == versions()
    assert list(shown["backends"]["cpu"]) == [backend.name for backend in BACKENDS]
    assert sum(reason == "used" for reason in shown["backends"]["cpu"].values()) == 1
    assert "not cpu" in shown["backends"]["cpu"]["triton"]


def test_backends_of_every_type_of_device_are_shown(monkeypatch):
    monkeypatch.setattr(info, "devices", lambda: {"cuda:0": "A", "cuda:1": "B", "mps": "C", "cpu": "D"})
    shown = info.backends()
    assert list(shown) == ["cuda", "mps", "cpu"]
    assert shown["mps"]["torch"] == "used"


def test_a_requested_backend_is_shown(monkeypatch, capsys):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "torch")
    assert main(["info", "--json"]) == 0
    reasons = json.loads(capsys.readouterr().out)["backends"]["cpu"]
    assert ENVIRONMENT_VARIABLE in reasons["torch"]
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "nonsense")
    assert main(["info", "--json"]) == 0
    assert "nonsense" in json.loads(capsys.readouterr().out)["backends"]["cpu"]["none"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What nnU-Net leaves of a training, with a network that was never trained."""
    folder = tmp_path_factory.mktemp("results") / "Dataset007_Toy" / "nnUNetTrainerDermoMamba__nnUNetPlans__2d"
    (folder / "fold_0").mkdir(parents=True)
    dataset = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "lesion": 1},
        "file_ending": ".png",
        "numTraining": 1,
    }
    configuration = {"patch_size": [64, 96], "spacing": [1, 1], "architecture": {}}
    plans = {"dataset_name": "Dataset007_Toy", "plans_name": "nnUNetPlans", "configurations": {"2d": configuration}}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    (folder / "plans.json").write_text(json.dumps(plans))
    checkpoint = {
        "network_weights": DermoMamba(3, 2, (64, 96)).state_dict(),
        "trainer_name": "nnUNetTrainerDermoMamba",
        "init_args": {"configuration": "2d"},
        "inference_allowed_mirroring_axes": (0, 1),
    }
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def test_a_trained_model_as_folder_and_as_zip(trained, tmp_path, capsys):
    exported = tmp_path / "model.zip"
    with zipfile.ZipFile(exported, "w") as archive:
        for path in trained.rglob("*"):
            archive.write(path, path.relative_to(trained.parents[1]))
    shown = []
    for model in (trained, exported):
        assert main(["info", "--json", "--model", str(model)]) == 0
        shown.append(json.loads(capsys.readouterr().out))
    assert shown[0] == shown[1]
    assert shown[0]["model"]["patch_size"] == [64, 96]
    assert shown[0]["model"]["labels"] == "background, lesion"
    assert shown[0]["cost"]["parameters"] == sum(p.numel() for p in DermoMamba(3, 2, (64, 96)).parameters())


def test_evaluate_shows_a_models_cost(trained, tmp_path, capsys):
    masks, truth = save_pairs(tmp_path)
    assert main(["evaluate", "-p", str(masks), "-g", str(truth), "-np", "1", "--model", str(trained)]) == 0
    cost = count_cost(*_parts(trained_model(trained)))
    assert f"{cost.parameters / 1e6:.2f}" in capsys.readouterr().out


def _parts(model):
    return model.network, model.channels, model.patch_size


@pytest.mark.parametrize("kind", ["empty folder", "file", "zip"])
def test_what_is_no_model_is_refused(tmp_path, capsys, kind):
    path = tmp_path / "model"
    if kind == "empty folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("no zip")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme", "no model")
    assert main(["info", "--model", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


class RunsCode:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return (os.mkdir, (str(self.folder),))


def test_a_strangers_checkpoint_runs_no_code_unless_trusted(trained, tmp_path, capsys):
    model = shutil.copytree(trained, tmp_path / trained.name)
    file = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    torch.save({**checkpoint, "logging": RunsCode(tmp_path / "ran")}, file)
    masks, truth = save_pairs(tmp_path, count=1)
    for command in (["info"], ["evaluate", "-p", str(masks), "-g", str(truth), "-np", "1"]):
        assert main([*command, "--model", str(model)]) == 2
        error = capsys.readouterr().err
        assert str(file.name) in error
        assert "--trust" in error
        assert not (tmp_path / "ran").exists()
    assert main(["info", "--model", str(model), "--trust"]) == 0
    assert (tmp_path / "ran").exists()


def test_a_zip_file_is_not_unpacked(trained, tmp_path, capsys):
    exported = tmp_path / "model.zip"
    with zipfile.ZipFile(exported, "w") as archive:
        archive.write(trained / "plans.json", "../plans.json")
    assert main(["info", "--model", str(exported)]) == 2
    assert "leaves the archive" in capsys.readouterr().err


def test_an_unfinished_training_needs_its_checkpoint_named(trained, tmp_path, capsys):
    model = shutil.copytree(trained, tmp_path / trained.name)
    (model / "fold_0" / "checkpoint_final.pth").rename(model / "fold_0" / "checkpoint_best.pth")
    assert main(["info", "--model", str(model)]) == 2
    assert "-chk" in capsys.readouterr().err
    assert main(["info", "--json", "--model", str(model), "-chk", "checkpoint_best.pth"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]["checkpoint"] == "checkpoint_best.pth"
