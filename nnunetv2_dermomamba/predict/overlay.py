"""Photographs with the contours of their masks."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from nnunetv2_dermomamba.files import write_file
from nnunetv2_dermomamba.predict.rendering import Classes

__all__ = ["draw_overlay", "write_overlay"]

OVERLAY_QUALITY = 90
CONTOUR_SHARE = 1 / 400  # of the shorter side, on each side of the edge
COLOURS = ((0, 255, 136), (0, 170, 255), (255, 214, 0), (255, 64, 200), (255, 120, 0))
OUTLINE = (0, 0, 0)


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
