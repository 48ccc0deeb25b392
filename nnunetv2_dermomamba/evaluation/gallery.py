"""What the report draws of a case: a small photograph and the contours of both masks."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.path import Path as Polygon
from PIL import Image
from skimage.measure import find_contours

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.predict.reading import read_photo

__all__ = ["Drawing", "draw"]

CANVAS = 2000  # units on the longer side of the drawing: integers suffice for the paths
MASK_SIDE = 1000  # contours are traced on masks reduced to this many pixels
SIMPLIFICATION = 0.4  # pixels of the reduced mask that a contour may move
WEBP_QUALITY = 70
PROPORTION_TOLERANCE = 0.02  # rounding of small sizes, no crop


@dataclass(frozen=True)
class Drawing:
    """One case as the report shows it.

    Attributes:
        width: Canvas width; the longer side is 2000 units.
        height: Canvas height.
        picture: Photograph as a ``data:`` URI, or ``""``.
        contours: By class, the SVG path data of the ground truth and of the prediction.
        note: Why the photograph is not shown, or ``""``.
    """

    width: int
    height: int
    picture: str
    contours: dict[int, tuple[str, str]]
    note: str = ""


def draw(
    ground_truth: np.ndarray | None,
    prediction: np.ndarray | None,
    image: Path | None,
    classes: tuple[int, ...],
    pixels: int,
) -> Drawing:
    """Draw one case.

    Args:
        ground_truth: Labels (H, W), or ``None`` if they could not be read.
        prediction: Labels (H, W), or ``None`` if there are none.
        image: Photograph.
        classes: Labels to trace.
        pixels: Longer side of the embedded photograph.
    """
    known = next((mask.shape for mask in (ground_truth, prediction) if mask is not None), (3, 4))
    scale = CANVAS / max(known)
    picture, note = _picture(image, known, pixels) if image else ("", "")
    contours = {label: (_path(ground_truth, label, scale), _path(prediction, label, scale)) for label in classes}
    return Drawing(round(known[1] * scale), round(known[0] * scale), picture, contours, note)


def _picture(path: Path, shape: tuple[int, ...], pixels: int) -> tuple[str, str]:
    """Photograph as a ``data:`` URI, reduced to the proportions of ``shape``, and what went wrong."""
    factor = min(1.0, pixels / max(shape))
    try:
        photograph = read_photo(path, (max(1, round(shape[0] * factor)), max(1, round(shape[1] * factor))))
    except ImageReadError as error:
        return "", str(error)
    height, width = photograph.original_shape
    if abs(height / width * shape[1] / shape[0] - 1) > PROPORTION_TOLERANCE:
        return "", f"{path} is {width} x {height} pixels: other proportions than the mask"
    buffer = io.BytesIO()
    photograph.image.save(buffer, "WEBP", quality=WEBP_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), ""


def _path(mask: np.ndarray | None, label: int, scale: float) -> str:
    """SVG path data of the label's outline on a canvas ``scale`` times the mask's size."""
    if mask is None or not (mask == label).any():
        return ""
    binary = Image.fromarray(np.where(mask == label, 255, 0).astype(np.uint8))
    factor = min(1.0, MASK_SIDE / max(mask.shape))
    size = max(1, round(mask.shape[1] * factor)), max(1, round(mask.shape[0] * factor))
    reduced = np.asarray(binary.resize(size, Image.Resampling.BOX), dtype=np.float32)
    to_canvas = np.array([mask.shape[1] / size[0], mask.shape[0] / size[1]]) * scale
    parts = []
    for contour in find_contours(np.pad(reduced, 1), 127.5):
        # A pixel's centre is half a pixel inside its edge; the padding adds one.
        points = np.rint((_simplify(contour)[:-1, ::-1] - 0.5) * to_canvas).astype(int)
        if len(points) > 2:
            steps = " ".join(f"{x} {y}" for x, y in np.diff(points, axis=0).tolist())
            parts.append(f"M{points[0, 0]} {points[0, 1]}l{steps}z".replace(" -", "-"))
    return "".join(parts)


def _simplify(contour: np.ndarray) -> np.ndarray:
    """Closed contour (N, 2) with fewer points, the first repeated at the end."""
    polygon = Polygon(contour)
    polygon.should_simplify, polygon.simplify_threshold = True, SIMPLIFICATION
    simple = polygon.cleaned(simplify=True)
    return simple.vertices[simple.codes != Polygon.STOP]
