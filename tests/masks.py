"""Synthetic lesions and their files, shared by the evaluation's tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def disc(height=96, width=128, centre=(48, 64), radius=30.0):
    """Boolean mask of a disc."""
    y, x = np.ogrid[:height, :width]
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 <= radius**2


def blob(rng, height=96, width=128):
    """Boolean mask of a smooth random shape, possibly in several parts, possibly touching the border."""
    coarse = rng.standard_normal((6, 8))
    field = np.asarray(Image.fromarray(coarse.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC))
    return field > rng.uniform(-0.5, 0.5)


def save_mask(path: Path, mask, foreground=255):
    """Write a mask as an 8-bit greyscale file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.where(mask, foreground, 0).astype(np.uint8)).save(path)


def save_pairs(folder: Path, count=6, seed=0, foreground=255, ending="_mask"):
    """Write pairs below ``folder``: ``truth/case_<i>_segmentation.png`` and ``masks/case_<i><ending>.png``."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        truth = disc(centre=(rng.uniform(35, 60), rng.uniform(45, 85)), radius=rng.uniform(18, 32))
        prediction = np.roll(truth, rng.integers(-8, 9, size=2), axis=(0, 1)) | disc(radius=rng.uniform(2, 12))
        save_mask(folder / "truth" / f"case_{i}_segmentation.png", truth, foreground)
        save_mask(folder / "masks" / f"case_{i}{ending}.png", prediction, foreground)
    return folder / "masks", folder / "truth"
