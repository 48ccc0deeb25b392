"""Two methods on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

__all__ = ["Difference", "compare"]


@dataclass(frozen=True)
class Difference:
    """One metric of this method against another's.

    Attributes:
        mean: Mean of this method over the common images.
        other: Mean of the other method over the same images.
        p: Two-sided p-value of the Wilcoxon signed-rank test, not corrected for the number of metrics.
        n: Images for which both are defined.
    """

    mean: float
    other: float
    p: float
    n: int


def compare(frame: pd.DataFrame, other: pd.DataFrame, metrics: list[str]) -> dict[str, Difference]:
    """Paired Wilcoxon signed-rank test of each metric over the images that both methods have.

    Pairs without a difference are left out of the ranks (Wilcoxon's own treatment); if no pair differs, p is 1.

    Args:
        frame: This method's rows of one class, with the column ``case``.
        other: The other method's.
        metrics: Columns to compare; one that ``other`` lacks is left out.

    Raises:
        ValueError: The two have no image in common.
    """
    metrics = [metric for metric in metrics if metric in other.columns]
    mine, theirs = frame.set_index("case")[metrics], other.set_index("case")[metrics]
    common = mine.index.intersection(theirs.index)
    if common.empty:
        raise ValueError("the two evaluations have no case in common")
    mine, theirs = mine.loc[common].astype(np.float64), theirs.loc[common].astype(np.float64)
    return {metric: _difference(mine[metric].to_numpy(), theirs[metric].to_numpy()) for metric in metrics}


def _difference(mine: np.ndarray, theirs: np.ndarray) -> Difference:
    defined = np.isfinite(mine) & np.isfinite(theirs)
    mine, theirs = mine[defined], theirs[defined]
    if not len(mine):
        return Difference(np.nan, np.nan, np.nan, 0)
    p = 1.0 if (mine == theirs).all() else float(wilcoxon(mine, theirs, zero_method="wilcox").pvalue)
    return Difference(float(mine.mean()), float(theirs.mean()), p, len(mine))
