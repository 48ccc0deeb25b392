"""The resident data set gives what nnU-Net's loader gives with the same random numbers."""

from functools import partial

import numpy as np
import pytest
import torch
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunetv2_dermomamba.augmentation.resident import ResidentDataLoader, estimated_bytes

CPU = torch.device("cpu")


def batches(loader, count: int = 4) -> list[dict]:
    np.random.seed(3)
    return [next(loader) for _ in range(count)]


def assert_same(ours: list[dict], theirs: list[dict]) -> None:
    for own, their in zip(ours, theirs, strict=True):
        assert list(own["keys"]) == list(their["keys"])
        for name in ("data", "target"):
            assert own[name].dtype == their[name].dtype
            assert torch.equal(own[name], their[name])


@pytest.mark.parametrize(
    ("patch_size", "final_patch_size"), [((32, 40), (32, 40)), ((61, 60), (32, 40)), ((24, 16), (20, 16))]
)
@pytest.mark.parametrize("probabilistic", [False, True])
def test_patches(preprocessed, patch_size, final_patch_size, probabilistic):
    dataset = nnUNetDatasetBlosc2(str(preprocessed / "Dataset999_Ellipses" / "nnUNetPlans_2d"))
    labels = LabelManager({"background": 0, "rim": 1, "core": 2}, None)
    options = {"oversample_foreground_percent": 0.5, "probabilistic_oversampling": probabilistic}
    loader = nnUNetDataLoader(dataset, 12, patch_size, final_patch_size, labels, **options)
    assert_same(batches(ResidentDataLoader(loader, CPU)), batches(loader))


def test_any_number_of_data_sets_is_compiled(preprocessed, monkeypatch):
    """In one process, whose compiled code PyTorch keeps, of a function for eight kinds of input."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    dataset = nnUNetDatasetBlosc2(str(preprocessed / "Dataset999_Ellipses" / "nnUNetPlans_2d"))
    labels = LabelManager({"background": 0, "rim": 1, "core": 2}, None)
    for number in range(10):
        loader = nnUNetDataLoader(dataset, 2, (61, 60 - number), (32, 40), labels, 0.5)
        assert_same(batches(ResidentDataLoader(loader, CPU, compiles=True), 1), batches(loader, 1))


@pytest.mark.gpu
def test_compiled_patches(preprocessed):
    """Of two data sets one after the other, as in training and validation."""
    dataset = nnUNetDatasetBlosc2(str(preprocessed / "Dataset999_Ellipses" / "nnUNetPlans_2d"))
    labels = LabelManager({"background": 0, "rim": 1, "core": 2}, None)
    for keys in (dataset.identifiers[:4], dataset.identifiers[4:]):
        loader = nnUNetDataLoader(dataset, 12, (61, 60), (32, 40), labels, 0.5)
        loader.indices = keys
        ours = batches(ResidentDataLoader(loader, torch.device("cuda"), compiles=True))
        assert_same([{**b, "data": b["data"].cpu(), "target": b["target"].cpu()} for b in ours], batches(loader))


def test_ignore_label_and_several_slices(tmp_path):
    rng = np.random.default_rng(0)
    labels = LabelManager({"background": 0, "lesion": 1, "ignore": 2}, None)
    for n, shape in enumerate([(4, 20, 30), (1, 26, 22), (7, 30, 18)]):
        segmentation = rng.integers(0, 3, (1, *shape), dtype=np.int16)
        keys = (1, (-1, *labels.all_labels))
        locations = {key: np.argwhere(np.isin(segmentation, key)) for key in keys}
        image = rng.normal(size=(2, *shape)).astype(np.float32)
        target = str(tmp_path / f"case_{n}")
        nnUNetDatasetBlosc2.save_case(
            image, segmentation, {"class_locations": locations}, target, image.shape, image.shape
        )
    loader = nnUNetDataLoader(nnUNetDatasetBlosc2(str(tmp_path)), 8, (24, 20), (24, 20), labels, 0.33)
    assert_same(batches(ResidentDataLoader(loader, CPU)), batches(loader))


def test_estimated_bytes(preprocessed):
    dataset = nnUNetDatasetBlosc2(str(preprocessed / "Dataset999_Ellipses" / "nnUNetPlans_2d"))
    cases = [dataset.load_case(key)[:2] for key in dataset.identifiers]
    assert estimated_bytes(dataset) == sum(4 * image[:].size + segmentation[:].nbytes for image, segmentation in cases)


@pytest.mark.gpu
def test_on_the_gpu_without_waiting(preprocessed):
    dataset = nnUNetDatasetBlosc2(str(preprocessed / "Dataset999_Ellipses" / "nnUNetPlans_2d"))
    labels = LabelManager({"background": 0, "rim": 1, "core": 2}, None)
    loader = nnUNetDataLoader(dataset, 12, (61, 60), (32, 40), labels, 0.33)
    resident = ResidentDataLoader(loader, torch.device("cuda"))
    next(resident)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours = batches(resident)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    on_host = [{"data": b["data"].cpu(), "target": b["target"].cpu(), "keys": b["keys"]} for b in ours]
    assert_same(on_host, batches(loader))
