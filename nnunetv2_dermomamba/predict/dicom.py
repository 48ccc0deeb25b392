"""DICOM dermoscopy (visible light), read by SimpleITK in a process of its own.

Its decoders are native code that a damaged file can crash, so prediction must not share a process with them.
Run as ``python -m nnunetv2_dermomamba.predict.dicom FILE``, the module writes the pixels as ``.npy`` to standard
output.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.photograph import MAX_PIXELS

__all__ = ["main", "read_dicom"]

TIMEOUT = 60  # seconds, on a loaded machine; a photograph takes one
PROCESSOR_TIME = 10  # seconds, in the reading process
MEMORY = 1 << 30  # bytes, in the reading process
REFUSED = 3  # exit status: standard error holds the reason


def read_dicom(path: Path) -> Image.Image:
    """Read a DICOM photograph.

    Returns:
        Mode "RGB".

    Raises:
        ImageReadError: It is damaged, or no single picture of visible light with 8 bits.
    """
    command = [sys.executable, "-m", "nnunetv2_dermomamba.predict.dicom", os.path.abspath(path)]
    try:
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise ImageReadError(path, f"cannot be decoded within {TIMEOUT} s") from None
    if done.returncode == REFUSED:
        raise ImageReadError(path, done.stderr.decode(errors="replace").strip())
    if done.returncode != 0:
        raise ImageReadError(path, "cannot be decoded as DICOM")
    try:
        return Image.fromarray(np.load(io.BytesIO(done.stdout), allow_pickle=False))
    except (ValueError, EOFError) as error:
        raise ImageReadError(path, "cannot be decoded as DICOM") from error


def _decode(path: str) -> np.ndarray:
    """uint8 array of shape (height, width, 3).

    Raises:
        ValueError: No photograph.
        RuntimeError: SimpleITK cannot read it.
    """
    import SimpleITK as sitk

    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(path)
    reader.ReadImageInformation()
    width, height, *slices = reader.GetSize()
    if width * height > MAX_PIXELS:
        raise ValueError(f"claims {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if any(count != 1 for count in slices):
        raise ValueError("holds several pictures; keep one")
    components = reader.GetNumberOfComponents()
    if components not in (1, 3) or reader.GetPixelID() not in (sitk.sitkUInt8, sitk.sitkVectorUInt8):
        kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        raise ValueError(f"is no photograph of visible light: {components} channels of {kind}, not 3 of 8 bits")
    pixels = sitk.GetArrayFromImage(reader.Execute()).reshape(height, width, components)
    return np.repeat(pixels, 3, axis=2) if components == 1 else pixels


def _limit() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_TIME, PROCESSOR_TIME + 1))


def main(path: str) -> int:
    """Write a DICOM file's pixels to standard output; returns the exit status."""
    _limit()
    try:
        pixels = _decode(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return REFUSED
    except RuntimeError:  # SimpleITK's only exception, of many lines
        print("is damaged, or of a kind of DICOM that SimpleITK cannot read", file=sys.stderr)
        return REFUSED
    except MemoryError:
        print("does not fit in memory", file=sys.stderr)
        return REFUSED
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(pixels), allow_pickle=False)
    sys.stdout.buffer.write(buffer.getbuffer())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
