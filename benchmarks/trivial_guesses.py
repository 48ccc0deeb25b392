"""Is a trained fold better than guessing? ``python benchmarks/trivial_guesses.py RESULTS/.../fold_0``.

Prints the mean Dice over the fold's validation cases of the trained network (nnU-Net's own ``summary.json``), of an
empty mask, and of one ellipse in the centre of every image with the image's proportions and the mean lesion area of
these cases (a generous guess: it knows their mean). Cases in which both masks are empty are left out, as by nnU-Net.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from nnunetv2_dermomamba.evaluation.metrics import confusion, overlap_metrics


def centre_ellipse(shape: tuple[int, int], share: float) -> np.ndarray:
    """Ellipse in the centre that covers ``share`` of the image."""
    rows, columns = (np.linspace(-1, 1, side) for side in shape)
    return rows[:, None] ** 2 + columns[None, :] ** 2 <= 4 * share / np.pi


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return overlap_metrics(confusion(a, b))["dice"]


def main() -> None:
    """Parse the command line and print the three figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fold", type=Path, help="a trained fold's results folder, with its validation/summary.json")
    summary = json.loads((parser.parse_args().fold / "validation" / "summary.json").read_text())
    masks = [np.asarray(Image.open(case["reference_file"])) > 0 for case in summary["metric_per_case"]]
    share = float(np.mean([mask.mean() for mask in masks]))
    trained = [case["metrics"]["1"]["Dice"] for case in summary["metric_per_case"]]
    guesses = {
        "trained network": trained,
        "all background": [dice(np.zeros_like(mask), mask) for mask in masks],
        "ellipse in the centre": [dice(centre_ellipse(mask.shape, share), mask) for mask in masks],
    }
    for name, scores in guesses.items():
        print(f"{name:22} mean Dice {np.nanmean(scores):.4f} over {np.isfinite(scores).sum()} images")


if __name__ == "__main__":
    main()
