import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.conversion.case import convert_case
from nnunetv2_dermomamba.conversion.pairing import Case, Problem
from nnunetv2_dermomamba.images.photograph import EXIF_ORIENTATION
from nnunetv2_dermomamba.synthetic import draw_case


@pytest.fixture
def folder(tmp_path):
    for name in ("imagesTr", "labelsTr"):
        (tmp_path / "out" / name).mkdir(parents=True)
    return tmp_path / "out"


def save(tmp_path, image, mask, **options):
    Image.fromarray(image).save(tmp_path / "a.png", **options)
    Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / "m.png")
    return Case("a", tmp_path / "a.png", tmp_path / "m.png", "training")


def result(folder):
    image = np.asarray(Image.open(folder / "imagesTr" / "a_0000.png"))
    return image, np.asarray(Image.open(folder / "labelsTr" / "a.png"))


def test_native_size_keeps_every_pixel(tmp_path, folder):
    image, mask = draw_case(np.random.default_rng(0), (65, 83))
    record = convert_case(save(tmp_path, image, mask), folder, None)
    assert record["original_shape"] == record["shape"] == [65, 83]
    np.testing.assert_array_equal(result(folder)[0], image)
    np.testing.assert_array_equal(result(folder)[1], mask)


def test_size_is_height_by_width(tmp_path, folder):
    image, mask = draw_case(np.random.default_rng(0), (90, 70))
    record = convert_case(save(tmp_path, image, mask), folder, (48, 64))
    assert record["original_shape"] == [90, 70]
    assert record["shape"] == [48, 64]
    assert result(folder)[0].shape == (48, 64, 3)
    assert result(folder)[1].shape == (48, 64)


@pytest.mark.parametrize("drawn_on", ["upright", "stored"])
@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_mask_follows_a_turned_photograph(tmp_path, folder, drawn_on, orientation):
    image, mask = draw_case(np.random.default_rng(0), (64, 90))
    turn = {
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],
        7: lambda a: a.swapaxes(0, 1)[::-1, ::-1],
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored_mask = mask if drawn_on == "upright" else turn(mask)
    record = convert_case(save(tmp_path, turn(image).copy(), stored_mask.copy(), exif=exif), folder, None)
    assert record["original_shape"] == [64, 90]
    np.testing.assert_array_equal(result(folder)[0], image)
    np.testing.assert_array_equal(result(folder)[1], mask)


def test_sizes_that_differ_are_a_problem(tmp_path, folder):
    image, mask = draw_case(np.random.default_rng(0), (64, 90))
    problem = convert_case(save(tmp_path, image, mask[1:]), folder, (48, 64))
    assert isinstance(problem, Problem)
    assert problem.reason == "sizes differ: image 90 x 64, mask 90 x 63 pixels"
    assert problem.files == (tmp_path / "a.png", tmp_path / "m.png")
    assert not list(folder.rglob("*.png"))
