"""Lesion masks of any common kind read as binary.

A mask is read where only one reading is possible, and refused otherwise:

- Two grey values, one of them 0: the other is lesion. A single value 1 or 255: lesion everywhere.
- More grey values (an anti-aliased contour, JPEG noise): cut at half, if every pixel between a quarter and three
  quarters lies within two pixels of both darker and lighter ones, so that the cut moves the contour by a pixel at most.
- Colours (RGB or through the palette): equal channels are grey; black and one other colour are background and lesion.
- Alpha: ignored where opaque; the mask itself where the colour is constant; otherwise it must agree with the colour.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from nnunetv2_dermomamba.images.errors import AmbiguousMaskError, ImageReadError
from nnunetv2_dermomamba.images.photograph import exif_orientation, open_image, turn_upright

__all__ = ["read_mask"]

CONTOUR_PIXELS = 2
DARK, LIGHT = 64, 192  # of 256: below a quarter, and from three quarters on


def read_mask(path: str | Path, *, may_be_empty: bool = False) -> Image.Image:
    """Read a lesion mask.

    Args:
        path: The file.
        may_be_empty: Take a mask that marks no lesion.

    Returns:
        Mode "L", values 0 (background) and 255 (lesion), upright.

    Raises:
        AmbiguousMaskError: The file has no single right reading as a mask.
        ImageReadError: The file is damaged, or marks no lesion.
    """
    with open_image(path) as image:
        orientation = exif_orientation(image)
        image.load()
        mask = _binary(image, path)
        if not may_be_empty and mask.getbbox() is None:
            raise ImageReadError(path, "marks no lesion")
        return turn_upright(image, mask, orientation)


def _binary(image: Image.Image, path: str | Path) -> Image.Image:
    if image.mode == "L" and "transparency" not in image.info:
        return _from_grey(image, path)
    if image.mode.startswith("I") or image.mode == "F":
        return _from_wide_grey(np.asarray(image), path)
    if image.mode in ("1", "P", "RGB") and "transparency" not in image.info:
        return _from_colour(image.convert("RGB"), path)
    image = image.convert("RGBA")
    colour, alpha = image.convert("RGB"), image.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return _from_colour(colour, path)
    pixels = np.asarray(colour)
    if (pixels == pixels[0, 0]).all():
        return _from_grey(alpha, path)
    from_colour, from_alpha = _from_colour(colour, path), _from_grey(alpha, path)
    if from_colour.tobytes() != from_alpha.tobytes():
        raise AmbiguousMaskError(path, "marks different lesions by colour and by alpha; save it in black and white")
    return from_colour


def _from_colour(colour: Image.Image, path: str | Path) -> Image.Image:
    red, green, blue = colour.split()
    if red.tobytes() == green.tobytes() == blue.tobytes():
        return _from_grey(red, path)
    colours = colour.getcolors(2) or []
    if len(colours) == 2 and (0, 0, 0) in (value for _, value in colours):
        return Image.fromarray(np.asarray(colour).any(axis=2).astype(np.uint8) * 255)
    raise AmbiguousMaskError(path, "is a mask in more colours than black and one other; save it in black and white")


def _from_wide_grey(values: np.ndarray, path: str | Path) -> Image.Image:
    low, high = values.min(), values.max()
    if low == 0 and ((values == 0) | (values == high)).all():
        return Image.fromarray((values != 0).astype(np.uint8) * 255)
    if low == high and high in (1, 255, 65535):
        return Image.new("L", values.shape[::-1], 255)
    if values.dtype.kind == "f" or low < 0 or high > 65535:
        raise AmbiguousMaskError(path, "is a mask with values outside 16 bits; save it in black and white")
    if high < LIGHT << 8:  # the high byte alone would show labels as background
        raise AmbiguousMaskError(path, "is a mask with several dark grey values; save it in black and white")
    return _from_grey(Image.fromarray((values >> 8).astype(np.uint8)), path)


def _from_grey(grey: Image.Image, path: str | Path) -> Image.Image:
    counts = grey.histogram()  # in place; an array would be a copy, which takes longer than all else here
    levels = [value for value, count in enumerate(counts) if count]
    if levels in ([0], [255], [0, 255]):
        return grey
    if levels == [1] or (len(levels) == 2 and levels[0] == 0):
        return grey.point([0] + [255] * 255)
    values = np.asarray(grey)
    dark, light = values < DARK, values >= LIGHT
    square: np.ndarray = np.ones((3, 3), bool)
    near_both = ndimage.binary_dilation(dark, square, CONTOUR_PIXELS) & ndimage.binary_dilation(
        light, square, CONTOUR_PIXELS
    )
    if not light.any() or not (dark | light | near_both).all():
        raise AmbiguousMaskError(path, f"is a mask with {len(levels)} grey values, not only along the contour")
    return grey.point([0] * 128 + [255] * 128)
