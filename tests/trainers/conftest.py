import json

import pytest
from preprocessed_dataset import dataset_json, plans, preprocessed  # noqa: F401  (fixtures)


@pytest.fixture
def small(preprocessed, plans, dataset_json, monkeypatch):  # noqa: F811
    """Folder of a reproducible training by small_training.py; its results are in ``results(folder)``."""
    plans["configurations"]["2d"]["batch_size"] = 2
    (preprocessed / "plans.json").write_text(json.dumps(plans))
    (preprocessed / "dataset.json").write_text(json.dumps(dataset_json))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("DERMOMAMBA_SEED", "5")
    return preprocessed
