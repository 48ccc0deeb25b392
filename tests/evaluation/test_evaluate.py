import json
import os
import shutil
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import pandas as pd
import pytest
from masks import disc, save_mask, save_pairs
from PIL import Image

from nnunetv2_dermomamba.cli import main
from nnunetv2_dermomamba.cost import Cost
from nnunetv2_dermomamba.evaluation import pairing
from nnunetv2_dermomamba.evaluation.evaluate import Settings, evaluate
from nnunetv2_dermomamba.evaluation.metrics import mask_metrics
from nnunetv2_dermomamba.evaluation.output import metric_rows, paper_rows, read_csv


def run(*arguments):
    return main(["evaluate", "-np", "1", *map(str, arguments)])


@pytest.fixture
def pairs(tmp_path):
    return save_pairs(tmp_path)


def test_table_csv_and_json(pairs, tmp_path, capsys):
    masks, truth = pairs
    csv, summary = tmp_path / "out" / "cases.csv", tmp_path / "summary.json"
    assert run("-p", masks, "-g", truth, "--csv", csv, "--json", summary) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[0].split() == ["DSC", "IoU", "Precision", "Recall"]
    assert "6 of 6 cases scored." in text

    frame = read_csv(csv)
    assert frame["case"].tolist() == [f"case_{i}" for i in range(6)]
    first = [np.asarray(Image.open(f)) > 0 for f in (masks / "case_0_mask.png", truth / "case_0_segmentation.png")]
    assert frame.iloc[0][list(mask_metrics(*first))].to_dict() == pytest.approx(mask_metrics(*first))

    read = json.loads(summary.read_text())
    mean = read["figures"]["1"]["per_image"]["dice"]
    assert mean["value"] == pytest.approx(frame["dice"].mean())
    assert mean["low"] is None  # of six images
    assert "Fewer than 10 cases: there are no 95 % intervals." in text
    pooled = 2 * frame["tp"].sum() / (2 * frame["tp"] + frame["fp"] + frame["fn"]).sum()
    assert read["figures"]["1"]["pooled"]["dice"]["value"] == pytest.approx(pooled)
    assert f"{100 * mean['value']:.2f}" in text
    assert f"{100 * pooled:.2f}" in text
    assert len(read["cases"]) == 6


def test_ten_images_have_intervals(tmp_path):
    evaluation = evaluate(*save_pairs(tmp_path, count=10))
    assert paper_rows(evaluation, 1, None)[2][0] == "  95 % interval"
    assert all(" to " in row[3] for row in metric_rows(evaluation, 1)[1:])


def test_the_networks_size_stands_before_the_figures(pairs):
    cost = Cost(4_953_425, 10**9, 2 * 10**9, 0, 0)
    head, *rows = paper_rows(evaluate(*pairs), 1, cost)
    assert head == ["", "Params (M)", "Ops (G)", "DSC", "IoU", "Precision", "Recall"]
    assert rows[0][1:3] == ["4.95", "3.00"]
    assert {len(row) for row in rows} == {len(head)}


def test_processes_give_the_same(pairs):
    masks, truth = pairs
    alone, together = evaluate(masks, truth), evaluate(masks, truth, processes=2)
    assert alone.frame.equals(together.frame)


def test_0_1_and_0_255_give_the_same(tmp_path):
    frames = [evaluate(*save_pairs(tmp_path / str(f), foreground=f)).frame for f in (1, 255)]
    assert frames[0].equals(frames[1])


@pytest.mark.parametrize(("treatment", "status", "n"), [("fail", 1, 5), ("empty", 0, 6), ("skip", 0, 5)])
def test_a_missing_prediction(pairs, tmp_path, capsys, treatment, status, n):
    masks, truth = pairs
    (masks / "case_2_mask.png").unlink()
    summary = tmp_path / "a.json"
    # Scored as an empty mask the case counts, so nothing is left to complain about.
    assert run("-p", masks, "-g", truth, "--missing", treatment, "--json", summary) == status
    assert "case_2" in capsys.readouterr().out
    read = json.loads(summary.read_text())
    assert read["missing"] == ["case_2"]
    assert read["cases"][2]["status"] == "missing"
    assert read["figures"]["1"]["per_image"]["dice"]["n"] == n
    if treatment == "empty":
        assert read["cases"][2]["dice"] == 0
        assert read["cases"][2]["hd95"] == 160  # the diagonal of 128 x 96


def test_extra_predictions_and_other_files_are_listed(pairs, tmp_path, capsys):
    masks, truth = pairs
    save_mask(masks / "other_mask.png", disc())
    (masks / "notes.txt").touch()
    assert run("-p", masks, "-g", truth, "--json", tmp_path / "a.json") == 0
    text = capsys.readouterr().out
    assert "without ground truth, not scored (1): other" in text
    assert "notes.txt" in text
    assert list(json.loads((tmp_path / "a.json").read_text())["extra"]) == ["other"]


def test_another_size_fails_the_case_unless_resized(pairs, capsys):
    masks, truth = pairs
    path = masks / "case_1_mask.png"
    with Image.open(path) as image:
        image.resize((64, 48), Image.Resampling.NEAREST).save(path)
    assert run("-p", masks, "-g", truth) == 1
    text = capsys.readouterr().out
    assert "case_1_mask.png is 64 x 48 pixels, its ground truth 128 x 96" in text
    assert "5 of 6 cases scored." in text
    assert run("-p", masks, "-g", truth, "--resize") == 0
    whole = evaluate(masks, truth, settings=Settings(resize=True)).frame
    assert whole["dice"].iloc[1] > 0.5


def test_resizing_refuses_a_turned_mask(pairs, capsys):
    masks, truth = pairs
    save_mask(masks / "case_1_mask.png", disc().T)
    assert run("-p", masks, "-g", truth, "--resize") == 1
    assert "other proportions" in capsys.readouterr().out


def test_an_unreadable_mask_does_not_stop_the_rest(pairs, tmp_path, capsys):
    masks, truth = pairs
    (masks / "case_3_mask.png").write_bytes(b"no image")
    assert run("-p", masks, "-g", truth, "--csv", tmp_path / "a.csv") == 1
    assert "case_3_mask.png" in capsys.readouterr().out
    frame = read_csv(tmp_path / "a.csv")
    assert frame["status"].tolist() == ["scored"] * 3 + ["failed"] + ["scored"] * 2
    assert frame["dice"].isna().tolist() == [False] * 3 + [True] + [False] * 2


def test_nothing_to_score_writes_nothing(pairs, tmp_path, capsys):
    masks, truth = pairs
    for path in masks.iterdir():
        path.write_bytes(b"")
    assert run("-p", masks, "-g", truth, "--csv", tmp_path / "a.csv") == 2
    assert "no case could be scored" in capsys.readouterr().err
    assert not (tmp_path / "a.csv").exists()


def test_empty_masks_are_named(pairs, capsys):
    masks, truth = pairs
    nothing = np.zeros((96, 128), dtype=bool)
    save_mask(masks / "case_0_mask.png", nothing)
    save_mask(truth / "case_0_segmentation.png", nothing)
    save_mask(masks / "case_1_mask.png", nothing)
    save_mask(truth / "case_2_segmentation.png", nothing)
    evaluation = evaluate(masks, truth)
    figure = evaluation.figures[1]["per_image"]
    assert (figure["dice"].n, figure["dice"].undefined) == (5, 1)
    assert figure["thresholded_jaccard"].n == 6
    run("-p", masks, "-g", truth)
    text = capsys.readouterr().out
    assert "Empty prediction, empty ground truth (1): case_0" in text
    assert "Empty prediction (1): case_1" in text
    assert "Empty ground truth (1): case_2" in text


def test_several_classes(tmp_path, capsys):
    for name, shift in [("truth", 0), ("masks", 3)]:
        labels = np.where(disc(centre=(48, 64 + shift)), 1, 0) + disc(centre=(48, 64 + shift), radius=10)
        (tmp_path / name).mkdir()
        Image.fromarray(labels.astype(np.uint8)).save(tmp_path / name / "a.png")
    assert run("-p", tmp_path / "masks", "-g", tmp_path / "truth") == 2
    assert "--labels" in capsys.readouterr().err
    assert run("-p", tmp_path / "masks", "-g", tmp_path / "truth", "-l", 1, 2, "--csv", tmp_path / "a.csv") == 0
    assert "Class 2" in capsys.readouterr().out
    assert read_csv(tmp_path / "a.csv")["label"].tolist() == [1, 2]


def test_probabilities_add_the_authors_figures(pairs, tmp_path, capsys):
    masks, truth = pairs
    for path in masks.iterdir():
        mask = np.asarray(Image.open(path)) > 0
        name = path.name.replace("_mask.png", "_probability.png")
        Image.fromarray(np.where(mask, 39321, 26214).astype(np.uint16)).save(masks / name)  # 0.6 and 0.4
    assert run("-p", masks, "-g", truth, "--probabilities", masks, "--csv", tmp_path / "a.csv") == 0
    assert "as the authors' code" in capsys.readouterr().out
    frame = read_csv(tmp_path / "a.csv")
    tp, fp, fn, tn = (frame[key].to_numpy() for key in ("tp", "fp", "fn", "tn"))
    soft = 2 * (0.6 * tp + 0.4 * fn) / (0.6 * (tp + fp) + 0.4 * (fn + tn) + tp + fn)
    assert frame["soft_dice"].to_numpy() == pytest.approx(soft, rel=1e-6)
    assert (frame["authors_recall"] == 0).all()  # a logit of 0.5 is a probability of 0.62
    (masks / "case_0_probability.png").unlink()
    assert run("-p", masks, "-g", truth, "--probabilities", masks) == 1
    assert "no probability map for case_0" in capsys.readouterr().out


def damage(path):
    path.write_bytes(b"no image")


def halve(path):
    Image.new("I;16", (64, 48)).save(path)


def turn(path):
    Image.new("I;16", (96, 128)).save(path)


@pytest.mark.parametrize(
    ("spoil", "options", "reason"),
    [
        (damage, [], "not an image of a known format"),
        (halve, [], "is 64 x 48 pixels, its ground truth 128 x 96"),
        (turn, ["--resize"], "other proportions"),
    ],
)
def test_a_bad_probability_map_costs_only_the_soft_figures(pairs, tmp_path, capsys, spoil, options, reason):
    masks, truth = pairs
    maps = tmp_path / "maps"
    maps.mkdir()
    for i in range(6):
        Image.fromarray(disc().astype(np.uint16) * 65535).save(maps / f"case_{i}_probability.png")
    spoil(maps / "case_2_probability.png")
    command = ["-p", masks, "-g", truth, "--probabilities", maps, "--csv", tmp_path / "a.csv", *options]
    assert run(*command) == 1
    text = capsys.readouterr().out
    assert "6 of 6 cases scored." in text
    line = next(line for line in text.splitlines() if line.startswith("Incomplete (1): "))
    assert str(maps / "case_2_probability.png") in line
    assert "case_2_mask.png" not in text
    assert reason in line
    frame = read_csv(tmp_path / "a.csv")
    assert frame["dice"].notna().all()
    assert frame["soft_dice"].isna().tolist() == [False, False, True, False, False, False]


def test_against_a_folder_and_against_its_table(pairs, tmp_path, capsys):
    masks, truth = pairs
    other, _ = save_pairs(tmp_path / "other", seed=3)
    assert run("-p", other, "-g", truth, "--csv", tmp_path / "other.csv") == 0
    results = []
    for against in (other, tmp_path / "other.csv"):
        assert run("-p", masks, "-g", truth, "--against", against, "--json", tmp_path / "a.json") == 0
        assert "p (Wilcoxon)" in capsys.readouterr().out
        results.append(json.loads((tmp_path / "a.json").read_text())["differences"])
    assert results[0] == results[1]
    assert results[0]["1"]["dice"]["n"] == 6
    (tmp_path / "no.csv").write_text("a,b\n1,2\n")
    assert run("-p", masks, "-g", truth, "--against", tmp_path / "no.csv") == 2
    assert "no.csv is no table" in capsys.readouterr().err


@pytest.fixture
def scores_nothing(monkeypatch):
    """Fails the test if anything is scored."""

    def score(*_, **__):
        raise AssertionError("scored")

    monkeypatch.setattr("nnunetv2_dermomamba.evaluation.evaluate._score_case", score)


def test_a_table_to_compare_with_costs_no_second_search_of_the_ground_truth(pairs, tmp_path, monkeypatch):
    masks, truth = pairs
    assert run("-p", masks, "-g", truth, "--csv", tmp_path / "a.csv") == 0
    searched, search = [], pairing._files
    monkeypatch.setattr(pairing, "_files", lambda folder: searched.append(folder) or search(folder))
    assert run("-p", masks, "-g", truth, "--against", tmp_path / "a.csv") == 0
    assert sorted(searched) == sorted(pairs)


@pytest.mark.parametrize("column", ["label", "case"])
def test_a_table_that_cannot_be_compared_with_is_said_before_anything_is_scored(
    pairs, tmp_path, capsys, request, column
):
    masks, truth = pairs
    assert run("-p", masks, "-g", truth, "--csv", tmp_path / "a.csv") == 0
    frame = pd.read_csv(tmp_path / "a.csv")
    frame[column] = {"label": 2, "case": "case_0"}[column]
    frame.to_csv(tmp_path / "other.csv", index=False)
    request.getfixturevalue("scores_nothing")
    assert run("-p", masks, "-g", truth, "--against", tmp_path / "other.csv") == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "other.csv") in error
    assert {"label": "no scored case of class 1", "case": "case_0 of class 1 more than once"}[column] in error


@pytest.mark.parametrize("option", ["--csv", "--json", "--report"])
@pytest.mark.parametrize("target", ["file/a", "folder"])
def test_a_target_that_cannot_be_written_is_said_before_anything_is_scored(
    pairs, tmp_path, capsys, scores_nothing, option, target
):
    masks, truth = pairs
    (tmp_path / "file").write_text("kept")
    (tmp_path / "folder").mkdir()
    assert run("-p", masks, "-g", truth, option, tmp_path / target) == 2
    error = capsys.readouterr().err.lower()
    assert str(tmp_path / target.split("/")[0]) in error
    assert "nothing was scored" in error


@pytest.mark.parametrize("options", [("--against", "--csv"), ("--csv", "--json"), ("--json", "--report")])
def test_a_file_named_twice_is_refused_before_anything_is_scored(pairs, tmp_path, capsys, request, options):
    masks, truth = pairs
    table = tmp_path / "a.csv"
    assert run("-p", masks, "-g", truth, "--csv", table) == 0
    before = table.read_bytes()
    request.getfixturevalue("scores_nothing")
    named = (options[0], table, options[1], masks / ".." / "a.csv")
    assert run("-p", masks, "-g", truth, *named) == 2
    assert "is named twice and would be overwritten" in capsys.readouterr().err
    assert table.read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode")
def test_names_that_are_not_unicode(pairs, tmp_path, capfd):
    masks, truth = pairs
    shutil.copy(truth / "case_0_segmentation.png", truth / os.fsdecode(b"caf\xe9.png"))
    files = ["--csv", tmp_path / "a.csv", "--json", tmp_path / "a.json", "--report", tmp_path / "a.html"]
    assert run("-p", masks, "-g", truth, *files) == 1
    assert r"Without prediction, not in the figures (1): caf\udce9" in capfd.readouterr().out
    assert r"caf\udce9" in (tmp_path / "a.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"), [(["-l", 0, 1], "0 is background"), (["--boundary-tolerance", -1], "-0.01")]
)
def test_senseless_options_are_refused(pairs, capsys, options, message):
    masks, truth = pairs
    assert run("-p", masks, "-g", truth, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_a_senseless_number_of_processes_is_refused(pairs, capsys, number):
    masks, truth = pairs
    with pytest.raises(SystemExit, match="2"):
        run("-p", masks, "-g", truth, "-np", number)
    assert "-np: " in capsys.readouterr().err


@pytest.mark.parametrize(("cores", "expected"), [(3, 3), (64, 8)])
def test_there_are_as_many_processes_as_cores_that_may_be_used(pairs, capsys, monkeypatch, cores, expected):
    def note(*_, processes, **__):
        raise ValueError(f"{processes} processes")

    monkeypatch.setattr("nnunetv2_dermomamba.evaluation.cli.available_cores", lambda: cores)
    monkeypatch.setattr("nnunetv2_dermomamba.evaluation.evaluate.evaluate", note)
    masks, truth = pairs
    assert main(["evaluate", "-p", str(masks), "-g", str(truth)]) == 2
    assert f"{expected} processes" in capsys.readouterr().err


def test_a_killed_worker_is_reported(pairs, capsys, monkeypatch):
    def killed(*_, **__):
        raise BrokenProcessPool

    monkeypatch.setattr("nnunetv2_dermomamba.evaluation.evaluate.evaluate", killed)
    masks, truth = pairs
    assert run("-p", masks, "-g", truth) == 2
    assert "fewer than -np 1" in capsys.readouterr().err


def test_numeric_case_names_stay_text(tmp_path):
    save_mask(tmp_path / "p" / "007.png", disc())
    save_mask(tmp_path / "g" / "007.png", disc())
    assert run("-p", tmp_path / "p", "-g", tmp_path / "g", "--csv", tmp_path / "a.csv") == 0
    assert read_csv(tmp_path / "a.csv")["case"].tolist() == ["007"]


@pytest.mark.pipeline
def test_same_dice_and_iou_as_nnunet(tmp_path):
    masks, truth = save_pairs(tmp_path, foreground=1)
    for folder in (masks, truth):  # nnU-Net wants one name for both
        for path in list(folder.iterdir()):
            path.rename(folder / f"{path.stem.removesuffix('_mask').removesuffix('_segmentation')}.png")
    nothing = np.zeros((96, 128), dtype=bool)
    save_mask(masks / "case_0.png", nothing)
    save_mask(truth / "case_0.png", nothing)
    save_mask(masks / "case_1.png", nothing)
    dataset = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "lesion": 1},
        "file_ending": ".png",
    }
    (tmp_path / "dataset.json").write_text(json.dumps(dataset))
    (tmp_path / "plans.json").write_text(json.dumps({"label_manager": "LabelManager"}))
    command = [sys.executable, "-c", "from nnunetv2.evaluation.evaluate_predictions import *\n"]
    command[-1] += "if __name__ == '__main__': evaluate_folder_entry_point()"
    options = ["-djfile", tmp_path / "dataset.json", "-pfile", tmp_path / "plans.json", "-np", "1"]
    subprocess.run([*command, truth, masks, *options, "-o", tmp_path / "summary.json"], check=True)
    theirs = json.loads((tmp_path / "summary.json").read_text())

    evaluation = evaluate(masks, truth)
    for metric, key in [("dice", "Dice"), ("iou", "IoU")]:
        per_case = [case["metrics"]["1"][key] for case in theirs["metric_per_case"]]
        assert evaluation.frame[metric].to_numpy() == pytest.approx(per_case, rel=1e-12, nan_ok=True)
        assert evaluation.figures[1]["per_image"][metric].value == pytest.approx(theirs["mean"]["1"][key], rel=1e-12)


def test_each_class_has_its_probability_map(tmp_path, capsys):
    truth = np.zeros((20, 30), np.uint8)
    truth[3:9, 4:12], truth[12:18, 15:25] = 1, 2
    masks, maps = tmp_path / "masks", tmp_path / "maps"
    for folder in (masks, maps):
        folder.mkdir()
    Image.fromarray(truth).save(masks / "a.png")
    for label in (1, 2):
        Image.fromarray(((truth == label) * 65535).astype(np.uint16)).save(maps / f"a_probability_{label}.png")
    command = ["-p", masks, "-g", masks, "--labels", 1, 2, "--probabilities", maps, "--csv", tmp_path / "a.csv"]
    assert run(*command) == 0
    assert read_csv(tmp_path / "a.csv")["soft_dice"].tolist() == pytest.approx([1, 1], abs=1e-3)
    (maps / "a_probability_2.png").unlink()
    assert run(*command) == 1
    assert "no probability map of class 2 for a.png" in capsys.readouterr().out
