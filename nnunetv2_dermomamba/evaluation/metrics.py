"""Metrics of one binary mask against its ground truth, as `DEFINITIONS` and `NOTES` define them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import KDTree

__all__ = [
    "BOUNDARY_TOLERANCE",
    "DEFINITIONS",
    "JACCARD_THRESHOLD",
    "NOTES",
    "confusion",
    "contour_metrics",
    "mask_metrics",
    "overlap_metrics",
    "probability_metrics",
]

JACCARD_THRESHOLD = 0.65  # ISIC 2018 task 1
BOUNDARY_TOLERANCE = 0.0075  # of the image's diagonal, Csurka et al. 2013
AUTHORS_THRESHOLD = 1 / (1 + math.exp(-0.5))  # the DermoMamba code cuts the *logit* at 0.5 for precision and recall

# The report shows both to its readers. TP, FP, FN, TN are the pixel counts of one image and one class.
DEFINITIONS = {
    "dice": "2 TP / (2 TP + FP + FN)",
    "iou": "TP / (TP + FP + FN), the Jaccard index",
    "precision": "TP / (TP + FP)",
    "recall": "TP / (TP + FN), the sensitivity",
    "specificity": "TN / (TN + FP)",
    "thresholded_jaccard": "IoU if it is at least 0.65, else 0: the ranking metric of the ISIC 2018 challenge, task 1",
    "hd95": "larger of the two directed 95th percentiles of contour distance",
    "assd": "average symmetric surface distance: mean over the pixels of both contours",
    "boundary_f1": "F1 of the contour pixels that lie within a tolerance of the other contour (Csurka et al., What is "
    "a good evaluation measure for semantic segmentation?, BMVC 2013)",
    "soft_dice": "2 sum(p g) / (sum p + sum g) with the probability p instead of a mask, and the ground truth g",
    "authors_precision": "precision of the probability cut at a logit of 0.5, as the DermoMamba authors' code cuts it",
    "authors_recall": "recall, cut likewise",
}
NOTES = (
    "Prediction and ground truth both empty: DSC, IoU, precision, recall, distances and boundary F1 are undefined, as "
    "in nnUNetv2_evaluate_folder, left out of means and counted; thresholded Jaccard is 1, as the challenge scores it. "
    "Soft DSC is undefined where the ground truth is empty and no probability is above one half.",
    "Only one of them empty: DSC, IoU, precision, recall and boundary F1 are 0 and both distances are the image's "
    "diagonal, the largest distance possible, so that a missed lesion weighs in every mean.",
    "Ground truth without background: specificity is undefined.",
    "The contour is the set of mask pixels with a 4-neighbour outside the mask; beyond the image's edge counts as "
    "outside. Distances are exact and in pixels of the ground truth.",
)


def confusion(prediction: np.ndarray, ground_truth: np.ndarray) -> dict[str, int]:
    """Pixel counts ``tp``, ``fp``, ``fn``, ``tn`` of two boolean arrays of one shape."""
    tp = int(np.count_nonzero(prediction & ground_truth))
    fp = int(np.count_nonzero(prediction)) - tp
    fn = int(np.count_nonzero(ground_truth)) - tp
    return {"tp": tp, "fp": fp, "fn": fn, "tn": prediction.size - tp - fp - fn}


def overlap_metrics(counts: Mapping[str, int]) -> dict[str, float]:
    """Dice, IoU, precision, recall, specificity and thresholded Jaccard from ``tp``, ``fp``, ``fn``, ``tn``.

    The counts may be of one image or summed over many (pooled).
    """
    tp, fp, fn, tn = (counts[key] for key in ("tp", "fp", "fn", "tn"))
    union = tp + fp + fn
    iou = tp / union if union else math.nan
    return {
        "dice": 2 * tp / (union + tp) if union else math.nan,
        "iou": iou,
        "precision": _share(tp, fp, union),
        "recall": _share(tp, fn, union),
        "specificity": tn / (tn + fp) if tn + fp else math.nan,
        "thresholded_jaccard": (iou if iou >= JACCARD_THRESHOLD else 0.0) if union else 1.0,
    }


def _share(hits: int, misses: int, union: int) -> float:
    """Hits / (hits + misses); 0 where only this mask is empty, undefined where both are."""
    if hits + misses:
        return hits / (hits + misses)
    return 0.0 if union else math.nan


def contour_metrics(
    prediction: np.ndarray, ground_truth: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE
) -> dict[str, float]:
    """HD95, average symmetric surface distance (both in pixels) and boundary F1.

    Args:
        prediction: Boolean mask (H, W).
        ground_truth: Boolean mask (H, W).
        tolerance: How far apart two contours may lie for boundary F1, as a share of the image's diagonal.
    """
    diagonal = math.hypot(*ground_truth.shape)
    contours = _contour(prediction), _contour(ground_truth)
    empty = [len(contour) == 0 for contour in contours]
    if all(empty):
        return {"hd95": math.nan, "assd": math.nan, "boundary_f1": math.nan}
    if any(empty):
        return {"hd95": diagonal, "assd": diagonal, "boundary_f1": 0.0}
    from_prediction = KDTree(contours[1]).query(contours[0])[0]
    from_ground_truth = KDTree(contours[0]).query(contours[1])[0]
    precision = float(np.mean(from_prediction <= tolerance * diagonal))
    recall = float(np.mean(from_ground_truth <= tolerance * diagonal))
    return {
        "hd95": float(max(np.percentile(from_prediction, 95), np.percentile(from_ground_truth, 95))),
        "assd": float(np.concatenate([from_prediction, from_ground_truth]).mean()),
        "boundary_f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
    }


def _contour(mask: np.ndarray) -> np.ndarray:
    """Coordinates (N, 2) of the mask's pixels that touch its outside."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return np.empty((0, 2), dtype=np.int64)
    top, left = rows[0], columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    return np.argwhere(part & ~binary_erosion(part)) + np.array([top, left])


def mask_metrics(
    prediction: np.ndarray, ground_truth: np.ndarray, tolerance: float = BOUNDARY_TOLERANCE
) -> dict[str, float]:
    """Pixel counts, overlap and contour metrics of one image and class.

    Args:
        prediction: Boolean mask (H, W).
        ground_truth: Boolean mask (H, W).
        tolerance: See :func:`contour_metrics`.

    Raises:
        ValueError: The masks are not boolean, not two-dimensional or of different shapes.
    """
    if prediction.shape != ground_truth.shape or ground_truth.ndim != 2:
        raise ValueError(f"need two H x W masks of one shape, got {prediction.shape} and {ground_truth.shape}")
    if prediction.dtype != bool or ground_truth.dtype != bool:
        raise ValueError(f"need boolean masks, got {prediction.dtype} and {ground_truth.dtype}")
    counts = confusion(prediction, ground_truth)
    return {**counts, **overlap_metrics(counts), **contour_metrics(prediction, ground_truth, tolerance)}


def probability_metrics(probability: np.ndarray, ground_truth: np.ndarray) -> dict[str, float]:
    """Figures as the DermoMamba authors' code takes them: soft Dice, and precision and recall at a logit of 0.5.

    Args:
        probability: Foreground probability (H, W), 0 to 1.
        ground_truth: Boolean mask (H, W).
    """
    total = float(probability.sum(dtype=np.float64)) + np.count_nonzero(ground_truth)
    both_empty = not ground_truth.any() and not (probability > 0.5).any()
    overlap = float(probability.sum(dtype=np.float64, where=ground_truth))
    cut = overlap_metrics(confusion(probability > AUTHORS_THRESHOLD, ground_truth))
    return {
        "soft_dice": math.nan if both_empty else 2 * overlap / total,
        "authors_precision": cut["precision"],
        "authors_recall": cut["recall"],
    }
