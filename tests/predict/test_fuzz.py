"""The kinds of photographs that only prediction reads; the others are in tests/images/test_fuzz.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import SimpleITK
from PIL import Image
from predict_helpers import photograph

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.predict import dicom

FUZZ = Path(__file__).with_name("fuzz_photo.py")
KINDS = ["lossy.webp", "lossless.webp", "raw.dcm", "compressed.dcm"]


def fuzz(folder: Path, name: str, count: int) -> None:
    pixels = photograph((64, 80))
    if name.endswith("webp"):
        Image.fromarray(pixels).save(folder / name, lossless=name.startswith("lossless"))
    else:
        image = SimpleITK.GetImageFromArray(pixels, isVector=True)
        SimpleITK.WriteImage(image, folder / name, useCompression=name.startswith("compressed"))
    environment = os.environ | {"PYTHONPATH": str(FUZZ.parents[1] / "images")}
    done = subprocess.run(
        [sys.executable, str(FUZZ), str(folder / name), str(count)],
        env=environment, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    print(name, result)
    assert result["other"] == {}, done.stderr[-2000:]
    assert result["signals"] == 0 or name.endswith("dcm")
    assert result["refused"] > count / 10
    assert result["slowest"] < 12  # with what the process takes to start
    assert result["peak"] < 2e9


@pytest.mark.parametrize("name", KINDS)
def test_mutated_photographs_a_few(tmp_path, name):
    fuzz(tmp_path, name, 100)


@pytest.mark.faults
@pytest.mark.parametrize("name", KINDS)
def test_mutated_photographs(tmp_path, name):
    fuzz(tmp_path, name, 5000)


@pytest.mark.faults
def test_a_dicom_decoder_that_never_ends_is_stopped(tmp_path, monkeypatch):
    """Another program, within the limits of the reading process."""
    endless = tmp_path / "python"
    endless.write_text(
        f"#!{sys.executable}\nfrom nnunetv2_dermomamba.predict import dicom\ndicom._limit()\nwhile True: pass\n"
    )
    endless.chmod(0o755)
    monkeypatch.setattr(dicom.sys, "executable", str(endless))
    with pytest.raises(ImageReadError, match="cannot be decoded"):
        dicom.read_dicom(tmp_path / "a.dcm")
