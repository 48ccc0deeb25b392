import os
import subprocess
import sys

import numpy as np
import pytest
import SimpleITK
from PIL import Image
from predict_helpers import photograph

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.predict.reading import read_photo


def write_dicom(pixels, path):
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=pixels.ndim == 3 and pixels.shape[2] == 3), path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".webp"])
def test_lossless_formats_are_read_as_they_are(tmp_path, suffix):
    image = photograph((64, 80))
    Image.fromarray(image).save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    read = read_photo(tmp_path / f"a{suffix}")
    assert np.array_equal(np.asarray(read.image), image)
    assert read.original_shape == (64, 80)


def test_webp_with_exif_orientation_is_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photograph((64, 80))).save(tmp_path / "a.webp", exif=exif, lossless=True)
    read = read_photo(tmp_path / "a.webp", (40, 30))
    assert read.original_shape == (80, 64)
    assert read.image.size == (30, 40)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_translucent_pixels_are_laid_on_white(tmp_path, suffix):
    pixels = np.dstack([photograph((64, 80)), np.full((64, 80), 255, np.uint8)])
    pixels[:10, :, 3] = 0
    Image.fromarray(pixels, "RGBA").save(tmp_path / f"a{suffix}", **({"lossless": True} if suffix == ".webp" else {}))
    read = np.asarray(read_photo(tmp_path / f"a{suffix}").image)
    assert (read[:10] == 255).all()
    assert np.array_equal(read[10:], pixels[10:, :, :3])


def test_dicom_colour_and_grey(tmp_path):
    image = photograph((64, 80))
    read = read_photo(write_dicom(image, tmp_path / "a.dcm"), (32, 40))
    assert read.original_shape == (64, 80)
    assert np.array_equal(np.asarray(read_photo(tmp_path / "a.dcm").image), image)
    grey = read_photo(write_dicom(image[..., 0], tmp_path / "g.dcm"))
    assert np.array_equal(np.asarray(grey.image)[..., 2], image[..., 0])


def test_dicom_that_claims_too_many_pixels_is_refused_before_decoding(tmp_path, monkeypatch):
    from nnunetv2_dermomamba.predict import dicom

    file = write_dicom(photograph((64, 80)), tmp_path / "a.dcm")
    monkeypatch.setattr(dicom, "MAX_PIXELS", 64 * 80 - 1)
    with pytest.raises(ValueError, match="claims 80 x 64 pixels"):
        dicom._decode(str(file))


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of that kind")
def test_dicom_is_decoded_under_limits(tmp_path):
    """The limits are the reading process's own, so one that reads the limits it has got stands for a decoder."""
    script = """
import resource, sys
from nnunetv2_dermomamba.predict import dicom
def limits(path):
    memory, time = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_CPU))
    raise ValueError(f"{memory} bytes, {time} s")
dicom._decode = limits
sys.exit(dicom.main("a.dcm"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 3
    assert done.stderr.strip() == f"{2**30} bytes, 10 s"


def test_dicom_of_other_kinds_is_refused(tmp_path):
    write_dicom(np.zeros((64, 80), np.int16), tmp_path / "ct.dcm")
    with pytest.raises(ImageReadError, match="visible light"):
        read_photo(tmp_path / "ct.dcm")
    write_dicom(np.stack([photograph((64, 80))[..., 0]] * 3), tmp_path / "film.dcm")
    with pytest.raises(ImageReadError, match="several pictures"):
        read_photo(tmp_path / "film.dcm")
    data = write_dicom(photograph((64, 80)), tmp_path / "a.dcm").read_bytes()
    (tmp_path / "half.dcm").write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageReadError, match=r"half\.dcm"):
        read_photo(tmp_path / "half.dcm")


def test_a_decoder_that_crashes_is_only_an_unreadable_file(tmp_path, monkeypatch):
    from nnunetv2_dermomamba.predict import dicom

    crasher = tmp_path / "python"
    crasher.write_text("#!/bin/sh\nkill -SEGV $$\n")
    crasher.chmod(0o755)
    monkeypatch.setattr(dicom.sys, "executable", str(crasher))
    with pytest.raises(ImageReadError, match="cannot be decoded"):
        dicom.read_dicom(tmp_path / "a.dcm")


@pytest.mark.parametrize("suffix", [".webp", ".jpg"])
def test_damaged_files_are_named(tmp_path, suffix):
    file = tmp_path / f"a{suffix}"
    Image.fromarray(photograph((64, 80))).save(file)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ImageReadError, match=rf"a\{suffix}"):
        read_photo(file)


def test_an_animation_is_refused(tmp_path):
    frames = [Image.fromarray(photograph((64, 80), seed)) for seed in range(2)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:])
    with pytest.raises(ImageReadError, match="several pictures"):
        read_photo(tmp_path / "a.webp")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_folders_and_nothing_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg", "missing.jpg"):
        with pytest.raises(ImageReadError, match=name):
            read_photo(tmp_path / name)
