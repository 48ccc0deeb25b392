"""From figures per image to one figure: means, pooled figures, and their bootstrap intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from nnunetv2_dermomamba.evaluation.metrics import overlap_metrics

__all__ = ["AUTHORS", "FEWEST", "PER_IMAGE", "POOLED", "Figure", "counting", "summarise"]

PER_IMAGE = "per_image"
POOLED = "pooled"
AUTHORS = "authors"
COUNTS = ["tp", "fp", "fn", "tn"]
POOLED_METRICS = ["dice", "iou", "precision", "recall", "specificity"]
RESAMPLES = 2000
SEED = 0  # of the draws, so that an evaluation given again tells the same intervals
CONFIDENCE = 0.95
FEWEST = 10
"""Images that an interval needs: resampled, a few give back little more than their least and greatest figure."""


@dataclass(frozen=True)
class Figure:
    """One metric over all images.

    Attributes:
        value: Mean over images, or the pooled figure.
        low: Lower end of the 95 % interval; NaN of fewer than 10 images.
        high: Upper end.
        n: Images that count.
        undefined: Images for which the metric is not defined.
        sd: Standard deviation over images; ``None`` for a pooled figure.
        median: Median over images; ``None`` for a pooled figure.
    """

    value: float
    low: float
    high: float
    n: int
    undefined: int = 0
    sd: float | None = None
    median: float | None = None


def counting(frame: pd.DataFrame, label: int) -> pd.DataFrame:
    """The rows of one class that count in its figures."""
    return frame[(frame["label"] == label) & frame["tp"].notna()]


def summarise(frame: pd.DataFrame, metrics: list[str]) -> dict[str, dict[str, Figure]]:
    """Figures over the images of one class.

    The interval is the percentile bootstrap's: images are drawn with replacement 2000 times, the same draws for every
    figure, and the middle 95 % of the resampled figures is reported. Undefined values (NaN) are left out. Fewer than 10
    images have no interval.

    - ``per_image``: mean of each metric over images.
    - ``pooled``: metrics of the pixel counts summed over all images, as VM-UNet and its kin report them; large
      photographs and large lesions weigh more.
    - ``authors``: what the DermoMamba code reports, if there are probabilities: soft Dice, IoU of the mask, precision
      and recall at a logit of 0.5, each a mean over images.

    Args:
        frame: One row per image with the columns ``metrics`` and ``tp``, ``fp``, ``fn``, ``tn``.
        metrics: Columns to average.

    Raises:
        ValueError: The frame has no rows.
    """
    if frame.empty:
        raise ValueError("there is no image to summarise")
    count = len(frame)
    draws = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=RESAMPLES).astype(np.float64)
    figures = {PER_IMAGE: _means(frame[metrics], draws), POOLED: _pooled(frame[COUNTS], draws)}
    if "soft_dice" in metrics:
        means = figures[PER_IMAGE]
        figures[AUTHORS] = {
            "dice": means["soft_dice"],
            "iou": means["iou"],
            "precision": means["authors_precision"],
            "recall": means["authors_recall"],
        }
    return figures


def _means(frame: pd.DataFrame, draws: np.ndarray) -> dict[str, Figure]:
    values = frame.to_numpy(np.float64)
    defined = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        resampled = draws @ np.where(defined, values, 0.0) / (draws @ defined)
    figures = {}
    for index, metric in enumerate(frame.columns):
        column = values[defined[:, index], index]
        n, undefined = len(column), len(values) - len(column)
        if not n:
            figures[metric] = Figure(np.nan, np.nan, np.nan, 0, undefined, np.nan, np.nan)
            continue
        low, high = _interval(resampled[:, index], n)
        sd = float(column.std(ddof=1)) if n > 1 else np.nan
        figures[metric] = Figure(float(column.mean()), low, high, n, undefined, sd, float(np.median(column)))
    return figures


def _pooled(counts: pd.DataFrame, draws: np.ndarray) -> dict[str, Figure]:
    totals = draws @ counts.to_numpy(np.float64)
    resampled = [overlap_metrics(dict(zip(COUNTS, total, strict=True))) for total in totals]
    pooled, images = overlap_metrics(counts.sum().to_dict()), len(counts)
    intervals = {metric: _interval(np.array([r[metric] for r in resampled]), images) for metric in POOLED_METRICS}
    return {metric: Figure(float(pooled[metric]), *interval, images) for metric, interval in intervals.items()}


def _interval(resampled: np.ndarray, images: int) -> tuple[float, float]:
    tail = 100 * (1 - CONFIDENCE) / 2
    resampled = resampled[np.isfinite(resampled)]
    if images < FEWEST or not len(resampled):
        return np.nan, np.nan
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return float(low), float(high)
