"""examples/demo.py's care for the folders it is given; `make demo` runs the whole of it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from masks import disc, save_mask

from nnunetv2_dermomamba.synthetic import write_isic2018_layout

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


@pytest.fixture
def demo(monkeypatch):
    """The script as a module that stops before its first command."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import demo

    def stop(*_):
        raise InterruptedError("the first command")

    monkeypatch.setattr(demo, "run", stop)
    return demo


def start(demo, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["demo.py", *map(str, options)])
    demo.main()


def kept_file(folder):
    """A user's file in a folder that the demo would empty."""
    file = folder / "nnUNet_raw" / "Dataset001_Mine" / "dataset.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"mine": True}))
    return file


def test_a_folder_of_anything_else_is_refused(demo, monkeypatch, tmp_path):
    file = kept_file(tmp_path / "work")
    with pytest.raises(SystemExit, match="holds something else than a demo"):
        start(demo, monkeypatch, "--folder", tmp_path / "work")
    assert file.exists()
    with pytest.raises(SystemExit, match="holds something else than a demo"):
        start(demo, monkeypatch, "--folder", file)


def test_the_demos_own_folder_is_emptied(demo, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "TRAINING", 1)
    folder = tmp_path / "demo"
    folder.mkdir()
    for _ in range(2):
        with pytest.raises(InterruptedError):
            start(demo, monkeypatch, "--folder", folder)
        assert (folder / "source").is_dir()
        left = folder / "predictions" / "old.png"
        assert not left.exists()
        left.parent.mkdir()
        left.touch()


@pytest.mark.parametrize("part", ["source", "nnUNet_raw"])
def test_a_link_is_removed_and_not_followed(demo, monkeypatch, tmp_path, part):
    monkeypatch.setattr(demo, "TRAINING", 1)
    mine = tmp_path / "mine"
    write_isic2018_layout(mine, 2)
    before = {file: file.read_bytes() for file in mine.rglob("*.*")}
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / demo.MARKER).touch()
    (folder / part).symlink_to(mine)
    with pytest.raises(InterruptedError):
        start(demo, monkeypatch, "--folder", folder)
    assert not (folder / part).is_symlink()
    assert {file: file.read_bytes() for file in mine.rglob("*.*")} == before


@pytest.mark.parametrize("source", ["demo/source", "demo/../demo"])
def test_a_source_behind_a_link_that_would_be_removed_is_refused(demo, monkeypatch, tmp_path, source):
    folder = tmp_path / "demo"
    write_isic2018_layout(tmp_path / "mine", demo.HELD_OUT + demo.FOLDS)
    folder.mkdir()
    (folder / demo.MARKER).touch()
    (folder / "source").symlink_to(tmp_path / "mine")
    with pytest.raises(SystemExit, match="would be emptied"):
        start(demo, monkeypatch, "--folder", folder, "--source", tmp_path / source)
    assert (folder / "source").is_symlink()


def test_a_wrong_source_is_said_before_anything_is_removed(demo, monkeypatch, tmp_path):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / demo.MARKER).touch()
    file = kept_file(folder)
    with pytest.raises(SystemExit, match="does not exist"):
        start(demo, monkeypatch, "--folder", folder, "--source", tmp_path / "missing")
    write_isic2018_layout(tmp_path / "few", 2)
    with pytest.raises(SystemExit, match="too few for the demo"):
        start(demo, monkeypatch, "--folder", folder, "--source", tmp_path / "few")
    assert file.exists()


@pytest.mark.parametrize("source", ["demo/source", "."])
def test_a_source_that_would_be_removed_is_refused(demo, monkeypatch, tmp_path, source):
    folder = tmp_path / "demo"
    write_isic2018_layout(folder / "source", demo.HELD_OUT + demo.FOLDS)
    (folder / demo.MARKER).touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit, match="would be emptied"):
        start(demo, monkeypatch, "--folder", folder, "--source", tmp_path / source)
    assert sorted(folder.rglob("*")) == before


def test_real_pairs_are_linked(demo, monkeypatch, tmp_path):
    write_isic2018_layout(tmp_path / "archive", demo.HELD_OUT + demo.FOLDS)
    with pytest.raises(InterruptedError):
        start(demo, monkeypatch, "--folder", tmp_path / "demo", "--source", tmp_path / "archive")
    links = [path for path in (tmp_path / "demo" / "source").rglob("*.*") if path.is_file()]
    assert len(links) == 2 * (demo.HELD_OUT + demo.FOLDS)
    assert all(path.resolve().is_relative_to(tmp_path / "archive") for path in links)


@pytest.mark.filterwarnings("error")
def test_the_dice_is_the_evaluations(demo, tmp_path):
    save_mask(tmp_path / "a.png", disc())
    save_mask(tmp_path / "none.png", disc() & False)
    assert demo.dice(tmp_path / "a.png", tmp_path / "a.png") == 1
    assert np.isnan(demo.dice(tmp_path / "none.png", tmp_path / "none.png"))
