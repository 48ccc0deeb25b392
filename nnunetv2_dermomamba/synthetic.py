"""Synthetic dermoscopy-like images with lesion masks, for the demonstration and the tests.

They have what makes real ones hard for a simple threshold (uneven light, a dark vignette, hair, pigment texture,
blurred and weak borders) but are no substitute for them: a score on them says only that the pipeline works.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

__all__ = ["draw_case", "write_isic2018_layout"]

SIZES = ((540, 722), (576, 767), (450, 600), (768, 1024), (680, 848))  # (height, width); ISIC's small ones
SKIN = np.array([[222, 178, 158], [214, 160, 150], [196, 150, 128], [226, 196, 182], [180, 132, 108]], np.float32)
PIGMENT = np.array([[92, 58, 46], [120, 74, 52], [66, 44, 42], [140, 84, 66], [104, 70, 72]], np.float32)
HARMONICS = 7


def draw_case(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Draw one image and its lesion mask.

    Args:
        rng: Source of randomness.
        shape: (height, width) in pixels, each at least 64.

    Returns:
        The image, uint8 of shape (height, width, 3), and the mask, bool of shape (height, width).
    """
    height, width = shape
    side = min(shape)
    inside = _lesion(rng, shape)
    mask = inside > 0

    skin = rng.choice(SKIN) + rng.normal(0, 8, 3).astype(np.float32)
    pigment = np.minimum(rng.choice(PIGMENT) + rng.normal(0, 8, 3).astype(np.float32), skin - 25)
    border = rng.uniform(0.008, 0.03) * side  # width in pixels over which the pigment fades
    density = 1 / (1 + np.exp(-inside / border))
    density *= 1 + 0.25 * _noise(rng, shape, 0.08 * side) + 0.15 * _noise(rng, shape, 0.012 * side)
    density = np.clip(density * rng.uniform(0.45, 0.95), 0, 1)[..., None]
    image = skin * (1 - density) + pigment * density
    image += 5 * _noise(rng, shape, 0.15 * side)[..., None] + 4 * _noise(rng, shape, 0.006 * side)[..., None]
    image = _hair(rng, image, int(rng.choice([0, 0, 6, 14, 28])))

    rows, columns = np.mgrid[0:height, 0:width] / (width / 2)
    radius = np.hypot(rows - height / width - rng.normal(0, 0.05), columns - 1 - rng.normal(0, 0.05))
    light = 1 - rng.uniform(0.05, 0.3) * radius**2
    if rng.random() < 0.3:  # the rim of the dermatoscope
        light *= 1 / (1 + np.exp((radius - rng.uniform(0.95, 1.15)) * 60))
    image = image * light[..., None] + rng.normal(0, 2.5, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8), mask


def write_isic2018_layout(folder: Path, training: int, test: int = 0, seed: int = 0) -> None:
    """Write images and masks in the official folders and file names of ISIC 2018 Task 1.

    Args:
        folder: Made if missing; ``ISIC2018_Task1-2_Training_Input`` and the others are made in it.
        training: Number of training pairs.
        test: Number of test pairs.
        seed: The same seed gives the same files.
    """
    rng = np.random.default_rng(seed)
    for subset, first, count in (("Training", 0, training), ("Test", training, test)):
        images = folder / f"ISIC2018_Task1-2_{subset}_Input"
        masks = folder / f"ISIC2018_Task1_{subset}_GroundTruth"
        for number in range(first, first + count):
            images.mkdir(parents=True, exist_ok=True)
            masks.mkdir(exist_ok=True)
            image, mask = draw_case(rng, SIZES[number % len(SIZES)])
            Image.fromarray(image).save(images / f"ISIC_{number:07d}.jpg", quality=92)
            Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"ISIC_{number:07d}_segmentation.png")


def _lesion(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Distance inside the lesion's contour along the ray from its centre, in pixels; negative outside."""
    height, width = shape
    side = min(shape)
    centre = np.array(shape) / 2 + rng.normal(0, 0.06, 2) * side
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    rows, columns = rows - centre[0], columns - centre[1]
    angle = np.arctan2(rows, columns)
    turn, flatness = rng.uniform(0, np.pi), rng.uniform(0.55, 0.95)
    contour = 1 / np.hypot(np.cos(angle - turn), np.sin(angle - turn) / flatness)
    for harmonic in range(2, 2 + HARMONICS):
        contour = contour * (1 + rng.normal(0, 0.14 / harmonic) * np.cos(harmonic * angle + rng.uniform(0, 2 * np.pi)))
    return rng.uniform(0.18, 0.45) * side * contour - np.hypot(rows, columns)


def _noise(rng: np.random.Generator, shape: tuple[int, int], scale: float) -> np.ndarray:
    """Smooth noise of unit deviation; scale in pixels."""
    step = max(int(scale / 2), 1)  # a smooth field needs no more samples
    coarse = rng.normal(0, 1, (shape[0] // step + 4, shape[1] // step + 4)).astype(np.float32)
    coarse = ndimage.gaussian_filter(coarse, scale / step)
    field = ndimage.zoom(coarse, step, order=1)[: shape[0], : shape[1]] if step > 1 else coarse[: shape[0], : shape[1]]
    return field / field.std()


def _hair(rng: np.random.Generator, image: np.ndarray, count: int) -> np.ndarray:
    """Draw dark, curved hairs over an image with float values."""
    height, width = image.shape[:2]
    cover = Image.new("L", (width, height))
    pen = ImageDraw.Draw(cover)
    time = np.linspace(0, 1, 24)[:, None]
    for _ in range(count):
        start, end = rng.uniform(-0.2, 1.2, (2, 2)) * (width, height)
        bend = (start + end) / 2 + rng.normal(0, 0.15, 2) * (width, height)
        curve = (1 - time) ** 2 * start + 2 * time * (1 - time) * bend + time**2 * end
        pen.line(
            [tuple(point) for point in curve], fill=int(rng.integers(130, 230)), width=max(min(height, width) // 250, 1)
        )
    opacity = np.asarray(cover.filter(ImageFilter.GaussianBlur(0.7)), np.float32)[..., None] / 255
    return image * (1 - opacity) + np.array([48, 34, 30], np.float32) * opacity
