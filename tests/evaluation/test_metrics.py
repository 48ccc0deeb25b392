import math

import numpy as np
import pytest
from masks import blob, disc
from scipy.spatial.distance import cdist

from nnunetv2_dermomamba.evaluation.metrics import (
    AUTHORS_THRESHOLD,
    contour_metrics,
    mask_metrics,
    overlap_metrics,
    probability_metrics,
)

UNDEFINED_IF_BOTH_EMPTY = ["dice", "iou", "precision", "recall", "hd95", "assd", "boundary_f1"]


def naive_contour(mask):
    """Pixels of the mask with a 4-neighbour outside it, one by one."""
    height, width = mask.shape
    found = []
    for y, x in np.argwhere(mask):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        if any(not (0 <= a < height and 0 <= b < width) or not mask[a, b] for a, b in around):
            found.append((y, x))
    return np.array(found)


def naive_contour_metrics(prediction, truth, tolerance):
    distances = cdist(naive_contour(prediction), naive_contour(truth))
    to_truth, to_prediction = distances.min(axis=1), distances.min(axis=0)
    limit = tolerance * math.hypot(*truth.shape)
    p, r = (to_truth <= limit).mean(), (to_prediction <= limit).mean()
    return {
        "hd95": max(np.percentile(to_truth, 95), np.percentile(to_prediction, 95)),
        "assd": (to_truth.sum() + to_prediction.sum()) / (len(to_truth) + len(to_prediction)),
        "boundary_f1": 2 * p * r / (p + r),
    }


@pytest.mark.parametrize("seed", range(8))
def test_contour_metrics_agree_with_brute_force(seed):
    rng = np.random.default_rng(seed)
    prediction, truth = blob(rng, 48, 64), blob(rng, 48, 64)
    expected = naive_contour_metrics(prediction, truth, 0.02)
    assert contour_metrics(prediction, truth, 0.02) == pytest.approx(expected, rel=1e-12)


def test_contour_metrics_agree_with_monai():
    """``make references`` installs MONAI where it can."""
    metrics = pytest.importorskip("monai.metrics")
    import torch

    rng = np.random.default_rng(0)
    for _ in range(5):
        prediction, truth = blob(rng), blob(rng)
        tensors = [torch.from_numpy(np.stack([~mask, mask])[None]) for mask in (prediction, truth)]
        hd95 = metrics.compute_hausdorff_distance(*tensors, percentile=95).item()
        assd = metrics.compute_average_surface_distance(*tensors, symmetric=True).item()
        ours = contour_metrics(prediction, truth)
        assert (ours["hd95"], ours["assd"]) == pytest.approx((hd95, assd), abs=1e-3)  # MONAI interpolates in float32


def test_overlap_by_hand():
    counts = {"tp": 6, "fp": 2, "fn": 3, "tn": 9}
    assert overlap_metrics(counts) == pytest.approx(
        {
            "dice": 12 / 17,
            "iou": 6 / 11,
            "precision": 6 / 8,
            "recall": 6 / 9,
            "specificity": 9 / 11,
            "thresholded_jaccard": 0,
        }
    )


@pytest.mark.parametrize(("tp", "expected"), [(64, 0.0), (65, 0.65), (66, 0.66)])
def test_jaccard_threshold_includes_065(tp, expected):
    assert overlap_metrics({"tp": tp, "fp": 100 - tp, "fn": 0, "tn": 0})["thresholded_jaccard"] == expected


def test_identical_masks_are_perfect():
    mask = disc()
    scores = mask_metrics(mask, mask)
    assert all(scores[m] == 1 for m in ("dice", "iou", "precision", "recall", "specificity", "boundary_f1"))
    assert scores["hd95"] == scores["assd"] == 0


def test_both_empty_is_undefined_except_for_the_challenge():
    empty = np.zeros((8, 9), dtype=bool)
    scores = mask_metrics(empty, empty)
    assert all(math.isnan(scores[metric]) for metric in UNDEFINED_IF_BOTH_EMPTY)
    assert scores["thresholded_jaccard"] == scores["specificity"] == 1


@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_counts_as_a_miss(swap):
    masks = [np.zeros((30, 40), dtype=bool), disc(30, 40, (15, 20), 8)]
    scores = mask_metrics(*(reversed(masks) if swap else masks))
    assert all(scores[m] == 0 for m in ("dice", "iou", "precision", "recall", "thresholded_jaccard", "boundary_f1"))
    assert scores["hd95"] == scores["assd"] == 50


def test_no_background_leaves_specificity_undefined():
    full = np.ones((8, 9), dtype=bool)
    assert math.isnan(mask_metrics(full, full)["specificity"])


def test_boundary_tolerance_is_a_share_of_the_diagonal():
    truth = np.zeros((300, 400), dtype=bool)
    truth[100:200, 100:200] = True
    shifted = np.roll(truth, 5, axis=1)
    assert contour_metrics(shifted, truth, 5 / 500)["boundary_f1"] == 1
    assert contour_metrics(shifted, truth, 4.99 / 500)["boundary_f1"] < 1


def test_soft_dice_by_hand():
    probability = np.array([[0.9, 0.61, 0.63, 0.0]], dtype=np.float32)
    truth = np.array([[True, True, False, False]])
    scores = probability_metrics(probability, truth)
    assert scores["soft_dice"] == pytest.approx(2 * 1.51 / (2.14 + 2))
    assert 0.61 < AUTHORS_THRESHOLD < 0.63
    assert scores["authors_precision"] == scores["authors_recall"] == 0.5


def test_soft_dice_of_a_mask_is_its_dice():
    rng = np.random.default_rng(1)
    prediction, truth = blob(rng), blob(rng)
    scores = probability_metrics(prediction.astype(np.float32), truth)
    assert scores["soft_dice"] == pytest.approx(mask_metrics(prediction, truth)["dice"], rel=1e-12)


def test_soft_dice_of_empty_images_is_undefined_as_their_dice_is():
    empty, low = np.zeros((8, 9), dtype=bool), np.full((8, 9), 0.01, np.float32)
    for probability in (np.zeros((8, 9), np.float32), low, np.full((8, 9), 0.5, np.float32)):
        assert all(math.isnan(score) for score in probability_metrics(probability, empty).values())
    lesion = np.where(disc(8, 9, (4, 4), 2), np.float32(0.6), low)
    assert probability_metrics(lesion, empty)["soft_dice"] == 0
    assert 0 < probability_metrics(low, disc(8, 9, (4, 4), 2))["soft_dice"] < 0.05


def test_wrong_arrays_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 4\) and \(4, 3\)"):
        mask_metrics(np.zeros((3, 4), bool), np.zeros((4, 3), bool))
    with pytest.raises(ValueError, match="uint8"):
        mask_metrics(np.zeros((3, 4), np.uint8), np.zeros((3, 4), bool))
