"""benchmarks/accuracy.py from preprocessed cases to its table, and that the held-out cases stay out."""

import csv
import json
import sys
from dataclasses import replace

import accuracy as script
import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from PIL import Image
from preprocessed_dataset import case, class_locations
from recipes import SETTINGS
from tolerances import relative_error

DATASET = "Dataset118_Ellipses"
HALF_ROUNDINGS = 4 * torch.finfo(torch.float16).eps  # the sliding window weights, adds and divides in float16
CASES = [f"case_{n:02d}" for n in range(15)]
SHAPE = (32, 40)
RESAMPLING = {
    f"resampling_fn_{kind}{suffix}": value
    for kind in ("data", "seg", "probabilities")
    for suffix, value in (
        ("", "resample_data_or_seg_to_shape"),
        ("_kwargs", {"is_seg": kind == "seg", "order": 1, "order_z": 0, "force_separate_z": None}),
    )
}


@pytest.fixture
def accuracy(monkeypatch):
    """The script as a module, with short validations."""
    for name, setting in SETTINGS.items():
        monkeypatch.setitem(SETTINGS, name, replace(setting, validation_images=4))
    return script


@pytest.fixture
def source(tmp_path, plans, monkeypatch):
    """A data set of ellipses as nnU-Net leaves it when it has preprocessed it."""
    folder = tmp_path / "preprocessed" / DATASET
    (folder / "nnUNetPlans_2d").mkdir(parents=True)
    (folder / "gt_segmentations").mkdir()
    rng = np.random.default_rng(0)
    for name in CASES:
        image, segmentation = case(rng, SHAPE)
        segmentation = np.minimum(segmentation, 1)
        properties = {
            "class_locations": class_locations(segmentation, (1,)),
            "spacing": [999, 1, 1],
            "shape_before_cropping": (1, *SHAPE),
            "shape_after_cropping_and_before_resampling": (1, *SHAPE),
            "bbox_used_for_cropping": [[0, 1], [0, SHAPE[0]], [0, SHAPE[1]]],
        }
        target = str(folder / "nnUNetPlans_2d" / name)
        nnUNetDatasetBlosc2.save_case(image, segmentation, properties, target, image.shape, image.shape)
        Image.fromarray(segmentation[0, 0].astype(np.uint8)).save(folder / "gt_segmentations" / f"{name}.png")
    plans = {key: value for key, value in plans.items() if key != "continue_training"} | {
        "dataset_name": DATASET,
        "image_reader_writer": "NaturalImage2DIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
    }
    plans["configurations"]["2d"] |= {"batch_size": 4, "normalization_schemes": ["ZScoreNormalization"] * 3}
    plans["configurations"]["2d"] |= RESAMPLING
    dataset = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "lesion": 1},
        "file_ending": ".png",
    }
    for name, content in (("nnUNetPlans", plans), ("dataset", dataset), ("dataset_fingerprint", {})):
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "splits_final.json").write_text(json.dumps([{"train": CASES, "val": CASES}]))
    monkeypatch.setenv("nnUNet_preprocessed", str(folder.parent))
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "unused"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return folder


@pytest.fixture
def run(accuracy, source, tmp_path, monkeypatch, capsys):
    """Calls the script and returns what it prints."""

    def call(*options: str) -> str:
        monkeypatch.setenv("nnUNet_preprocessed", str(source.parent))
        shared = ["--device", "cpu", "--work", str(tmp_path / "work"), "--table", str(tmp_path / "experiments.csv")]
        monkeypatch.setattr(sys, "argv", ["accuracy.py", *shared, "--commit", "abc1234", *options])
        accuracy.main()
        return capsys.readouterr().out

    return call


def test_split_is_fixed_and_disjoint(accuracy) -> None:
    split, held_out = accuracy.held_out_split(CASES[::-1])
    assert (split, held_out) == accuracy.held_out_split(CASES)
    assert sorted([*split["train"], *split["val"], *held_out]) == CASES
    assert (len(held_out), len(split["val"])) == (3, 1)


def test_from_cases_to_table(accuracy, run, tmp_path, monkeypatch) -> None:
    seen = set()
    original = nnUNetDatasetBlosc2.load_case

    def load_case(self, identifier):
        seen.add((len(self.identifiers), identifier))
        return original(self, identifier)

    settings = "unet,paper,ema,colour-jitter"
    with monkeypatch.context() as patch:
        patch.setattr(nnUNetDatasetBlosc2, "load_case", load_case)
        printed = run("--settings", settings, "--presentations", "16", "--augment-on-device")
    split, held_out = accuracy.held_out_split(CASES)
    for count, identifier in seen:
        # of the three data sets (training, validation, held out) only the last may load these cases
        assert (identifier in held_out) == (count == len(held_out)), identifier
    assert {identifier for _, identifier in seen} == {*held_out, *split["train"], *split["val"]}

    with open(tmp_path / "experiments.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["setting"] for row in rows] == settings.split(",")
    assert {(row["commit"], row["presentations"], row["batch"], row["device"]) for row in rows} == {
        ("abc1234", "16", "4", "CPU")
    }
    masks = sorted(path.stem for path in (tmp_path / "work" / "runs").glob("*/unet_16x*/masks/*.png"))
    assert masks == held_out
    assert "3 held-out images" in printed
    table = [line for line in printed.splitlines() if line.startswith("| ")]
    assert len(table) == 2 + 4
    assert "(p " in table[3]
    assert "(p " not in table[2]

    def train(*_):
        raise AssertionError("a finished run is trained again")

    monkeypatch.setattr(accuracy, "perform", train)
    before = (tmp_path / "experiments.csv").read_text()
    again = run("--settings", settings, "--presentations", "16", "--augment-on-device", "--against", "paper")
    assert "DSC - paper" in again
    assert (tmp_path / "experiments.csv").read_text() == before


def test_seeds_are_averaged_and_schedules_end_with_the_presentations(accuracy, run, source, tmp_path) -> None:
    printed = run("--settings", "unet", "--presentations", "48", "--batch", "2", "--seeds", "0,1")
    record = json.loads(next((tmp_path / "work" / "runs").glob("*/*seed1/run.json")).read_text())
    assert record["presentations"] == 48
    assert "\n| unet | 2 | 48 | 2 |" in printed
    assert len([*(tmp_path / "work" / "models").rglob("checkpoint_final.pth")]) == 2


def test_batch_of_whole_images_is_what_the_sliding_window_gives(accuracy, run, source, tmp_path, monkeypatch) -> None:
    compared = []
    original = accuracy.predict_logits

    def both(predictor, images):
        together = original(predictor, images)
        for image, logits in zip(images, together, strict=True):
            alone = predictor.predict_sliding_window_return_logits(image)  # summed in float16
            compared.append(relative_error(logits, alone) <= HALF_ROUNDINGS)
        return together

    monkeypatch.setattr(accuracy, "predict_logits", both)
    run("--settings", "unet", "--presentations", "8")
    assert compared == [True] * 3


def test_mistakes_are_told(accuracy, run) -> None:
    with pytest.raises(SystemExit, match="no setting 'unett'; there are unet, resenc"):
        run("--settings", "unett")
    with pytest.raises(SystemExit, match="nnUNetv2_plan_experiment -d 118 -pl nnUNetPlannerResEncM"):
        run("--settings", "resenc")
    with pytest.raises(SystemExit, match=r"0 folders Dataset119_"):
        run("--settings", "unet@119")


def test_settings_change_what_trainers_have(accuracy, run, source, tmp_path) -> None:
    """Every setting of the registry builds its trainer (SystemExit for an attribute that it lacks)."""
    import argparse

    arguments = argparse.Namespace(device="cpu", augment_on_device=False)
    for name, setting in SETTINGS.items():
        item = accuracy.Run(name, setting, DATASET, "nnUNetPlans", None, 100, 0, tmp_path / "work")
        accuracy.prepare(source, item)
        trainer = accuracy.build_trainer(item, arguments)
        assert isinstance(trainer, nnUNetTrainer)
        assert type(trainer).__name__ == setting.trainer
