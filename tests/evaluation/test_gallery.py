import re

import numpy as np
import pytest
from masks import blob, disc
from PIL import Image, ImageDraw

from nnunetv2_dermomamba.evaluation.gallery import CANVAS, draw


def polygons(path):
    """Corners of every closed outline in a path made of M, l and z."""
    found = []
    for x, y, steps in re.findall(r"M(-?\d+) (-?\d+)l([-\d ]+)z", path):
        moves = np.array(re.findall(r"-?\d+", steps), dtype=int).reshape(-1, 2)
        found.append(np.concatenate([[[int(x), int(y)]], np.array([int(x), int(y)]) + moves.cumsum(axis=0)]))
    return found


def fill(path, width, height):
    """The even-odd interior of a path, as a mask of the canvas."""
    inside = np.zeros((height, width), dtype=bool)
    for polygon in polygons(path):
        one = Image.new("1", (width, height))
        ImageDraw.Draw(one).polygon([tuple(point) for point in polygon.tolist()], fill=1)
        inside ^= np.asarray(one)
    return inside


@pytest.mark.parametrize(("shape", "seed"), [((150, 200), 0), ((1400, 2000), 1), ((90, 60), 2)])
def test_the_outline_encloses_the_mask(shape, seed):
    mask = blob(np.random.default_rng(seed), *shape)
    drawing = draw(mask.astype(np.uint8), None, None, (1,), 100)
    assert max(drawing.width, drawing.height) == CANVAS
    assert drawing.contours[1][1] == ""
    filled = fill(drawing.contours[1][0], drawing.width, drawing.height)
    enlarged = Image.fromarray(mask).resize((drawing.width, drawing.height), Image.Resampling.NEAREST)
    assert (filled & np.asarray(enlarged)).sum() * 2 / (filled.sum() + np.asarray(enlarged).sum()) > 0.98


def test_a_mask_at_the_edge_is_outlined_there():
    drawing = draw(np.ones((30, 40), dtype=np.uint8), None, None, (1,), 100)
    (corners,) = polygons(drawing.contours[1][0])
    assert corners.min(axis=0).tolist() == [0, 0]
    assert np.abs(corners.max(axis=0) - [2000, 1500]).max() <= 1


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
def test_photographs_are_embedded_upright_and_small(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by a quarter
    Image.fromarray(np.zeros((120, 90, 3), dtype=np.uint8)).save(path, exif=exif)
    drawing = draw(disc(90, 120, (45, 60), 20).astype(np.uint8), None, path, (1,), 60)
    assert drawing.picture.startswith("data:image/webp;base64,")
    assert drawing.note == ""
    assert (drawing.width, drawing.height) == (2000, 1500)


@pytest.mark.parametrize("content", ["other proportions", "no image"])
def test_what_cannot_be_shown_is_said(tmp_path, content):
    path = tmp_path / "photo.png"
    if content == "no image":
        path.write_text(content)
    else:
        Image.new("RGB", (50, 90)).save(path)
    drawing = draw(disc().astype(np.uint8), None, path, (1,), 60)
    assert drawing.picture == ""
    assert "photo.png" in drawing.note
