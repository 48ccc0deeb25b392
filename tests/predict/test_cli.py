import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from PIL import Image
from predict_helpers import photograph

from nnunetv2_dermomamba.cli import main
from nnunetv2_dermomamba.evaluation.pairing import index_masks
from nnunetv2_dermomamba.files import whole_file
from nnunetv2_dermomamba.folder_lock import locked
from nnunetv2_dermomamba.predict import Predictor
from nnunetv2_dermomamba.predict.photos import JOURNAL_FILE


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub dir").mkdir(parents=True)
    image = photograph((96, 128))
    Image.fromarray(image).save(folder / "a.jpg")
    Image.fromarray(image[..., 0]).save(folder / "a.png")
    Image.fromarray(photograph((130, 70), 1)).save(folder / "sub dir" / "皮膚.webp")
    return folder


def predict(photos, out, model, *options):
    return main(["predict", "-i", str(photos), "-o", str(out), "-m", str(model), "-device", "cpu", *options])


def tree(folder):
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_masks_have_the_photographs_sizes_and_folders(photos, unet, tmp_path, capsys):
    assert predict(photos, tmp_path / "out", unet) == 0
    masks = {name: Image.open(tmp_path / "out" / name) for name in tree(tmp_path / "out") if name.endswith(".png")}
    assert {name: mask.size for name, mask in masks.items()} == {
        "a.jpg_mask.png": (128, 96),
        "a.png_mask.png": (128, 96),
        "sub dir/皮膚_mask.png": (70, 130),
    }
    for mask in masks.values():
        assert mask.mode == "L"
        assert set(np.unique(np.asarray(mask))) <= {0, 255}
    assert "3 masks written" in capsys.readouterr().out


def test_everything_that_can_be_asked_for(photos, unet, predictor, tmp_path):
    out = tmp_path / "out"
    assert predict(photos, out, unet, "--disable_tta", "--overlay", "--probabilities", "--csv") == 0
    mask, probability = predictor(photos / "a.jpg")
    written = np.asarray(Image.open(out / "a.jpg_probability.png"))
    assert written.dtype == np.uint16
    assert np.abs(written / 65535 - probability).max() <= 1 / 65535
    assert np.array_equal(np.asarray(Image.open(out / "a.jpg_mask.png")) == 255, mask == 1)
    assert Image.open(out / "sub dir" / "皮膚_overlay.jpg").size == (70, 130)
    rows = {row["mask"]: row for row in csv.DictReader((out / "predictions.csv").open(encoding="utf-8"))}
    assert len(rows) == 3
    masks, ignored = index_masks(out)
    assert set(masks) == {"a.jpg", "a.png", "sub dir/皮膚"}
    assert ignored == []
    row = rows["a.jpg_mask.png"]
    assert int(row["area_pixels"]) == mask.sum()
    assert float(row["area_percent"]) == pytest.approx(100 * mask.mean(), abs=1e-3)
    assert float(row["mean_probability"]) == pytest.approx(probability[mask == 1].mean(), abs=1e-3)
    assert float(row["seconds"]) > 0


def test_one_unreadable_photograph_does_not_stop_the_rest(photos, unet, tmp_path, capsys):
    (photos / "broken\nname.jpg").write_bytes(b"\xff\xd8\xff no photograph")
    out = tmp_path / "out"
    assert predict(photos, out, unet) == 1
    listed = (out / "failed.txt").read_text().splitlines()
    assert len(listed) == 1
    assert r"broken\nname.jpg" in listed[0]
    assert len(list(out.rglob("*_mask.png"))) == 3
    (photos / "broken\nname.jpg").unlink()
    assert predict(photos, out, unet, "--resume") == 0
    assert not (out / "failed.txt").exists()


def test_resume_makes_only_what_is_missing_or_changed(photos, unet, tmp_path, capsys):
    out = tmp_path / "out"
    predict(photos, out, unet, "--csv")
    before = tree(out)
    kept = (out / "a.png_mask.png").stat().st_mtime_ns
    (out / "a.jpg_mask.png").unlink()
    Image.fromarray(photograph((130, 70), 2)).save(photos / "sub dir" / "皮膚.webp")
    with (out / JOURNAL_FILE).open("a") as file:
        file.write('{"name": "cut sh')
    assert predict(photos, out, unet, "--csv", "--resume") == 0
    assert "2 masks written" in (printed := capsys.readouterr().out)
    assert "1 were there already" in printed
    assert (out / "a.png_mask.png").stat().st_mtime_ns == kept
    assert tree(out)["a.jpg_mask.png"] == before["a.jpg_mask.png"]
    assert len((out / "predictions.csv").read_text(encoding="utf-8").splitlines()) == 4
    assert predict(photos, out, unet, "--resume", "--overlay") == 0
    assert len(list(out.rglob("*_overlay.jpg"))) == 3


def test_resume_forgets_the_figures_of_a_photograph_that_fails_now(photos, unet, tmp_path):
    out = tmp_path / "out"
    predict(photos, out, unet, "--csv")
    (photos / "a.png").write_bytes(b"damaged")
    assert predict(photos, out, unet, "--csv", "--resume") == 1
    assert "a.png" in (out / "failed.txt").read_text(encoding="utf-8")
    assert "a.png" not in (out / "predictions.csv").read_text(encoding="utf-8")


def test_a_photograph_that_fails_now_keeps_no_earlier_result(photos, regions, unet, tmp_path):
    out = tmp_path / "out"
    predict(photos, out, regions, "--overlay", "--probabilities")  # of two classes
    assert {name for name in tree(out) if name.startswith("a.png_")} == {
        "a.png_mask.png",
        "a.png_overlay.jpg",
        "a.png_probability_1.png",
        "a.png_probability_2.png",
    }
    (photos / "a.png").write_bytes(b"damaged")
    assert predict(photos, out, unet) == 1
    assert {name for name in tree(out) if name.startswith("a.")} == {"a.jpg_mask.png"}


def test_a_photograph_that_is_away_keeps_its_results(photos, unet, tmp_path):
    out = tmp_path / "out"
    predict(photos, out, unet, "--csv")
    listed = tmp_path / "list.txt"
    listed.write_text("photos/a.jpg\nphotos/a.png\n")
    predict(listed, out, unet, "--csv")
    masks, table = {"a.jpg_mask.png", "a.png_mask.png", "sub dir/皮膚_mask.png"}, (out / "predictions.csv").read_bytes()
    photos.rename(tmp_path / "unmounted")
    assert predict(listed, out, unet, "--resume", "--csv") == 1
    assert (out / "predictions.csv").read_bytes() == table
    assert predict(listed, out, unet) == 1
    assert {name for name in tree(out) if name.endswith(".png")} == masks
    (tmp_path / "unmounted").rename(photos)
    assert predict(listed, out, unet) == 0


def test_a_mask_drawn_for_a_photograph_that_failed_stays(photos, unet, tmp_path, capsys):
    out = tmp_path / "out"
    (photos / "a.png").write_bytes(b"damaged")
    assert predict(photos, out, unet) == 1
    (out / "a.png_mask.png").write_text("drawn by hand")
    assert predict(photos, out, unet, "--resume") == 2
    assert "a.png_mask.png' exists and is no result of an earlier run" in capsys.readouterr().err
    assert (out / "a.png_mask.png").read_text() == "drawn by hand"


def test_an_overlay_that_no_run_made_is_not_taken_for_one(photos, unet, tmp_path, capsys):
    out = tmp_path / "out"
    assert predict(photos / "a.jpg", out, unet) == 0
    (out / "a_overlay.jpg").write_text("mine")
    assert predict(photos / "a.jpg", out, unet, "--resume", "--overlay") == 2
    assert "a_overlay.jpg' exists" in capsys.readouterr().err


def test_the_table_of_an_earlier_run_tells_of_the_masks_that_are_there(photos, unet, tmp_path):
    out = tmp_path / "out"
    predict(photos, out, unet, "--csv")
    (photos / "a.png").write_bytes(b"damaged")
    assert predict(photos, out, unet, "--resume") == 1
    assert not (out / "a.png_mask.png").exists()
    assert "a.png" not in (out / "predictions.csv").read_text(encoding="utf-8")


def test_what_a_killed_run_did_not_reach_is_still_known_as_its_own(photos, unet, tmp_path, monkeypatch):
    out = tmp_path / "out"
    predict(photos, out, unet)

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nnunetv2_dermomamba.predict.stream.render", kill)
    assert predict(photos, out, unet) == 130
    monkeypatch.undo()
    assert predict(photos, out, unet, "--resume") == 0
    assert len(list(out.rglob("*_mask.png"))) == 3


def test_results_of_other_photographs_remain_replaceable(photos, unet, tmp_path):
    out = tmp_path / "out"
    for source in (photos / "a.jpg", photos / "sub dir" / "皮膚.webp", photos / "a.jpg"):
        assert predict(source, out, unet) == 0
    assert set(tree(out)) == {"a_mask.png", "皮膚_mask.png", JOURNAL_FILE}


@pytest.mark.parametrize("source", [".", "**/*.[jpw]*"])
def test_results_among_the_photographs_are_no_photographs(photos, unet, tmp_path, source):
    (photos / "list.txt").write_text("a.jpg\na.png\n")
    assert predict(photos / "list.txt", photos, unet, "--overlay") == 0
    assert predict(photos, photos / "sub dir" / "masks", unet, "--overlay", "--probabilities") == 0
    assert predict(photos / source, tmp_path / "out", unet) == 0
    assert {name for name in tree(tmp_path / "out") if name != JOURNAL_FILE} == {
        "a.jpg_mask.png",
        "a.png_mask.png",
        "sub dir/皮膚_mask.png",
    }


@pytest.mark.parametrize("source", ["a.jpg", "list.txt"])
@pytest.mark.parametrize("there", ["a_mask.png", "a_overlay.jpg", "a_probability.png"])
def test_files_that_are_no_results_are_not_replaced(photos, unet, tmp_path, capsys, source, there):
    (photos / "list.txt").write_text("a.jpg\n")
    (photos / there).write_text("drawn by hand")
    before = tree(photos)
    assert predict(photos / source, photos, unet, "--overlay", "--probabilities", "--resume") == 2
    assert f"{there}' exists and is no result of an earlier run" in capsys.readouterr().err
    assert tree(photos) == before


@pytest.mark.parametrize("there", ["failed.txt", "predictions.csv"])
def test_a_table_or_list_that_is_not_the_runs_is_not_replaced(photos, unet, tmp_path, capsys, there):
    out = tmp_path / "out"
    out.mkdir()
    (out / there).write_text("mine")
    assert predict(photos, out, unet, "--csv") == 2
    assert f"{there}' exists" in capsys.readouterr().err
    assert tree(out) == {there: b"mine"}


@pytest.mark.parametrize("there", ["failed.txt", "predictions.csv"])
def test_nor_is_one_that_was_put_among_earlier_results(photos, unet, tmp_path, capsys, there):
    out = tmp_path / "out"
    (photos / "broken.jpg").write_bytes(b"no photograph")
    for options in ([], ["--csv"], ["--csv", "--resume"]):  # a run's own table and list are replaced
        assert predict(photos, out, unet, *options) == 1
    (out / there).write_text("mine")
    before = tree(out)
    for options in ([], ["--resume"]):
        assert predict(photos, out, unet, *options) == 2
        assert f"{there}' exists and is no result of an earlier run" in capsys.readouterr().err
        assert tree(out) == before


def test_an_earlier_result_that_is_a_photograph_now_is_not_removed(photos, unet, capsys):
    listed = photos / "list.txt"
    listed.write_text("a.jpg\n")
    assert predict(listed, photos, unet, "--overlay") == 0
    listed.write_text("a.jpg\na_overlay.jpg\n")
    before = tree(photos)
    assert predict(listed, photos, unet) == 2
    assert "would overwrite a photograph" in capsys.readouterr().err
    assert tree(photos) == before


def test_one_run_at_a_time_in_an_output_folder(photos, unet, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out, AssertionError()):
        assert predict(photos, out, unet) == 2
    assert f"another prediction is at work in {str(out)!r}" in capsys.readouterr().err
    assert tree(out) == {}
    assert predict(photos, out, unet) == 0


@pytest.mark.parametrize(("killed", "at_work"), [(".", "sub dir"), ("sub dir", ".")])
def test_a_resumed_run_leaves_what_another_one_is_writing_above_or_below(photos, unet, tmp_path, killed, at_work):
    out, source = tmp_path / "out" / killed, photos / killed
    assert predict(source, out, unet) == 0
    with whole_file(next(out.rglob("皮膚_mask.png"))) as left:
        left.write_bytes(b"whole")
    left.write_bytes(b"part")  # as a kill leaves it
    with whole_file(tmp_path / "out" / "sub dir" / "b_mask.png") as writing:
        writing.write_bytes(b"part")
        with locked(tmp_path / "out" / at_work, AssertionError()):
            assert predict(source, out, unet, "--resume") == 0
        assert writing.exists()
    assert not left.exists()


def test_results_of_another_model_are_not_resumed(photos, unet, model, tmp_path, capsys):
    predict(photos, tmp_path / "out", unet)
    before = tree(tmp_path / "out")
    assert predict(photos, tmp_path / "out", model, "--resume") == 2
    assert "made with another model" in capsys.readouterr().err
    assert predict(photos, tmp_path / "out", unet, "--resume", "--disable_tta") == 2
    assert tree(tmp_path / "out") == before


def test_a_photograph_is_never_overwritten(photos, unet, tmp_path, capsys):
    shutil.copy(photos / "a.png", photos / "a_mask.png")
    (photos / "a.png").unlink()
    (photos / "list.txt").write_text("a.jpg\na_mask.png\n")
    before = tree(photos)
    assert predict(photos / "list.txt", photos, unet) == 2
    assert "overwrite a photograph" in capsys.readouterr().err
    assert tree(photos) == before


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_full_or_read_only_meanwhile_stops_the_run_without_half_files(
    photos, unet, tmp_path, capsys, monkeypatch, number
):
    whole = os.replace

    def full(source, target):
        if str(target).endswith("皮膚_mask.png"):
            raise OSError(number, os.strerror(number), str(target))
        whole(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert predict(photos, tmp_path / "out", unet) == 2
    message = capsys.readouterr().err
    assert os.strerror(number) in message
    assert "--resume" in message
    assert set(tree(tmp_path / "out")) == {"a.jpg_mask.png", "a.png_mask.png", JOURNAL_FILE}
    monkeypatch.undo()
    assert predict(photos, tmp_path / "out", unet, "--resume") == 0
    assert "1 mask written" in capsys.readouterr().out


def test_a_gpu_whose_memory_is_full_meanwhile_stops_the_run_with_a_message(photos, unet, tmp_path, capsys, monkeypatch):
    network = Predictor.network

    def full(predictor, prepared):
        if prepared.shape == (130, 70):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return network(predictor, prepared)

    monkeypatch.setattr(Predictor, "network", full)
    assert predict(photos, tmp_path / "out", unet) == 2
    assert "error: CUDA out of memory. What is complete was kept; go on with --resume" in capsys.readouterr().err
    monkeypatch.undo()
    assert predict(photos, tmp_path / "out", unet, "--resume") == 0
    assert len(list((tmp_path / "out").rglob("*_mask.png"))) == 3


def test_names_too_long_for_their_results_are_reported(photos, unet, tmp_path):
    Image.fromarray(photograph((64, 64))).save(photos / f"{'x' * 250}.png")
    assert predict(photos, tmp_path / "out", unet) == 1
    assert "too long by 4 bytes" in (tmp_path / "out" / "failed.txt").read_text()


@pytest.mark.parametrize("options", [["-i", "missing"], ["-m", "missing"], ["-f", "7"], ["-chk", "other.pth"]])
def test_what_cannot_start_exits_with_2(photos, unet, tmp_path, capsys, options):
    assert predict(photos, tmp_path / "out", unet, *options) == 2
    assert "dermomamba predict: error: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_scan_backend_is_said_once(photos, model, tmp_path, capsys):
    assert predict(photos, tmp_path / "out", model, "-f", "0", "--disable_tta") == 0
    assert capsys.readouterr().err.lower().count("backend") == 1


@pytest.mark.faults
def test_killed_at_random_moments_and_resumed_it_is_as_if_never_killed(photos, unet, tmp_path):
    for number in range(12):
        Image.fromarray(photograph((96, 128), number)).save(photos / f"more{number}.jpg")
    assert predict(photos, tmp_path / "whole", unet, "--probabilities") == 0
    command = [sys.executable, "-m", "nnunetv2_dermomamba.cli", "predict", "-i", str(photos), "-m", str(unet)]
    command += ["-o", str(tmp_path / "out"), "-device", "cpu", "--resume", "--probabilities"]
    rng = np.random.default_rng(0)
    for _ in range(8):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        done = len(list((tmp_path / "out").rglob("*_mask.png")))
        while process.poll() is None and len(list((tmp_path / "out").rglob("*_mask.png"))) <= done:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        for file in (tmp_path / "out").rglob("*_mask.png"):
            Image.open(file).load()
    assert subprocess.run(command, check=False).returncode == 0
    whole, resumed = tree(tmp_path / "whole"), tree(tmp_path / "out")
    assert whole.pop(JOURNAL_FILE)
    assert resumed.pop(JOURNAL_FILE)
    assert resumed == whole


def refuse_to_write(monkeypatch, folder):
    """Makes the folder a read-only one, for root too."""

    def refuse(dir, **kwargs):
        assert dir == folder
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)


@pytest.mark.parametrize("exists", [True, False])
def test_an_output_folder_that_cannot_be_written_is_said_before_the_model_is_read(
    photos, tmp_path, capsys, monkeypatch, exists
):
    locked = tmp_path / "locked"
    locked.mkdir()
    refuse_to_write(monkeypatch, locked)
    out = locked if exists else locked / "new" / "out"
    assert predict(photos, out, tmp_path / "no model") == 2
    error = capsys.readouterr().err
    assert f"{str(out)!r} cannot be written" in error
    assert "Permission denied. Nothing was started; give another folder with -o" in error
    assert "--resume" not in error
    assert not list(locked.iterdir())


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_cannot_be_written(photos, tmp_path, capsys):
    (tmp_path / "out").mkdir(mode=0o500)
    assert predict(photos, tmp_path / "out" / "masks", tmp_path / "no model") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_as_output_folder_cannot_be_written(photos, tmp_path, capsys):
    (tmp_path / "out").write_text("kept")
    assert predict(photos, tmp_path / "out", tmp_path / "no model") == 2
    assert "cannot be written" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "kept"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_said_before_the_model_is_read(photos, tmp_path, capsys, monkeypatch, device):
    monkeypatch.setattr(getattr(torch, device), "device_count", lambda: 0)
    assert predict(photos, tmp_path / "out", tmp_path / "no model", "-device", device) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"no device '{device}' on this machine; use -device cpu" in line
    assert not (tmp_path / "out").exists()
