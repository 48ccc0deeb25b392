import numpy as np
import pytest
from PIL import Image, ImageFilter

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.masks import read_mask
from nnunetv2_dermomamba.images.photograph import EXIF_ORIENTATION

ROWS, COLUMNS = np.mgrid[:60, :80]
LESION = np.hypot(ROWS - 28, COLUMNS - 44) < 19


def read(tmp_path, image, suffix="png", **options):
    image.save(tmp_path / f"a.{suffix}", **options)
    mask = read_mask(tmp_path / f"a.{suffix}")
    assert mask.mode == "L"
    assert set(np.unique(mask)) <= {0, 255}
    return np.asarray(mask) == 255


def grey(lesion, high=255, low=0, dtype=np.uint8):
    return Image.fromarray(np.where(lesion, dtype(high), dtype(low)))


def colour(lesion, high, low=(0, 0, 0)):
    return Image.fromarray(np.where(lesion[..., None], np.uint8(high), np.uint8(low)))


@pytest.mark.parametrize("high", [1, 2, 128, 255])
def test_two_grey_values(tmp_path, high):
    np.testing.assert_array_equal(read(tmp_path, grey(LESION, high)), LESION)


def test_light_grey_on_dark_grey(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, grey(LESION, 245, 12)), LESION)


@pytest.mark.parametrize("high", [1, 255, 256, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit(tmp_path, high, suffix):
    np.testing.assert_array_equal(read(tmp_path, grey(LESION, high, dtype=np.uint16), suffix), LESION)


def test_one_bit(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(LESION), "bmp"), LESION)


@pytest.mark.parametrize("high", [255, 65535, 1])
def test_lesion_everywhere(tmp_path, high):
    everywhere = np.ones((6, 8), bool)
    np.testing.assert_array_equal(read(tmp_path, grey(everywhere, high, dtype=np.uint16)), everywhere)


def test_anti_aliased_contour_is_cut_at_half(tmp_path):
    soft = grey(LESION).filter(ImageFilter.GaussianBlur(0.8))
    result = read(tmp_path, soft)
    assert np.count_nonzero(result != LESION) < 0.02 * LESION.sum()


def test_jpeg_noise_is_cut_at_half(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, grey(LESION), "jpg", quality=90), LESION)


@pytest.mark.parametrize("high", [(255, 255, 255), (200, 0, 0)])
def test_rgb(tmp_path, high):
    np.testing.assert_array_equal(read(tmp_path, colour(LESION, high)), LESION)


@pytest.mark.parametrize("high", [(255, 255, 255), (128, 0, 0)])
@pytest.mark.parametrize("flip", [False, True])
def test_palette_means_its_colours(tmp_path, high, flip):
    image = Image.fromarray((LESION ^ flip).astype(np.uint8)).convert("P")
    image.putpalette([*high, 0, 0, 0] if flip else [0, 0, 0, *high])
    np.testing.assert_array_equal(read(tmp_path, image), LESION)


def test_opaque_alpha(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, grey(LESION).convert("RGBA")), LESION)
    np.testing.assert_array_equal(read(tmp_path, grey(LESION).convert("LA")), LESION)


def test_mask_in_alpha(tmp_path):
    image = Image.new("RGBA", (80, 60), (255, 255, 255, 0))
    image.putalpha(grey(LESION))
    np.testing.assert_array_equal(read(tmp_path, image), LESION)


def test_alpha_that_agrees_with_the_colour(tmp_path):
    image = colour(LESION, (255, 0, 0))
    image.putalpha(grey(LESION))
    np.testing.assert_array_equal(read(tmp_path, image), LESION)


def test_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    np.testing.assert_array_equal(read(tmp_path, grey(LESION.T[::-1]), exif=exif), LESION)


def alpha_that_disagrees():
    image = grey(LESION).convert("RGBA")
    image.putalpha(grey(LESION[::-1]))
    return image


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (grey(LESION & False), "marks no lesion"),
        (Image.new("L", (80, 60), 128), "grey values"),
        (Image.fromarray(np.where(LESION, 255, np.where(ROWS > 30, 128, 0)).astype(np.uint8)), "grey values"),
        (Image.fromarray(LESION * np.linspace(0, 255, 80).astype(np.uint8)), "grey values"),
        (Image.fromarray(LESION.astype(np.uint8) + (ROWS > 30)), "grey values"),
        (colour(LESION, (255, 0, 0), (0, 255, 0)), "colours"),
        (alpha_that_disagrees(), "alpha"),
    ],
    ids=["empty", "uniform grey", "third region", "gradient", "three classes", "no black", "alpha disagrees"],
)
def test_no_single_reading(tmp_path, image, reason):
    with pytest.raises(ImageReadError, match=reason):
        read(tmp_path, image)


def test_floating_point_with_more_than_two_values(tmp_path):
    with pytest.raises(ImageReadError, match="outside 16 bits"):
        read(tmp_path, Image.fromarray(np.hypot(ROWS, COLUMNS).astype(np.float32)), "tif")
    np.testing.assert_array_equal(read(tmp_path, Image.fromarray(LESION.astype(np.float32)), "tif"), LESION)
