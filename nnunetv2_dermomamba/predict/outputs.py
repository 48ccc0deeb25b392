"""What is written for each photograph. A file appears under its name only when it is complete."""

from __future__ import annotations

import csv
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps
from scipy import ndimage

from nnunetv2_dermomamba.conversion.pairing import MAX_NAME_BYTES
from nnunetv2_dermomamba.files import write_file
from nnunetv2_dermomamba.predict.native import Classes, Rendered
from nnunetv2_dermomamba.predict.photos import OVERLAY_ENDING

__all__ = [
    "Outputs",
    "draw_overlay",
    "measure",
    "write_csv",
    "write_overlay",
]

OVERLAY_QUALITY = 90
CONTOUR_SHARE = 1 / 400  # of the shorter side, on each side of the edge
COLOURS = ((0, 255, 136), (0, 170, 255), (255, 214, 0), (255, 64, 200), (255, 120, 0))
OUTLINE = (0, 0, 0)
COLUMNS = (
    "photo", "mask", "class", "width", "height", "area_pixels", "area_percent", "x_min", "y_min", "x_max", "y_max",
    "centroid_x", "centroid_y", "parts", "mean_probability", "seconds",
)  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """Which files to write.

    Attributes:
        folder: For all of them.
        overlay: Draw the contours on the photograph.
        probabilities: Write 16-bit probability maps.
    """

    folder: Path
    overlay: bool = False
    probabilities: bool = False

    def mask(self, name: str) -> Path:
        """The mask of a photograph, which is written last."""
        return self.folder / f"{name}_mask.png"

    def overlay_file(self, name: str) -> Path:
        """The photograph with contours."""
        return self.folder / f"{name}{OVERLAY_ENDING}"

    def probability_files(self, name: str, classes: Classes) -> list[Path]:
        """A map for each class."""
        if len(classes.values) == 1:
            return [self.folder / f"{name}_probability.png"]
        return [self.folder / f"{name}_probability_{value}.png" for value in classes.values]

    def files(self, name: str, classes: Classes) -> list[Path]:
        """All files of a photograph."""
        return [
            self.mask(name),
            *([self.overlay_file(name)] if self.overlay else []),
            *(self.probability_files(name, classes) if self.probabilities else []),
        ]

    def name_problem(self, name: str, classes: Classes) -> str | None:
        """Why the file system would not take a photograph's results, if so."""
        excess = max(len(os.fsencode(file.name)) for file in self.files(name, classes)) - MAX_NAME_BYTES
        return f"its name is too long by {excess} bytes for its results; rename it" if excess > 0 else None


def write_overlay(photo: Image.Image, labels: np.ndarray, classes: Classes, path: Path) -> None:
    """Write the photograph with the contours of its mask as JPEG.

    Raises:
        OSError: It cannot be written; nothing is left.
    """
    buffer = io.BytesIO()
    draw_overlay(photo, labels, classes).save(buffer, "JPEG", quality=OVERLAY_QUALITY)
    write_file(path, buffer.getbuffer())


def draw_overlay(photo: Image.Image, labels: np.ndarray, classes: Classes) -> Image.Image:
    """Draw the contour of each class: a coloured line with a black outline, seen on any skin.

    Args:
        photo: Mode "RGB"; it is drawn on, to save memory, and returned.
        labels: uint8 of the photo's shape.
        classes: What the labels are.
    """
    radius = min(max(round(min(photo.size) * CONTOUR_SHARE), 1), 6)  # 7 is the most a blur with 8 bits can see
    for index, value in enumerate(classes.values):
        mask = Image.fromarray((labels == value).astype(np.uint8) * 255)
        box = mask.getbbox()
        if box is None:
            continue
        margin = radius + 2
        left, top = max(box[0] - margin, 0), max(box[1] - margin, 0)
        box = (left, top, min(box[2] + margin, photo.width), min(box[3] + margin, photo.height))
        # nothing lies beyond the photograph: a lesion that it cuts off is closed along its edge
        part = ImageOps.expand(mask.crop(box), margin)
        inner = (margin, margin, part.width - margin, part.height - margin)
        for width, colour in ((radius + 1, OUTLINE), (radius, COLOURS[index % len(COLOURS)])):
            # A blur is neither 0 nor 255 exactly where both are within its reach.
            band = part.filter(ImageFilter.BoxBlur(width)).point([0] + [255] * 254 + [0])
            photo.paste(colour, box, band.crop(inner))
    return photo


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
