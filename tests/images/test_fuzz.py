import contextlib
import json
import struct
import subprocess
import sys
import time
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.masks import read_mask
from nnunetv2_dermomamba.images.photograph import MAX_PIXELS, read_photograph
from nnunetv2_dermomamba.synthetic import draw_case

SAVED_AS = {
    "baseline.jpg": {},
    "progressive.jpg": {"progressive": True},
    "rgb.png": {},
    "rgb.bmp": {},
    "raw.tif": {},
    "lzw.tif": {"compression": "tiff_lzw"},
    "deflate.tif": {"compression": "tiff_adobe_deflate"},
    "jpeg.tif": {"compression": "jpeg"},
}
READER = Path(__file__).with_name("fuzz_reader.py")


def fuzz(folder, name, count):
    Image.fromarray(draw_case(np.random.default_rng(0), (64, 96))[0]).save(folder / name, **SAVED_AS[name])
    command = [sys.executable, str(READER), str(folder), name.split(".")[0], str(count)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert process.returncode == 0, f"crashed with {process.returncode}: {process.stderr[-2000:]}"
    result = json.loads(process.stdout.splitlines()[-1])
    assert not result["raised"]
    assert result["refused"] > count / 2
    assert result["slowest"] < 10
    assert result["peak"] < 2e9
    return result


@pytest.mark.parametrize("name", ["baseline.jpg", "rgb.png"])
def test_mutated_images_a_few(tmp_path, name):
    fuzz(tmp_path, name, 150)


@pytest.mark.faults
@pytest.mark.parametrize("name", SAVED_AS)
def test_mutated_images(tmp_path, name):
    fuzz(tmp_path, name, 5000)


def png(width, height, data, *before):
    """The file of a header, further chunks as (kind, content), and the compressed pixels."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    chunks = [header, *(chunk(*one) for one in before), chunk(b"IDAT", data), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.mark.parametrize("side", [2**31 - 1, 100_000, 10_000])
def test_a_png_that_claims_more_than_it_can_hold(tmp_path, side):
    (tmp_path / "bomb.png").write_bytes(png(side, side, zlib.compress(b"\0" * 10_000_000)))
    start = time.process_time()
    for read in (read_photograph, read_mask):
        with pytest.raises(ImageReadError, match=r"claims|DecompressionBomb"):  # nothing was decoded
            read(tmp_path / "bomb.png")
    assert time.process_time() - start < 1


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt", b"iCCP"])
def test_a_png_whose_text_unpacks_to_200_megabytes(tmp_path, kind):
    names = b"name\0\1\0\0\0" if kind == b"iTXt" else b"name\0\0"
    bomb = names + zlib.compress(b"\0" * 200_000_000)
    (tmp_path / "bomb.png").write_bytes(png(2, 2, zlib.compress(b"\0" * 14), (kind, bomb)))
    tracemalloc.start()
    with contextlib.suppress(ImageReadError):
        assert not np.asarray(read_photograph(tmp_path / "bomb.png").image).any()
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()


@pytest.mark.faults
def test_the_largest_image_allowed_stays_within_time_and_memory(tmp_path):
    """A flat image of the most pixels allowed, in every format, as a small file where the format allows it."""
    width = 8000
    flat = Image.new("RGB", (width, MAX_PIXELS // width), (120, 80, 60))
    for name, options in SAVED_AS.items():
        flat.save(tmp_path / name, **options)
    Image.new("L", flat.size, 100).save(tmp_path / "mask.png")
    code = """
import json, resource, sys, time
from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.photograph import read_photograph
from nnunetv2_dermomamba.images.masks import read_mask
slowest = 0
for read in (read_photograph, lambda path: read_photograph(path, (192, 256)), read_mask):
    start = time.process_time()
    try:
        read(sys.argv[1])
    except ImageReadError as error:
        print(error)
    slowest = max(slowest, time.process_time() - start)
print(json.dumps([slowest, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]))
"""
    for name in (*SAVED_AS, "mask.png"):
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        slowest, peak = json.loads(output)
        print(name, slowest, peak)
        assert slowest < 10, name
        assert peak < 2e9, name


@pytest.mark.faults
@pytest.mark.parametrize("progressive", [True, False])
def test_a_jpeg_of_endless_scans(tmp_path, progressive):
    whole = tmp_path / "whole.jpg"
    image = Image.new("RGB", (6000, 6000), (120, 80, 60))
    image.save(whole, progressive=progressive)
    data = whole.read_bytes()
    last_scan = data[data.rindex(b"\xff\xda") : -2]
    (tmp_path / "bomb.jpg").write_bytes(data[:-2] + last_scan * 300 + data[-2:])
    start = time.process_time()
    with pytest.raises(ImageReadError, match="scans") if progressive else pytest.raises(ImageReadError):
        read_photograph(tmp_path / "bomb.jpg")
    assert time.process_time() - start < 10
