"""Masks and probability maps from files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from nnunetv2_dermomamba.images.errors import AmbiguousMaskError, ImageReadError
from nnunetv2_dermomamba.images.masks import read_mask
from nnunetv2_dermomamba.images.photograph import exif_orientation, open_image, turn_upright

__all__ = ["MaskError", "read_labels", "read_probability"]


_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)  # as NumPy passes on of a broken .npz
ROUNDING = 1e-3  # means over models may end a little above 1, of float16 by this


class MaskError(ValueError):
    """A file is no usable mask or probability map; the message names it and the remedy."""


def read_labels(path: Path, labels: tuple[int, ...] | None = None) -> np.ndarray:
    """Read a label map.

    Args:
        path: PNG, BMP, TIFF or NIfTI file, 2D, one channel (or several equal ones).
        labels: Foreground labels to be found in it. ``None`` for a binary mask, read as the conversion reads it; in
            NIfTI its foreground is 1 or 255.

    Returns:
        Array (H, W) of uint8 labels, upright; a binary mask holds 0 and 1.

    Raises:
        MaskError: The file cannot be read, is not two-dimensional, or holds other values.
    """
    if labels is None:
        return _read_binary_nifti(path) if _is_nifti(path) else _read_binary(path)
    pixels = _read_pixels(path, by_colour=False)
    values = set(np.unique(pixels).tolist())
    if not values <= {0, *labels}:
        raise MaskError(f"{path} holds {_some(values)}, but the labels are {_some({0, *labels})}")
    return pixels.astype(np.uint8)


def _read_binary(path: Path) -> np.ndarray:
    try:
        mask = read_mask(path, may_be_empty=True)
    except AmbiguousMaskError as error:
        raise MaskError(f"{error} (if it holds several classes, pass --labels)") from error
    except ImageReadError as error:
        raise MaskError(str(error)) from error
    return (np.asarray(mask) > 0).astype(np.uint8)


def _read_binary_nifti(path: Path) -> np.ndarray:
    pixels = _read_pixels(path, by_colour=False)
    values = set(np.unique(pixels).tolist())
    if not (values <= {0, 1} or values <= {0, 255}):
        raise MaskError(
            f"{path} is no binary mask: it holds {_some(values)} instead of 0 and 1 or 0 and 255; "
            "for several classes pass --labels, otherwise threshold it first"
        )
    return (pixels > 0).astype(np.uint8)


def read_probability(path: Path, label: int, labels: tuple[int, ...]) -> np.ndarray:
    """Read the probability of one class.

    Args:
        path: 8- or 16-bit greyscale PNG (full scale is probability 1; binary tasks only), or nnU-Net's ``.npz`` with
            ``probabilities`` of shape (classes, 1, H, W): with a background channel first, or without (regions).
        label: The class wanted.
        labels: The foreground classes that the file holds, in order.

    Returns:
        Array (H, W), float32, 0 to 1.

    Raises:
        MaskError: The file cannot be read or does not fit the labels.
    """
    if path.suffix.lower() == ".npz":
        return _read_npz(path, labels.index(label), len(labels))
    if len(labels) > 1:
        raise MaskError(
            f"{path} holds one probability map, but there are {len(labels)} classes; give nnU-Net's .npz, or a map of "
            "each, CASE_probability_LABEL.png"
        )
    pixels = _read_pixels(path, by_colour=True)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise MaskError(f"{path} is no probability map: its pixels are {pixels.dtype}, not of 8 or 16 bits")
    scale = 255 if pixels.dtype == np.uint8 else 65535
    return (pixels / np.float32(scale)).astype(np.float32)


def _read_npz(path: Path, index: int, count: int) -> np.ndarray:
    try:
        with np.load(path) as archive:
            probabilities = archive["probabilities"].astype(np.float32)
    except (*_DAMAGED, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MaskError(f"{path} is not nnU-Net's .npz with an array 'probabilities': {error}") from error
    channel = {count: index, count + 1: index + 1}.get(len(probabilities)) if probabilities.ndim else None
    if channel is None or probabilities[0].squeeze().ndim != 2:
        raise MaskError(f"{path} has probabilities of shape {probabilities.shape}, not of {count} 2D classes")
    probability = probabilities[channel].squeeze()
    if not ((probability >= 0) & (probability <= 1 + ROUNDING)).all():
        raise MaskError(f"{path} holds no probabilities: some are not between 0 and 1")
    return probability


def _read_pixels(path: Path, by_colour: bool) -> np.ndarray:
    """(H, W) array; palette files give their colours' grey level or, without ``by_colour``, their indices."""
    try:
        pixels = _read_nifti(path) if _is_nifti(path) else _read_image(path, by_colour)
    except ImageReadError as error:
        raise MaskError(str(error)) from error
    except RuntimeError as error:  # SimpleITK's only exception
        raise MaskError(f"{path} cannot be read as NIfTI") from error
    if pixels.ndim != 2:
        raise MaskError(f"{path} is not a 2D mask of one channel: its shape is {pixels.shape}")
    return pixels


def _read_image(path: Path, by_colour: bool) -> np.ndarray:
    with open_image(path) as stored:
        orientation = exif_orientation(stored)
        stored.load()
        image = turn_upright(stored, stored, orientation)
        if image.mode == "1":
            return np.asarray(image.convert("L"))
        if image.mode in ("P", "PA") and by_colour:
            colours = np.asarray(image.convert("RGB"))
            grey = (colours == colours[..., :1]).all()
            return colours[..., 0] if grey else np.asarray(image.convert("P"))
        pixels = np.asarray(image.convert({"LA": "L", "RGBA": "RGB"}.get(image.mode, image.mode)))
    return pixels[..., 0] if pixels.ndim == 3 and (pixels == pixels[..., :1]).all() else pixels


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith((".nii", ".nii.gz"))


def _read_nifti(path: Path) -> np.ndarray:
    import SimpleITK as sitk

    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    return pixels[0] if pixels.ndim == 3 and pixels.shape[0] == 1 else pixels


def _some(values: set[float], count: int = 6) -> str:
    ordered = sorted(values)
    return ", ".join(f"{value:g}" for value in ordered[:count]) + (", ..." if len(ordered) > count else "")
