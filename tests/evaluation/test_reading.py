import numpy as np
import pytest
import SimpleITK as sitk
from masks import disc
from PIL import Image, ImageFilter

from nnunetv2_dermomamba.evaluation.reading import MaskError, read_labels, read_probability
from nnunetv2_dermomamba.images.masks import read_mask
from nnunetv2_dermomamba.images.photograph import EXIF_ORIENTATION

MASK = disc(40, 60, (20, 30), 12)


def save(path, image):
    image.save(path)
    return path


@pytest.mark.parametrize("extension", ["png", "bmp", "tif"])
@pytest.mark.parametrize("foreground", [1, 255])
def test_binary_masks(tmp_path, extension, foreground):
    path = save(tmp_path / f"a.{extension}", Image.fromarray((MASK * foreground).astype(np.uint8)))
    assert (read_labels(path) == MASK).all()


def test_one_bit_palette_colour_and_alpha(tmp_path):
    grey = Image.fromarray((MASK * 255).astype(np.uint8))
    inverted = Image.fromarray((~MASK).astype(np.uint8))
    inverted = inverted.convert("P")
    inverted.putdata((~MASK).astype(np.uint8).ravel().tolist())
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    images = {"bit": grey.convert("1"), "rgb": grey.convert("RGB"), "la": grey.convert("LA"), "palette": inverted}
    for name, image in images.items():
        assert (read_labels(save(tmp_path / f"{name}.png", image)) == MASK).all(), name


def test_colour_palette_gives_indices(tmp_path):
    image = Image.fromarray(MASK.astype(np.uint8)).convert("P")
    image.putdata(MASK.astype(np.uint8).ravel().tolist())
    image.putpalette([0, 0, 0, 128, 0, 0])
    path = save(tmp_path / "voc.png", image)
    assert (read_labels(path) == MASK).all()
    assert (read_labels(path, (1,)) == MASK).all()


def test_nifti(tmp_path):
    path = tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(MASK.astype(np.uint8)[None]), str(path))
    assert (read_labels(path) == MASK).all()


def test_a_full_and_an_empty_mask(tmp_path):
    for value, expected in [(0, 0), (1, 1), (255, 1)]:
        path = save(tmp_path / f"{value}.png", Image.new("L", (5, 4), value))
        assert (read_labels(path) == expected).all()


def test_several_classes(tmp_path):
    labels = np.array([[0, 1], [2, 2]], dtype=np.uint8)
    path = save(tmp_path / "a.png", Image.fromarray(labels))
    assert (read_labels(path, (1, 2)) == labels).all()
    with pytest.raises(MaskError, match=r"a\.png'.*--labels"):
        read_labels(path)
    with pytest.raises(MaskError, match="holds 0, 1, 2, but the labels are 0, 1"):
        read_labels(path, (1,))


@pytest.mark.parametrize("content", [b"", b"no image", None])
def test_broken_files_are_named(tmp_path, content):
    path = save(tmp_path / "a.png", Image.fromarray((MASK * 255).astype(np.uint8)))
    path.write_bytes(path.read_bytes()[:90] if content is None else content)
    with pytest.raises(MaskError, match=r"a\.png"):
        read_labels(path)


def test_a_photograph_is_no_mask(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    colour = save(tmp_path / "a.png", Image.fromarray(noise))
    with pytest.raises(MaskError, match="more colours than black and one other"):
        read_labels(colour)
    with pytest.raises(MaskError, match="not a 2D mask"):
        read_labels(colour, (1,))
    with pytest.raises(MaskError, match="grey values, not only along the contour"):
        read_labels(save(tmp_path / "b.png", Image.linear_gradient("L")))


def images_of_a_mask():
    grey = Image.fromarray((MASK * 255).astype(np.uint8))
    alpha = Image.new("RGBA", grey.size, "white")
    alpha.putalpha(grey)
    wide = Image.fromarray((MASK * 65535).astype(np.uint16))
    return {"alpha": alpha, "wide": wide, "soft": grey.filter(ImageFilter.GaussianBlur(0.8)), "grey": grey}


@pytest.mark.parametrize(("name", "image"), images_of_a_mask().items())
def test_a_binary_mask_is_what_the_conversion_takes_it_for(tmp_path, name, image):
    path = save(tmp_path / f"{name}.png", image)
    labels = read_labels(path)
    assert (labels * 255 == np.asarray(read_mask(path))).all()
    assert np.count_nonzero(labels != MASK) < 0.02 * MASK.sum()


@pytest.mark.parametrize("labels", [None, (1,)])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_are_turned_upright(tmp_path, labels, suffix):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(MASK.T[::-1].astype(np.uint8)).save(path, exif=exif)
    assert (read_labels(path, labels) == MASK).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_label_maps_are_never_read_as_empty_masks(tmp_path, dtype):
    path = save(tmp_path / "a.tif", Image.fromarray(np.array([[0, 1], [2, 2]], dtype=dtype)))
    with pytest.raises(MaskError, match="--labels"):
        read_labels(path)


def test_a_nifti_of_other_values_is_refused(tmp_path):
    path = tmp_path / "a.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(MASK.astype(np.uint8)[None] * 7), str(path))
    with pytest.raises(MaskError, match="it holds 0, 7 instead of 0 and 1"):
        read_labels(path)


@pytest.mark.parametrize(("dtype", "scale"), [(np.uint8, 255), (np.uint16, 65535)])
def test_probability_png(tmp_path, dtype, scale):
    probability = np.linspace(0, 1, 35).reshape(5, 7)
    path = save(tmp_path / "a.png", Image.fromarray(np.rint(probability * scale).astype(dtype)))
    read = read_probability(path, 1, (1,))
    assert read.dtype == np.float32
    assert abs(read - probability).max() <= 0.5 / scale + 1e-6


def test_probability_npz_with_background_and_with_regions(tmp_path):
    path = tmp_path / "a.npz"
    lesion = np.random.default_rng(0).random((1, 5, 7), dtype=np.float32)
    for channels in ([1 - lesion, lesion], [lesion]):
        np.savez_compressed(path, probabilities=np.stack(channels))
        assert (read_probability(path, 1, (1,)) == lesion[0]).all()
    np.savez_compressed(path, probabilities=np.stack([lesion] * 4))
    with pytest.raises(MaskError, match=r"a\.npz has probabilities of shape \(4, 1, 5, 7\)"):
        read_probability(path, 1, (1,))
    np.savez_compressed(path, other=lesion)
    with pytest.raises(MaskError, match=r"not nnU-Net's \.npz"):
        read_probability(path, 1, (1,))


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.full((1, 1, 5, 7), "no"), np.full((1, 1, 5, 7), np.nan), np.full((1, 1, 5, 7), 37.0)]
)
def test_npz_that_holds_no_probabilities_is_named(tmp_path, value):
    np.savez(tmp_path / "a.npz", probabilities=value)
    with pytest.raises(MaskError, match=r"a\.npz"):
        read_probability(tmp_path / "a.npz", 1, (1,))


def test_damaged_npz_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, probabilities=np.random.default_rng(0).random((2, 1, 50, 70)))
    whole = path.read_bytes()
    np.save(tmp_path / "b.npy", np.zeros(3))
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    for data in (b"", whole[: len(whole) // 2], bytes(broken), (tmp_path / "b.npy").read_bytes()):
        path.write_bytes(data)
        with pytest.raises(MaskError, match=r"not nnU-Net's \.npz"):
            read_probability(path, 1, (1,))


def test_map_of_other_pixels_than_8_or_16_bits_is_named(tmp_path):
    Image.fromarray(np.full((5, 7), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(MaskError, match="no probability map: its pixels are float32"):
        read_probability(tmp_path / "a.tif", 1, (1,))
