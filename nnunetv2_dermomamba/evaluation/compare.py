"""Two methods on the same images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import wilcoxon

from nnunetv2_dermomamba.evaluation.aggregate import counting

__all__ = ["Difference", "check_comparable", "compare"]


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


def check_comparable(other: pd.DataFrame, label: int, cases: set[str], name: str) -> None:
    """Check that another method's table can be compared with.

    Args:
        other: The table.
        label: The class to compare.
        cases: Those to compare with.
        name: What to call the table.

    Raises:
        ValueError: It has no scored case of the class, one twice, or none of ``cases``.
    """
    theirs = counting(other, label)["case"]
    if theirs.empty:
        raise ValueError(f"{name} has no scored case of class {label}; evaluate it with the same --labels")
    if theirs.duplicated().any():
        case = theirs[theirs.duplicated()].iloc[0]
        raise ValueError(f"{name} has case {case} of class {label} more than once; keep one row of each")
    if cases.isdisjoint(theirs):
        raise ValueError(
            f"{name} has no case of class {label} in common with this evaluation; it has {theirs.iloc[0]}, say"
        )


def compare(frame: pd.DataFrame, other: pd.DataFrame, metrics: list[str]) -> dict[str, Difference]:
    """Paired Wilcoxon signed-rank test of each metric over the images that both methods have.

    Pairs without a difference are left out of the ranks (Wilcoxon's own treatment); if no pair differs, p is 1.

    Args:
        frame: This method's rows of one class, with the column ``case``.
        other: The other method's.
        metrics: Columns to compare; one that ``other`` lacks is left out.
    """
    metrics = [metric for metric in metrics if metric in other.columns]
    mine, theirs = frame.set_index("case")[metrics], other.set_index("case")[metrics]
    common = mine.index.intersection(theirs.index)
    mine, theirs = mine.loc[common].astype(np.float64), theirs.loc[common].astype(np.float64)
    return {metric: _difference(mine[metric].to_numpy(), theirs[metric].to_numpy()) for metric in metrics}


def _difference(mine: np.ndarray, theirs: np.ndarray) -> Difference:
    defined = np.isfinite(mine) & np.isfinite(theirs)
    mine, theirs = mine[defined], theirs[defined]
    if not len(mine):
        return Difference(np.nan, np.nan, np.nan, 0)
    p = 1.0 if (mine == theirs).all() else float(wilcoxon(mine, theirs, zero_method="wilcox").pvalue)
    return Difference(float(mine.mean()), float(theirs.mean()), p, len(mine))
