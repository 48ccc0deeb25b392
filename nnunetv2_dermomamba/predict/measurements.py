"""Figures of masks: area, position, parts and mean probability, and the table of them."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from nnunetv2_dermomamba.files import write_file
from nnunetv2_dermomamba.predict.rendering import Classes, Rendered

__all__ = ["COLUMNS", "measure", "write_csv"]

COLUMNS = (
    "photo", "mask", "class", "width", "height", "area_pixels", "area_percent", "x_min", "y_min", "x_max", "y_max",
    "centroid_x", "centroid_y", "parts", "mean_probability", "seconds",
)  # fmt: skip


def measure(rendered: Rendered, classes: Classes) -> list[dict[str, Any]]:
    """Figures of each class in a mask.

    Returns:
        For each class: ``class``, ``width`` and ``height`` of the photograph, ``area_pixels``, ``area_percent``; of the
        bounding box the first and last column and row (``x_min`` to ``y_max``); ``centroid_x`` and ``centroid_y`` in
        pixels, where the first pixel's centre is 0; ``parts``, 8-connected; ``mean_probability`` inside. Where there is
        no lesion, positions and mean are None.
    """
    height, width = rendered.labels.shape
    rows = []
    for value, name, mean in zip(classes.values, classes.names, rendered.mean_inside, strict=True):
        mask = rendered.labels == value
        by_row, by_column = mask.sum(axis=1, dtype=np.int64), mask.sum(axis=0, dtype=np.int64)
        area = int(by_row.sum())
        figures: dict[str, Any] = dict.fromkeys(COLUMNS[7:13])
        parts = 0
        if area:
            ys, xs = np.flatnonzero(by_row), np.flatnonzero(by_column)
            figures = {
                "x_min": int(xs[0]),
                "y_min": int(ys[0]),
                "x_max": int(xs[-1]),
                "y_max": int(ys[-1]),
                "centroid_x": round(float(by_column @ np.arange(width) / area), 2),
                "centroid_y": round(float(by_row @ np.arange(height) / area), 2),
            }
            box = mask[ys[0] : ys[-1] + 1, xs[0] : xs[-1] + 1]
            parts = int(ndimage.label(box, np.ones((3, 3), bool))[1])
        rows.append(
            {
                "class": name,
                "width": width,
                "height": height,
                "area_pixels": area,
                "area_percent": round(100 * area / (width * height), 4),
                **figures,
                "parts": parts,
                "mean_probability": None if math.isnan(mean) else round(mean, 4),
            }
        )
    return rows


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figures of all photographs.

    Raises:
        OSError: It cannot be written; nothing is left.
    """
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue().encode("utf-8", "backslashreplace"))
