"""One case converted: photograph and mask read, brought to one size, written as nnU-Net wants them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from nnunetv2_dermomamba.conversion.pairing import Case, Problem
from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.masks import read_mask
from nnunetv2_dermomamba.images.photograph import SIDEWAYS, TRANSPOSE, Photograph, read_photograph
from nnunetv2_dermomamba.images.png import write_png
from nnunetv2_dermomamba.images.resample import resize_mask

__all__ = ["convert_case", "output_files"]


def output_files(case: Case) -> tuple[str, ...]:
    """The case's image and label in an nnU-Net data set folder, as relative paths."""
    part = "Tr" if case.subset == "training" else "Ts"
    image = f"images{part}/{case.case_id}_0000.png"
    return (image,) if case.mask is None else (image, f"labels{part}/{case.case_id}.png")


def convert_case(case: Case, folder: Path, shape: tuple[int, int] | None) -> dict | Problem:
    """Convert one case.

    Args:
        case: The case.
        folder: nnU-Net data set folder with its sub-folders; a file appears there only when it is complete.
        shape: (height, width) in pixels, or None to keep the size.

    Returns:
        A record (case, subset, source file, original and new shape as [height, width]), or the problem that keeps the
        case from being converted.

    Raises:
        OSError: The result cannot be written.
    """
    files = tuple(file for file in (case.image, case.mask) if file is not None)
    try:
        photograph = read_photograph(case.image, shape)
    except ImageReadError as error:
        return Problem(case.case_id, (case.image,), error.reason)
    outputs = [photograph.image]
    if case.mask is not None:
        try:
            mask = _mask_of(case.mask, photograph)
        except ImageReadError as error:
            return Problem(case.case_id, (case.mask,), error.reason)
        if mask.size[::-1] != photograph.original_shape:
            sizes = "image {1} x {0}, mask {2} x {3} pixels".format(*photograph.original_shape, *mask.size)
            return Problem(case.case_id, files, f"sizes differ: {sizes}")
        outputs.append((mask if shape is None else resize_mask(mask, shape)).point([0] * 128 + [1] * 128))

    for image, path in zip(outputs, output_files(case), strict=True):
        write_png(image, folder / path)
    return {
        "case": case.case_id,
        "subset": case.subset,
        "source": case.image.name,
        "files": list(output_files(case)),
        "original_shape": list(photograph.original_shape),
        "shape": list(photograph.image.size[::-1]),
    }


def _mask_of(path: Path, photograph: Photograph) -> Image.Image:
    """The mask, turned with its photograph if it was drawn on the pixels as stored, as its size shows."""
    mask = read_mask(path)
    height, width = photograph.original_shape
    if photograph.orientation in SIDEWAYS and height != width and mask.size == (height, width):
        return mask.transpose(TRANSPOSE[photograph.orientation])
    return mask
