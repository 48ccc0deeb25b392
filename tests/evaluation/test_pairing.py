from pathlib import Path

import pytest

from nnunetv2_dermomamba.evaluation.pairing import (
    MASK_ENDINGS,
    MASK_EXTENSIONS,
    PairingError,
    case_id,
    index_images,
    index_masks,
    index_probabilities,
    pair,
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ISIC_0000000.png", "ISIC_0000000"),
        ("ISIC_0000000_segmentation.png", "ISIC_0000000"),
        ("ISIC_0000000_segmentation_prediction.png", "ISIC_0000000"),
        ("ISIC_0000000_Mask.PNG", "ISIC_0000000"),
        ("IMD002_lesion.bmp", "IMD002"),
        ("ISIC_0000000.nii.gz", "ISIC_0000000"),
        ("clinic/a.b_mask.tiff", "clinic/a.b"),
        ("_mask.png", "_mask"),
        ("summary.json", None),
        ("photo.jpg", None),
    ],
)
def test_case_id(name, expected):
    assert case_id(Path(name), MASK_EXTENSIONS, MASK_ENDINGS) == expected


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_pairs_missing_extra_and_ignored(tmp_path):
    truth = touch(tmp_path / "g", "a_segmentation.png", "b.png", "x/c_lesion.bmp", "notes.txt")
    masks = touch(tmp_path / "p", "a_mask.png", "x/c.nii.gz", "d.png", "summary.json", "a_overlay.png", "a.npz")
    images = touch(tmp_path / "i", "a.webp", "b_0000.png")
    pairing = pair(masks, truth, masks, images)
    assert [case.name for case in pairing.cases] == ["a", "b", "x/c"]
    assert pairing.missing == ["b"]
    assert list(pairing.extra) == ["d"]
    assert {path.name for path in pairing.ignored} == {"notes.txt", "summary.json", "a_overlay.png", "a.npz"}
    assert pairing.cases[0].probabilities == {None: masks / "a.npz"}
    assert [case.image and case.image.name for case in pairing.cases] == ["a.webp", "b_0000.png", None]


def test_two_masks_of_one_case_are_refused_by_name(tmp_path):
    with pytest.raises(PairingError, match=r"case a: .*a\.png and .*a_mask\.png"):
        index_masks(touch(tmp_path, "a.png", "a_mask.png"))


def test_maps_and_masks_may_share_a_folder(tmp_path):
    folder = touch(tmp_path, "a_mask.png", "a_probability.png", "a_overlay.png")
    assert index_probabilities(folder) == {"a": {None: folder / "a_probability.png"}}
    assert list(index_masks(folder)[0]) == ["a"]


def test_what_predict_writes_beside_masks_is_passed_over_and_other_files_are_not(tmp_path):
    written = ["a_overlay.jpg", "a_probability.png", "b_probability_2.png", "predictions.csv", "failed.txt"]
    foreign = [
        "a_overlay.png",
        "summary.json",
        "photo.jpg",
        "other.csv",
        "notes.txt",
        "a_prob.png",
        "b_probability_all.npz",
    ]
    written += [".dermomamba_predict.jsonl", "dataset.json", "plans.json", "predict_from_raw_data_args.json"]
    masks, ignored = index_masks(touch(tmp_path, "a_mask.png", *written, *foreign))
    assert list(masks) == ["a"]
    assert {path.name for path in ignored} == set(foreign)


def test_each_class_may_have_a_map(tmp_path):
    folder = touch(tmp_path, "a_mask.png", "a_probability_1.png", "a_probability_2.png", "b_7_mask.png")
    assert index_probabilities(folder) == {"a": {k: folder / f"a_probability_{k}.png" for k in (1, 2)}}
    assert list(index_masks(folder)[0]) == ["a", "b_7"]


def test_two_maps_of_one_class_are_refused(tmp_path):
    with pytest.raises(PairingError, match=r"case a: .*a_prob_1\.png and .*a_probability_1\.png"):
        index_probabilities(touch(tmp_path, "a_prob_1.png", "a_probability_1.png"))


def test_plain_names_are_maps_in_a_folder_of_their_own(tmp_path):
    assert list(index_probabilities(touch(tmp_path, "a.png", "b.png"))) == ["a", "b"]


def test_a_camera_counter_is_no_channel(tmp_path):
    assert list(index_images(touch(tmp_path, "IMG_0000.jpg", "IMG_0001.jpg"))) >= ["IMG", "IMG_0000", "IMG_0001"]


@pytest.mark.parametrize("names", [(), ("readme.txt",)])
def test_a_folder_without_masks_is_refused(tmp_path, names):
    with pytest.raises(PairingError, match=r"no mask in .*\.bmp"):
        index_masks(touch(tmp_path, *names))


def test_no_match_shows_both_sides(tmp_path):
    with pytest.raises(PairingError, match=r"has a.*has b"):
        pair(touch(tmp_path / "p", "a.png"), touch(tmp_path / "g", "b.png"))


def test_a_ground_truth_one_folder_below_is_named(tmp_path):
    predictions = touch(tmp_path / "predictions", "a.png", "b.png")
    below = touch(tmp_path / "data", "masks/a.png", "masks/b.png", "images/a.jpg")
    with pytest.raises(PairingError, match=r"give -g '.*data/masks'"):
        pair(predictions, below)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(PairingError, match="is not a folder"):
        index_masks(tmp_path / "nowhere")


def test_masks_predicted_from_nnunets_images_belong_to_its_cases(tmp_path: Path) -> None:
    predictions = touch(tmp_path / "p", "a_0000_mask.png", "b_0000.png", "b.png", "c_0000.png")
    truth = touch(tmp_path / "t", "a.png", "b.png", "c_0000.png")
    pairing = pair(predictions, truth)
    predicted = {case.name: case.prediction and case.prediction.name for case in pairing.cases}
    assert predicted == {"a": "a_0000_mask.png", "b": "b.png", "c_0000": "c_0000.png"}
    assert list(pairing.extra) == ["b_0000"]
