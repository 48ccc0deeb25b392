import io
import json
import os
import pickle
import stat
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunetv2_dermomamba.predict import Predictor
from nnunetv2_dermomamba.predict import model as module
from nnunetv2_dermomamba.predict.model import (
    DERMOMAMBA_TRAINERS,
    MAX_CHECKPOINT_BYTES,
    ModelError,
    load_checkpoint,
    load_model,
)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


def plain_checkpoint(**changes):
    return {
        "network_weights": {"a": torch.ones(2)},
        "trainer_name": "nnUNetTrainer",
        "init_args": {"configuration": "2d"},
        **changes,
    }


def saved(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint, buffer)
    return buffer.getvalue()


def zipped(folder, path, root="Dataset501_Test/t__p__2d/"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, root + file.relative_to(folder).as_posix())
    return path


@pytest.fixture
def copy(unet, tmp_path):
    import shutil

    return Path(shutil.copytree(unet, tmp_path / "nnUNetTrainer__nnUNetPlans__2d"))


def test_trainers_own_checkpoints_load_without_trust(model):
    loaded = load_model(model)
    assert loaded.trainer == "nnUNetTrainerDermoMamba_demo"
    assert loaded.folds == ["0", "1"]
    assert loaded.shape == (64, 64)
    assert len(loaded.weights) == 2


def test_a_network_is_built_without_its_trainer_exactly_if_it_is_dermomamba():
    from nnunetv2_dermomamba import trainers

    build = trainers.nnUNetTrainerDermoMamba.build_network_architecture
    dermomamba = {name for name in trainers.__all__ if getattr(trainers, name).build_network_architecture is build}
    assert dermomamba == DERMOMAMBA_TRAINERS


def test_an_empty_zip_is_named_as_what_it_is(tmp_path):
    zipfile.ZipFile(tmp_path / "model.zip", "w").close()
    with pytest.raises(ModelError, match="empty zip, as an export that failed"):
        load_model(tmp_path / "model.zip")


def test_predicting_imports_nothing_to_train_or_plot_with(model):
    code = (
        "import sys; from nnunetv2_dermomamba.predict import Predictor; import nnunetv2_dermomamba.predict.stream; "
        f"Predictor({str(model)!r}, 'cpu'); "
        "print({'matplotlib', 'seaborn', 'sklearn', 'nnunetv2.training.nnUNetTrainer.nnUNetTrainer'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("scalar", [np.float32(1.5), np.float64(1.5), np.int64(3), np.bool_(True)])
def test_numpy_scalars_are_allowed(scalar):
    checkpoint = load_checkpoint(saved(plain_checkpoint(_best_ema=scalar)), "x")
    assert checkpoint["_best_ema"] == scalar


def test_numpy_1_scalars_are_allowed():
    data = saved(plain_checkpoint(_best_ema=np.float32(1.5)))
    source, target = io.BytesIO(data), io.BytesIO()
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core" in content or b"numpy.core" in content
                content = content.replace(b"numpy._core", b"numpy.core")
            new.writestr(entry, content)
    assert load_checkpoint(target.getvalue(), "x")["_best_ema"] == np.float32(1.5)


def test_a_checkpoint_that_runs_code_is_refused_and_does_not_run(tmp_path):
    file = tmp_path / "ran"
    data = saved(plain_checkpoint(logging=Evil(file)))
    with pytest.raises(ModelError, match=r"mkdir.*--trust"):
        load_checkpoint(data, "x")
    assert not file.exists()
    load_checkpoint(data, "x", trust=True)
    assert file.exists()


def test_a_legacy_pickle_is_refused_and_does_not_run(tmp_path):
    buffer = io.BytesIO()
    torch.save(plain_checkpoint(logging=Evil(tmp_path / "ran")), buffer, _use_new_zipfile_serialization=False)
    for data in (buffer.getvalue(), pickle.dumps(Evil(tmp_path / "ran"))):
        with pytest.raises(ModelError, match="--trust"):
            load_checkpoint(data, "x")
    assert not (tmp_path / "ran").exists()


def test_a_compressed_bomb_in_a_checkpoint_is_refused():
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(saved(plain_checkpoint()))) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry), compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelError, match="compressed"):
        load_checkpoint(target.getvalue(), "x")


@pytest.mark.parametrize("kept", [0, 10, 200, -30])
def test_a_truncated_checkpoint_is_refused(kept):
    with pytest.raises(ModelError, match="x is"):
        load_checkpoint(saved(plain_checkpoint())[:kept], "x")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_weights": {"a": torch.tensor([1.0, float("nan")])}}, "NaN"),
        ({"network_weights": {"a": "text"}}, "no tensor"),
        ({"network_weights": [1]}, "no checkpoint"),
        ({"init_args": {}}, "configuration"),
        ({"inference_allowed_mirroring_axes": (0, 7)}, "mirrors"),
    ],
)
def test_wrong_content_is_named(changes, message):
    with pytest.raises(ModelError, match=message):
        load_checkpoint(saved(plain_checkpoint(**changes)), "x")


def test_zip_and_folder_are_the_same_model(unet, tmp_path):
    assert load_model(zipped(unet, tmp_path / "m.zip")).fingerprint == load_model(unet).fingerprint


def test_the_results_folder_above_finds_the_only_model(copy):
    assert load_model(copy.parent).name == copy.name


def test_several_models_are_listed(results, model, unet):
    with pytest.raises(ModelError, match=r"nnUNetTrainerDermoMamba_demo__nnUNetPlans__2d/, .*nnUNetTrainer__"):
        load_model(results)


@pytest.mark.parametrize(
    "name", ["/etc/evil", "../evil", "Dataset/../../evil", "C:\\evil", "..\\evil", "\\\\host\\evil"]
)
def test_a_zip_with_names_that_leave_it_is_refused(unet, tmp_path, name):
    path = zipped(unet, tmp_path / "m.zip")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "x")
    with pytest.raises(ModelError, match="path"):
        load_model(path)


def test_a_zip_with_a_link_is_refused(unet, tmp_path):
    path = zipped(unet, tmp_path / "m.zip")
    link = zipfile.ZipInfo("Dataset501_Test/t__p__2d/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelError, match="link"):
        load_model(path)


def test_an_entry_that_claims_10_gigabytes_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("plans.json", "{}")
        archive.writestr("dataset.json", "{}")
        archive.writestr("fold_0/checkpoint_final.pth", "x")
    data = bytearray(path.read_bytes())
    directory = data.rfind(b"PK\x01\x02")  # of the last entry
    data[directory + 24 : directory + 28] = (MAX_CHECKPOINT_BYTES + 1).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(ModelError, match=r"claims [\d,]+ bytes, more than 2048 MiB"):
        load_model(path)


def test_an_entry_that_claims_less_than_it_unpacks_to_takes_no_more_memory(tmp_path):
    path = tmp_path / "m.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("fold_0/checkpoint_final.pth", "x")
        archive.writestr("dataset.json", "{}")
        archive.writestr("plans.json", bytes(300_000_000))
    data = bytearray(path.read_bytes())
    directory = data.rfind(b"PK\x01\x02")  # of the last entry
    data[directory + 24 : directory + 28] = (100).to_bytes(4, "little")
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match=r"Bad CRC-32 for file 'plans\.json'"):
            load_model(path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_is_unpacked_without_a_limit_is_refused(unet, tmp_path, method):
    path = zipped(unet, tmp_path / "m.zip")
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.writestr("Dataset501_Test/t__p__2d/more", bytes(1000))
    with pytest.raises(ModelError, match="something else than deflate"):
        load_model(path)


def test_a_zip_with_two_files_of_one_name_is_refused(unet, tmp_path):
    path = zipped(unet, tmp_path / "m.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("Dataset501_Test/t__p__2d/plans.json", "{}")
    with pytest.raises(ModelError, match="two files of one name"):
        load_model(path)


def test_a_file_too_large_for_a_model_is_not_read(copy, monkeypatch):
    monkeypatch.setattr(module, "MAX_CHECKPOINT_BYTES", 1 << 10)
    with pytest.raises(ModelError, match="is larger than"):
        load_model(copy)


def test_a_checkpoint_that_claims_more_than_its_size_is_refused():
    data = bytearray(saved(plain_checkpoint()))
    directory = data.rfind(b"PK\x01\x02")  # of the last entry, which then claims 1.9 GB
    for field in (20, 24):
        data[directory + field + 3] = 0x70
    with pytest.raises(ModelError, match="claims to hold more than its own size"):
        load_checkpoint(bytes(data), "x")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no zip", b"text" * 1000])
def test_a_file_that_is_no_zip_is_refused(tmp_path, content):
    (tmp_path / "m.zip").write_bytes(content)
    with pytest.raises(ModelError, match="neither a folder nor a whole zip"):
        load_model(tmp_path / "m.zip")


def test_mutated_zips_load_or_are_refused(unet, tmp_path):
    seed = zipped(unet, tmp_path / "seed.zip").read_bytes()
    path = tmp_path / "m.zip"
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        data = bytearray(seed)
        for position in rng.integers(len(data), size=8):
            data[position] = int(rng.integers(256))
        path.write_bytes(data[: int(rng.integers(len(data)))] if rng.random() < 0.2 else data)
        try:
            load_model(path)
        except ModelError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("size", [[0, 64], [64], "large", [1e9, 1e9], [64, 10**9], [True, 64], {"a": 1}])
def test_a_senseless_size_in_dataset_json_is_refused(copy, size):
    dataset = json.loads((copy / "dataset.json").read_text())
    dataset["dermomamba_conversion"]["size"] = size
    (copy / "dataset.json").write_text(json.dumps(dataset))
    with pytest.raises(ModelError, match="image size"):
        load_model(copy)


@pytest.mark.parametrize(
    ("key", "name"), [("network_class_name", "subprocess.Popen"), ("conv_op", "os.system"), ("conv_op", "antigravity")]
)
def test_plans_that_import_anything_but_networks_are_refused(copy, key, name):
    plans = json.loads((copy / "plans.json").read_text())
    architecture = plans["configurations"]["2d"]["architecture"]
    (architecture if key in architecture else architecture["arch_kwargs"])[key] = name
    (copy / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match=f"{name}.*--trust"):
        Predictor(copy, "cpu")


def test_an_unknown_trainer_is_named(copy):
    file = copy / "fold_0" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(file.read_bytes(), "x")
    torch.save({**checkpoint, "trainer_name": "nnUNetTrainerUnheardOf"}, file)
    with pytest.raises(ModelError, match="nnUNetTrainerUnheardOf"):
        Predictor(copy, "cpu")


def test_weights_that_do_not_fit_are_refused(copy):
    file = copy / "fold_0" / "checkpoint_final.pth"
    checkpoint = load_checkpoint(file.read_bytes(), "x")
    checkpoint["network_weights"].popitem()
    torch.save(checkpoint, file)
    with pytest.raises(ModelError, match="Missing key"):
        Predictor(copy, "cpu")


def test_a_missing_checkpoint_tells_what_is_there(copy):
    (copy / "fold_0" / "checkpoint_final.pth").rename(copy / "fold_0" / "checkpoint_best.pth")
    with pytest.raises(ModelError, match=r"fold_0: checkpoint_best\.pth"):
        load_model(copy)
    assert load_model(copy, checkpoint="checkpoint_best.pth").folds == ["0"]
    with pytest.raises(ModelError, match="of fold 3"):
        load_model(copy, folds=["3"], checkpoint="checkpoint_best.pth")


def test_folds_without_the_checkpoint_are_named(copy):
    assert load_model(copy).left_out == []
    (copy / "fold_1").mkdir()
    (copy / "fold_1" / "checkpoint_latest.pth").touch()
    model = load_model(copy)
    assert (model.folds, model.left_out) == (["0"], ["1"])
    assert load_model(copy, folds=["0"]).left_out == []


def test_plans_that_prediction_could_not_follow_are_refused_at_once(copy):
    plans = json.loads((copy / "plans.json").read_text())
    plans["configurations"]["2d"]["normalization_schemes"] = ["NoSuchNormalization"] * 3
    (copy / "plans.json").write_text(json.dumps(plans))
    with pytest.raises(ModelError, match="NoSuchNormalization"):
        Predictor(copy, "cpu")
