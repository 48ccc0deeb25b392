import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from nnunetv2_dermomamba.images.resample import resize_image, resize_mask


def random_mask(rng, shape, smoothness):
    noise = ndimage.gaussian_filter(rng.normal(size=shape), smoothness)
    return noise > np.quantile(noise, rng.uniform(0.02, 0.98))


def resized(mask, shape):
    result = resize_mask(Image.fromarray(mask.astype(np.uint8) * 255), shape)
    assert result.mode == "L"
    pixels = np.asarray(result)
    assert pixels.shape == shape
    assert set(np.unique(pixels)) <= {0, 255}
    return pixels == 255


@pytest.mark.parametrize("shape", [(100, 130), (767, 1022), (40, 50), (192, 256)])
def test_mask_keeps_its_share_of_the_frame(shape):
    rng = np.random.default_rng(0)
    for smoothness in (1, 5, 20):
        mask = random_mask(rng, shape, smoothness)
        assert abs(resized(mask, (192, 256)).mean() - mask.mean()) * 192 * 256 <= 0.5 + 1e-6


def test_mask_matches_a_cut_of_the_exact_cover_at_half():
    mask = random_mask(np.random.default_rng(1), (192 * 6, 256 * 6), 60)
    cover = mask.reshape(192, 6, 256, 6).mean((1, 3))
    assert np.count_nonzero(resized(mask, (192, 256)) != (cover > 0.5)) < 30


def test_whole_factor_shrinking_of_whole_blocks_is_exact():
    small = random_mask(np.random.default_rng(2), (48, 64), 3)
    np.testing.assert_array_equal(resized(np.kron(small, np.ones((5, 5), bool)), (48, 64)), small)


def test_one_pixel_survives_where_it_was_and_so_does_one_background_pixel():
    mask = np.zeros((2848, 4288), bool)
    mask[2000, 1000] = True
    result = resized(mask, (192, 256))
    assert np.argwhere(result).tolist() == [[2000 * 192 // 2848, 1000 * 256 // 4288]]
    assert np.count_nonzero(~resized(~mask, (192, 256))) == 1


def test_a_thin_line_survives():
    mask = np.zeros((1000, 1000), bool)
    mask[:, 500:502] = True
    assert abs(resized(mask, (100, 100)).sum() - 20) <= 1


@pytest.mark.parametrize("value", [False, True])
def test_uniform_masks_stay_uniform(value):
    assert (resized(np.full((33, 44), value), (192, 256)) == value).all()


def test_image_keeps_its_mean_and_flat_regions():
    image = np.full((700, 900, 3), (200, 120, 90), np.uint8)
    np.testing.assert_array_equal(np.asarray(resize_image(Image.fromarray(image), (192, 256)))[5, 5], (200, 120, 90))
    noise = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    result = np.asarray(resize_image(Image.fromarray(noise), (192, 256)))
    assert abs(result.mean() - noise.mean()) < 1
    assert result.std() < 0.4 * noise.std()
