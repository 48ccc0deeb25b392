"""Photographs of any common kind read as upright 8-bit RGB.

Only what has one right reading is read: greyscale, palette, CMYK, 16 bit, opaque alpha and EXIF orientation are
converted; translucent pixels, several frames and floating-point values raise. Claims in the header are checked before
anything is decoded, so a decompression bomb costs nothing.
"""

from __future__ import annotations

import io
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.resample import resize_image

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "SIDEWAYS",
    "TRANSPOSE",
    "Photograph",
    "as_photograph",
    "exif_orientation",
    "has_alpha",
    "open_image",
    "read_photograph",
    "turn_upright",
]

FORMATS = ("JPEG", "PNG", "BMP", "TIFF")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
MAX_PIXELS = 80_000_000  # ISIC's largest image has 30 million; below Pillow's own warning, and 240 MB as RGB
MAX_FILE_BYTES = 512 << 20  # more than an uncompressed 16-bit RGB image of MAX_PIXELS
MAX_JPEG_SCAN_PIXELS = 20 * MAX_PIXELS  # a progressive JPEG has about ten scans; each costs a pass over all pixels

# A draft (JPEG decoded at 1/2, 1/4 or 1/8) of at least this many times the wanted size stays within a mean of 0.6 grey
# levels of a full decode; 2.0 would give 0.3, and convert a sixth fewer images per second (benchmarks/conversion.py).
DRAFT_GAP = 1.25

# What Pillow's decoders and the modules below them raise on damaged data, besides `OSError` and `MemoryError`. Names,
# attributes and imports that are missing are faults of the program, and are not among them.
DAMAGE = (
    ArithmeticError,
    EOFError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Image.DecompressionBombError,
    struct.error,
    zlib.error,
)

START_OF_SCAN = b"\xff\xda"
EXIF_ORIENTATION = 0x0112
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)


@dataclass(frozen=True)
class Photograph:
    """An upright RGB photograph.

    Attributes:
        image: Mode "RGB", resampled if a shape was asked for.
        original_shape: (height, width) in pixels of the upright image in the file.
        orientation: The EXIF orientation that was undone, a key of `TRANSPOSE`, or another number if none was.
    """

    image: Image.Image
    original_shape: tuple[int, int]
    orientation: int


@contextmanager
def open_image(path: str | Path, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    """Open an image file of a known format whose header claims a sane size; pixels are not decoded yet.

    What decoders raise on damaged files becomes an `ImageReadError`, in the body of the ``with`` statement too.

    Args:
        path: The file.
        formats: Pillow's names of the formats that are known.

    Raises:
        ImageReadError: The file cannot be opened or decoded, or is too large.
    """
    path = Path(path)
    try:
        data = _read_bytes(path)
        stream = io.BytesIO(data)
        with Image.open(stream, formats=formats) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageReadError(path, f"claims {width} x {height} pixels, more than {MAX_PIXELS:,} in all")
            scans = _jpeg_scans(image, data, stream.tell()) if image.format in ("JPEG", "MPO") else 1
            if scans * width * height > MAX_JPEG_SCAN_PIXELS:
                raise ImageReadError(path, f"has {scans} JPEG scans, which would take too long to decode")
            # MPO is what some cameras write: a JPEG followed by previews. The first picture is the photograph.
            if image.format != "MPO" and getattr(image, "n_frames", 1) != 1:
                raise ImageReadError(path, "holds several pictures; keep one")
            yield image
    except ImageReadError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageReadError(path, f"is not an image of a known format ({', '.join(formats)})") from None
    except OSError as error:
        raise ImageReadError(path, error.strerror or f"cannot be decoded: {error}") from error
    except MemoryError as error:
        raise ImageReadError(path, "does not fit in memory") from error
    except DAMAGE as error:
        raise ImageReadError(path, f"cannot be decoded: {type(error).__name__}: {error}") from error


def read_photograph(path: str | Path, shape: tuple[int, int] | None = None) -> Photograph:
    """Read a photograph as upright 8-bit RGB, resampled with an anti-aliasing filter if a shape is given.

    Args:
        path: JPEG, PNG, BMP or TIFF file.
        shape: (height, width) in pixels to resample to, or None to keep the size. JPEGs are then decoded at a reduced
            scale where that is safe, which is what makes this fast.

    Raises:
        ImageReadError: The file is damaged or has no single right reading.
    """
    with open_image(path) as image:
        return as_photograph(image, path, shape)


def as_photograph(image: Image.Image, name: object, shape: tuple[int, int] | None = None) -> Photograph:
    """An opened image, as `read_photograph` gives it.

    Args:
        image: A JPEG that was not loaded before may be decoded at a reduced scale.
        name: What errors call it.
        shape: (height, width) in pixels to resample to, or None to keep the size.

    Raises:
        ImageReadError: It has no single right reading.
    """
    orientation = exif_orientation(image)
    stored_size = image.size
    if shape is not None and image.format in ("JPEG", "MPO"):
        height, width = shape[::-1] if orientation in SIDEWAYS else shape
        image.draft(None, (round(width * DRAFT_GAP), round(height * DRAFT_GAP)))
    scale_kept = image.size == stored_size
    image.load()
    upright = turn_upright(image, _to_rgb(image, name), orientation)
    if scale_kept:
        width, height = upright.size
    else:
        width, height = stored_size[::-1] if orientation in SIDEWAYS else stored_size
    if shape is not None:
        upright = resize_image(upright, shape)
    return Photograph(upright, (height, width), orientation)


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation: a key of `TRANSPOSE`; another number means upright."""
    return image.getexif().get(EXIF_ORIENTATION, 1)


def has_alpha(image: Image.Image) -> bool:
    """Whether pixels of an image may be translucent."""
    return image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info


def turn_upright(image: Image.Image, pixels: Image.Image, orientation: int) -> Image.Image:
    """Undo the EXIF orientation of pixels that were read from an image, unless Pillow did, as it does for TIFF."""
    if image.format == "TIFF" or orientation not in TRANSPOSE:
        return pixels
    return pixels.transpose(TRANSPOSE[orientation])


def _read_bytes(path: Path) -> bytes:
    # A pipe or a device would block or never end.
    with open(path, "rb", opener=_open_without_blocking) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise ImageReadError(path, "is not a file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageReadError(path, f"is larger than {MAX_FILE_BYTES >> 20} MiB")
        return file.read(status.st_size)  # a buffer of the size that is asked for is set aside


def _jpeg_scans(image: Image.Image, data: bytes, header_bytes: int) -> int:
    """How many passes over the pixels it takes, at most, to decode a JPEG whose header ends with its first scan's."""
    first = data.rfind(START_OF_SCAN, 0, header_bytes)
    components_in_scan = data[first + 4]  # after the marker and two bytes of length
    if "progressive" not in image.info and first >= 0 and components_in_scan == len(image.getbands()):
        return 1  # the decoder refuses further scans
    return data.count(START_OF_SCAN)


def _open_without_blocking(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _to_rgb(image: Image.Image, name: object) -> Image.Image:
    if has_alpha(image):
        image = image.convert("RGBA")
        if np.asarray(image)[..., 3].min() < 255:
            raise ImageReadError(name, "has translucent pixels, whose colour depends on the background; flatten it")
    if image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), name))
    if image.mode not in ("RGB", "RGBA", "L", "1", "P", "CMYK", "YCbCr", "LAB"):
        raise ImageReadError(name, f"has pixels of mode {image.mode}, whose range is unknown; save it with 8 bits")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(values: np.ndarray, name: object) -> np.ndarray:
    """High byte of 16-bit values, as Pillow reads 16-bit RGB."""
    if values.min() < 0 or values.max() > 65535:
        raise ImageReadError(name, "has values outside 16 bits; save it with 8 bits")
    # 12-bit data in a 16-bit file would come out almost black.
    if values.max() < 4096:
        raise ImageReadError(
            name, "uses less than 1/16 of its 16-bit range, so its scale is unknown; save it with 8 bits"
        )
    return (values >> 8).astype(np.uint8)
