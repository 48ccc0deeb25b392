import os

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.images import photograph as reading
from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.photograph import EXIF_ORIENTATION, read_photograph
from nnunetv2_dermomamba.synthetic import draw_case


def read_rgb(path, shape=None):
    return np.asarray(read_photograph(path, shape).image)


@pytest.fixture
def photograph():
    return draw_case(np.random.default_rng(0), (60, 80))[0]


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif"])
def test_reads_rgb_unchanged(tmp_path, photograph, suffix):
    Image.fromarray(photograph).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_rgb(tmp_path / f"a.{suffix}"), photograph)


def test_grey_becomes_three_equal_channels(tmp_path, photograph):
    Image.fromarray(photograph[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), photograph[..., :1].repeat(3, axis=2))


def test_one_bit_becomes_black_and_white(tmp_path):
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png")[..., 1], np.eye(9) * 255)


def test_palette_becomes_its_colours(tmp_path, photograph):
    palette = Image.fromarray(photograph).quantize(200)
    palette.save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk_becomes_rgb(tmp_path, photograph, suffix):
    Image.fromarray(photograph).convert("CMYK").save(tmp_path / f"a.{suffix}")
    assert np.abs(read_rgb(tmp_path / f"a.{suffix}").astype(int) - photograph).mean() < 6


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit_keeps_the_high_byte(tmp_path, suffix):
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read_rgb(tmp_path / f"a.{suffix}")[..., 0], values >> 8)


def test_twelve_bit_in_sixteen_is_refused(tmp_path):
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(tmp_path / "a.png")
    with pytest.raises(ImageReadError, match="scale is unknown"):
        read_rgb(tmp_path / "a.png")


def test_floating_point_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).random((9, 9), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageReadError, match="range is unknown"):
        read_rgb(tmp_path / "a.tif")


def test_opaque_alpha_is_dropped_and_translucency_refused(tmp_path, photograph):
    alpha = np.full((60, 80, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([photograph, alpha], 2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_rgb(tmp_path / "a.png"), photograph)
    alpha[3, 4] = 254
    Image.fromarray(np.concatenate([photograph, alpha], 2)).save(tmp_path / "b.png")
    with pytest.raises(ImageReadError, match="translucent"):
        read_rgb(tmp_path / "b.png")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
def test_exif_orientation_is_undone(tmp_path, orientation, suffix):
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:32, :48] = (255, 0, 0)
    upright[32:, :48] = (0, 0, 255)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: upright.swapaxes(0, 1)[::-1],
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: upright.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(stored.copy()).save(tmp_path / f"a.{suffix}", exif=exif)
    for shape in (None, (16, 24)):
        result = read_photograph(tmp_path / f"a.{suffix}", shape)
        assert result.original_shape == (64, 96)
        pixels = np.asarray(result.image)
        assert pixels.shape[:2] == (shape or (64, 96))
        step = pixels.shape[0] // 4
        assert pixels[step, step, 0] > 200
        assert pixels[-step, step, 2] > 200
        assert pixels[step, -step].max() < 60


def test_reduced_decoding_differs_little_from_a_full_one(tmp_path):
    image, _ = draw_case(np.random.default_rng(1), (1500, 2000))
    Image.fromarray(image).save(tmp_path / "a.jpg", quality=95)
    full = Image.open(tmp_path / "a.jpg").resize((256, 192), Image.Resampling.LANCZOS)
    difference = np.abs(read_rgb(tmp_path / "a.jpg", (192, 256)).astype(int) - np.asarray(full))
    assert difference.mean() < 0.6


def test_no_aliasing(tmp_path):
    stripes = np.zeros((960, 1280), np.uint8)
    stripes[:, ::2] = 255
    for suffix in ("png", "jpg"):
        Image.fromarray(stripes).save(tmp_path / f"a.{suffix}", quality=95)
        inner = read_rgb(tmp_path / f"a.{suffix}", (192, 256))[8:-8, 8:-8]
        assert inner.min() > 110
        assert inner.max() < 145


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif"])
def test_truncated_file_is_refused(tmp_path, photograph, suffix):
    whole = tmp_path / f"a.{suffix}"
    Image.fromarray(photograph).save(whole)
    data = whole.read_bytes()
    for part in (0, 1, 10, len(data) // 2, len(data) - 100):
        whole.write_bytes(data[:part])
        for shape in (None, (20, 30)):
            with pytest.raises(ImageReadError, match=rf"a\.{suffix}"):
                read_rgb(whole, shape)


def test_missing_file_folder_and_pipe_are_refused(tmp_path):
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.png")
    for name in ("none.png", "link.png", "."):
        with pytest.raises(ImageReadError):
            read_rgb(tmp_path / name)
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    for name in ("pipe.png", "endless.png"):
        with pytest.raises(ImageReadError, match="is not a file"):
            read_rgb(tmp_path / name)


def test_several_pictures_are_refused(tmp_path, photograph):
    frame = Image.fromarray(photograph)
    frame.save(tmp_path / "a.tif", save_all=True, append_images=[frame])
    with pytest.raises(ImageReadError, match="several"):
        read_rgb(tmp_path / "a.tif")


def test_camera_previews_are_ignored(tmp_path, photograph):
    frame = Image.fromarray(photograph)
    frame.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[frame.resize((8, 6))])
    assert read_rgb(tmp_path / "a.jpg").shape == (60, 80, 3)


def test_huge_claims_are_refused_before_decoding(tmp_path, photograph, monkeypatch):
    Image.fromarray(photograph).save(tmp_path / "a.png")
    Image.fromarray(photograph).save(tmp_path / "a.jpg", progressive=True)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    monkeypatch.setattr(reading, "MAX_PIXELS", 60 * 80 - 1)
    with pytest.raises(ImageReadError, match="claims 80 x 60"):
        read_rgb(tmp_path / "a.png")
    monkeypatch.setattr(reading, "MAX_PIXELS", 60 * 80)
    monkeypatch.setattr(reading, "MAX_JPEG_SCAN_PIXELS", 2 * 60 * 80)
    with pytest.raises(ImageReadError, match="JPEG scans"):
        read_rgb(tmp_path / "a.jpg")
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 10)
    with pytest.raises(ImageReadError, match="larger"):
        read_rgb(tmp_path / "a.png")


def test_an_image_that_does_not_fit_in_memory_is_named(tmp_path, photograph):
    Image.fromarray(photograph).save(tmp_path / "a.png")
    with (
        pytest.raises(ImageReadError, match=r"a\.png.* does not fit in memory"),
        reading.open_image(tmp_path / "a.png"),
    ):
        raise MemoryError


def test_a_fault_of_the_program_is_not_called_damage(tmp_path, photograph):
    Image.fromarray(photograph).save(tmp_path / "a.png")
    for fault in (NameError, AttributeError, ImportError):
        with pytest.raises(fault), reading.open_image(tmp_path / "a.png"):
            raise fault
