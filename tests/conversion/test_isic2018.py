import json

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.conversion.errors import SourceNotFoundError
from nnunetv2_dermomamba.conversion.isic2018 import ARCHIVES, find_isic2018, main


def test_found_from_above_and_below(isic):
    isic.add("ISIC_0000001")
    above, below = isic.root.parent, isic.files("ISIC_0000001")[0].parent
    for source in (isic.root, above, below, isic.files("ISIC_0000001")[1].parent):
        assert [case.case_id for case in find_isic2018(source).cases] == ["ISIC_0000001"]


def test_what_lies_beside_the_images_is_ignored(isic):
    isic.add("ISIC_0000001")
    image = isic.files("ISIC_0000001")[0]
    for name in ("ATTRIBUTION.txt", "ISIC_0000001_superpixels.png", "._ISIC_0000001.jpg"):
        (image.parent / name).touch()
    assert not find_isic2018(isic.root).problems


def test_plain_folders(tmp_path):
    for folder, name in (("images", "a.jpg"), ("masks", "a_segmentation.png")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
    assert [case.case_id for case in find_isic2018(tmp_path).cases] == ["a"]


def test_masks_missing_altogether(isic):
    isic.add("ISIC_0000001")
    mask = isic.files("ISIC_0000001")[1]
    mask.unlink()
    mask.parent.rmdir()
    with pytest.raises(SourceNotFoundError, match=mask.parent.name):
        find_isic2018(isic.root)


def test_missing_source_names_archives_and_place(nnunet, capsys):
    source = nnunet / "nothing" / "here"
    assert main([], default_source=source) == 2
    message = capsys.readouterr().err
    for archive in ARCHIVES:
        assert f"{archive}.zip" in message
    assert str(source) in message
    assert not (nnunet / "nnUNet_raw").exists()


def test_converts_all_subsets(isic, nnunet):
    isic.add("ISIC_0000001", "ISIC_0000002")
    isic.add("ISIC_0000003", subset="validation")
    isic.add("ISIC_0000004", subset="test")
    mask = isic.files("ISIC_0000004", "test")[1]
    mask.unlink()
    mask.parent.rmdir()
    assert main(["--source", str(isic.root), "--workers", "1"]) == 0
    folder = nnunet / "nnUNet_raw" / "Dataset118_ISIC2018"
    assert {str(file.relative_to(folder)) for file in folder.rglob("*.png")} == {
        "imagesTr/ISIC_0000001_0000.png",
        "imagesTr/ISIC_0000002_0000.png",
        "imagesTs/ISIC_0000003_0000.png",
        "imagesTs/ISIC_0000004_0000.png",
        "labelsTr/ISIC_0000001.png",
        "labelsTr/ISIC_0000002.png",
        "labelsTs/ISIC_0000003.png",
    }
    for file in folder.rglob("*.png"):
        pixels = np.asarray(Image.open(file))
        if file.parent.name.startswith("images"):
            assert pixels.shape == (192, 256, 3)
        else:
            assert pixels.shape == (192, 256)
            assert set(np.unique(pixels)) == {0, 1}
    description = json.loads((folder / "dataset.json").read_text())
    assert description["numTraining"] == 2
    assert description["channel_names"] == {"0": "R", "1": "G", "2": "B"}
    assert description["labels"] == {"background": 0, "lesion": 1}
    assert description["dermomamba_conversion"]["size"] == [192, 256]
    cases = json.loads((folder / "conversion.json").read_text())["cases"]
    assert [(c["case"], c["subset"], c["original_shape"]) for c in cases] == [
        ("ISIC_0000001", "training", [72, 96]),
        ("ISIC_0000002", "training", [72, 96]),
        ("ISIC_0000003", "validation", [72, 96]),
        ("ISIC_0000004", "test", [72, 96]),
    ]


def test_paper_split_needs_enough_cases_and_is_checked_first(isic, nnunet, capsys):
    isic.add("ISIC_0000001")
    assert main(["--source", str(isic.root), "--paper-split"]) == 1
    assert "524" in capsys.readouterr().err
    assert not (nnunet / "nnUNet_raw").exists()


def test_paper_split_is_written_where_nnunet_reads_it(isic, nnunet):
    isic.add("ISIC_0000000")
    image, mask = isic.files("ISIC_0000000")
    for number in range(1, 524):
        for file, copy in zip((image, mask), isic.files(f"ISIC_{number:07d}"), strict=True):
            copy.symlink_to(file)
    assert main(["--source", str(isic.root), "--paper-split", "--size", "4x6", "--workers", "1"]) == 0
    splits = json.loads((nnunet / "nnUNet_preprocessed" / "Dataset118_ISIC2018" / "splits_final.json").read_text())
    assert [len(fold["val"]) for fold in splits] == [520, 1, 1, 1, 1]
