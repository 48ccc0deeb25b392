"""Resampling of photographs and of binary masks."""

from __future__ import annotations

import numpy as np
from PIL import Image

__all__ = ["IMAGE_FILTER", "MAX_SIDE", "REDUCING_GAP", "resize_image", "resize_mask"]

MAX_SIDE = 8192  # pixels of what may be asked for
IMAGE_FILTER = Image.Resampling.LANCZOS
# Pillow first averages whole blocks down to this many times the wanted size: 7 times as fast as the filter alone on
# 12 megapixels, at a mean difference of 0.25 grey levels (benchmarks/conversion.py).
REDUCING_GAP = 2.0


def resize_image(image: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Resample with an anti-aliasing Lanczos filter.

    Args:
        image: Mode "RGB" or "L".
        shape: (height, width) in pixels.
    """
    height, width = shape
    if image.size == (width, height):
        return image
    return image.resize((width, height), IMAGE_FILTER, reducing_gap=REDUCING_GAP)


def resize_mask(mask: Image.Image, shape: tuple[int, int]) -> Image.Image:
    """Resample a binary mask so that it stays binary and keeps its share of the frame.

    Each new pixel is covered by lesion to some part. The k most covered pixels become lesion, where k is the lesion's
    share of the frame times the number of new pixels, rounded; at least one pixel, and at least one background pixel,
    if the mask has both. Unlike a cut at half, this loses no thin or tiny lesion. Pixels of equal cover at the
    cut are taken from the top left.

    Args:
        mask: Mode "L", values 0 and 255.
        shape: (height, width) in pixels.

    Returns:
        Mode "L", values 0 and 255, lesion share within half a pixel of the original where one pixel suffices.
    """
    height, width = shape
    if mask.size == (width, height):
        return mask
    pixels, lesion = mask.size[0] * mask.size[1], mask.histogram()[255]
    new_pixels = width * height
    if lesion in (0, pixels):
        return Image.new("L", (width, height), 255 if lesion else 0)
    k = min(max(round(lesion / pixels * new_pixels), 1), new_pixels - 1)

    cover = np.asarray(mask.resize((width, height), Image.Resampling.BOX, reducing_gap=REDUCING_GAP)).ravel()
    if np.count_nonzero(cover) < k:  # a lesion so small that its cover rounds to 0 of 255
        cover = np.asarray(mask.convert("F").resize((width, height), Image.Resampling.BOX)).ravel()
    cut = np.partition(cover, new_pixels - k)[new_pixels - k]
    resized = cover > cut
    resized[np.flatnonzero(cover == cut)[: k - np.count_nonzero(resized)]] = True
    return Image.fromarray(resized.reshape(height, width).astype(np.uint8) * 255)
