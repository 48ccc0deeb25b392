"""Photographs of every kind that prediction takes: those of the conversion, and WebP, translucent ones and DICOM."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.photograph import (
    FORMATS,
    Photograph,
    as_photograph,
    exif_orientation,
    has_alpha,
    open_image,
    turn_upright,
)
from nnunetv2_dermomamba.images.resample import resize_image
from nnunetv2_dermomamba.predict.dicom import read_dicom

__all__ = ["is_dicom", "photo_in_memory", "read_photo"]

HEAD_BYTES = 132  # as far as DICOM's mark reaches


def read_photo(path: str | Path, shape: tuple[int, int] | None = None) -> Photograph:
    """Read a photograph as upright 8-bit RGB, resampled as the conversion does.

    Translucent pixels are laid on white, as viewers show them.

    Args:
        path: JPEG, PNG, BMP, TIFF, WebP or DICOM file.
        shape: (height, width) in pixels to resample to, or None to keep the size.

    Raises:
        ImageReadError: The file is damaged or has no single right reading.
    """
    path = Path(path)
    head = _head(path)
    if head[128:] == b"DICM":
        return _resampled(read_dicom(path), shape)
    with open_image(path, (*FORMATS, "WEBP")) as image:
        return _convert(image, path, shape)


def photo_in_memory(image: Image.Image, shape: tuple[int, int] | None = None) -> Photograph:
    """A PIL image through the steps of a file, at full scale; an EXIF orientation that it has is undone.

    Args:
        image: It is loaded, and not changed.
        shape: (height, width) in pixels to resample to, or None to keep the size.

    Raises:
        ImageReadError: It has no single right reading.
    """
    image.load()
    return _convert(image, getattr(image, "filename", "") or "image", shape)


def is_dicom(path: Path) -> bool:
    """Whether a file has DICOM's mark; False, too, if it cannot be read."""
    try:
        return _head(path)[128:] == b"DICM"
    except ImageReadError:
        return False


def _head(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would block
            raise ImageReadError(path, "is not a file" if path.exists() else "does not exist")
        with open(path, "rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise ImageReadError(path, error.strerror or str(error)) from error


def _convert(image: Image.Image, name: object, shape: tuple[int, int] | None) -> Photograph:
    if not has_alpha(image):
        return as_photograph(image, name, shape)
    orientation = exif_orientation(image)
    image.load()
    return _resampled(turn_upright(image, _on_white(image), orientation), shape)


def _resampled(image: Image.Image, shape: tuple[int, int] | None) -> Photograph:
    return Photograph(image if shape is None else resize_image(image, shape), (image.height, image.width), 1)


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(image, mask=image.getchannel("A"))
    return white
