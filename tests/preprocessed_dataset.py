"""A small preprocessed nnU-Net data set, as nnU-Net's own preprocessor leaves it."""

import json
from pathlib import Path

import numpy as np
import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

DATASET = "Dataset999_Ellipses"
PATCH_SIZE = (32, 40)
SHAPES = [(32, 40), (32, 40), (60, 33), (20, 70), (32, 40), (32, 40), (32, 40), (45, 45), (32, 40), (32, 40)]


def case(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices(shape)
    radius = np.hypot((rows - shape[0] / 2) / (shape[0] / 4), (columns - shape[1] / 2) / (shape[1] / 5))
    segmentation = ((radius < 1).astype(np.int8) + (radius < 0.5))[None, None]
    image = rng.normal(0, 0.5, (3, 1, *shape)).astype(np.float32) - segmentation[0]
    return image, segmentation


def class_locations(segmentation: np.ndarray, labels: tuple) -> dict:
    return {label: np.argwhere(np.isin(segmentation, label)) for label in labels}


def spoil_image(folder: Path, name: str, value: float) -> None:
    """Put NaN or infinity into a channel of a preprocessed case."""
    image, segmentation, _, properties = nnUNetDatasetBlosc2(str(folder), [name]).load_case(name)
    image, segmentation = np.array(image[:]), np.array(segmentation[:])
    for file in folder.glob(f"{name}*"):
        file.unlink()
    image[1, 0, 5:15, 5:60] = value
    nnUNetDatasetBlosc2.save_case(image, segmentation, properties, str(folder / name), image.shape, segmentation.shape)


@pytest.fixture
def preprocessed(tmp_path, monkeypatch) -> Path:
    """Ten cases of several sizes, two classes; the third case has no foreground."""
    folder = tmp_path / DATASET
    (folder / "nnUNetPlans_2d").mkdir(parents=True)
    for name in ("nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path))
    rng = np.random.default_rng(0)
    for n, shape in enumerate(SHAPES):
        image, segmentation = case(rng, shape)
        if n == 2:
            segmentation[:] = 0
        properties = {"class_locations": class_locations(segmentation, (1, 2))}
        target = str(folder / "nnUNetPlans_2d" / f"case_{n:02d}")
        nnUNetDatasetBlosc2.save_case(image, segmentation, properties, target, image.shape, image.shape)
    for name in ("dataset_fingerprint.json", "dataset.json"):  # a trainer copies them to its results
        (folder / name).write_text("{}")
    names = [f"case_{n:02d}" for n in range(len(SHAPES))]
    (folder / "splits_final.json").write_text(json.dumps([{"train": names[:7], "val": names[7:]}]))
    return tmp_path


@pytest.fixture
def plans() -> dict:
    """Plans of a small 2D U-Net, as nnU-Net writes them."""
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "kernel_sizes": [[3, 3]] * 3,
            "strides": [[1, 1], [2, 2], [2, 2]],
            "n_conv_per_stage": [1] * 3,
            "n_conv_per_stage_decoder": [1] * 2,
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    configuration = {
        "data_identifier": "nnUNetPlans_2d",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 6,
        "patch_size": list(PATCH_SIZE),
        "median_image_size_in_voxels": [float(side) for side in PATCH_SIZE],
        "spacing": [1.0, 1.0],
        "normalization_schemes": ["RGBTo01Normalization"] * 3,
        "use_mask_for_norm": [False] * 3,
        "architecture": architecture,
        "batch_dice": True,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "label_manager": "LabelManager",
        "configurations": {"2d": configuration},
        "continue_training": False,
    }


@pytest.fixture
def dataset_json() -> dict:
    return {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "rim": 1, "core": 2}}


@pytest.fixture
def small(preprocessed, plans, dataset_json, monkeypatch):
    """Folder of a reproducible training by small_training.py; its results are in ``results(folder)``."""
    plans["configurations"]["2d"]["batch_size"] = 2
    (preprocessed / "plans.json").write_text(json.dumps(plans))
    (preprocessed / "dataset.json").write_text(json.dumps(dataset_json))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("DERMOMAMBA_SEED", "5")
    return preprocessed
