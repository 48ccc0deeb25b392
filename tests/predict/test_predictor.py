import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image
from predict_helpers import photograph
from tolerances import FORWARD

from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.photograph import EXIF_ORIENTATION, read_photograph
from nnunetv2_dermomamba.predict import Predictor
from nnunetv2_dermomamba.predict.rendering import STRIP_PIXELS, Classes, Prediction, render


def disc(height, width, radius=0.3):
    """Probability of a soft disc, as the training size sees it."""
    y, x = (np.mgrid[0:height, 0:width] + 0.5) / np.array([height, width])[:, None, None]
    return (1 / (1 + np.exp((np.hypot(y - 0.5, x - 0.5) - radius) * 60))).astype(np.float32)


def binary(channel, shape):
    return Prediction(np.stack([1 - channel, channel]), shape, Classes((1,), ("lesion",), True))


def nnunets_own(model, data, folds=(0,), mirroring=False):
    """Labels and probabilities of nnU-Net's own predictor for data of (channels, 1, height, width)."""
    theirs = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cpu"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(model), folds)
    labels, probability = theirs.predict_single_npy_array(
        data.astype(np.float32), {"spacing": (999, 1, 1)}, None, None, True
    )
    return labels[0], probability[:, 0]


@pytest.mark.parametrize("mirroring", [False, True])
def test_probabilities_are_those_of_nnunets_own_predictor_over_all_folds(model, mirroring):
    image = photograph((64, 64))
    mine = Predictor(model, "cpu", mirroring=mirroring)
    _, probability = mine(image)
    _, expected = nnunets_own(model, image.transpose(2, 0, 1)[:, None], (0, 1), mirroring)
    error = np.linalg.norm(probability - expected[1]) / np.linalg.norm(expected[1])
    assert error < FORWARD[torch.float32]
    assert probability.std() > 0


def test_a_model_of_one_channel_gets_grey(grey):
    image = photograph((64, 64))
    _, probability = Predictor(grey, "cpu", mirroring=False)(image)
    _, expected = nnunets_own(grey, np.asarray(Image.fromarray(image).convert("L"))[None, None])
    np.testing.assert_allclose(probability, expected[1], atol=1e-5)


def test_regions_of_a_model_with_an_ignore_label(regions):
    image = photograph((64, 64))
    mask, probability = Predictor(regions, "cpu", mirroring=False)(image)
    labels, expected = nnunets_own(regions, image.transpose(2, 0, 1)[:, None])
    assert probability.shape == expected.shape == (2, 64, 64)
    np.testing.assert_allclose(probability, expected, atol=1e-5)
    assert np.array_equal(mask, labels)
    assert set(np.unique(mask)) <= {0, 1, 2}


def test_one_fold_differs_from_both(model):
    image = photograph((64, 64))
    _, both = Predictor(model, "cpu", mirroring=False)(image)
    _, first = Predictor(model, "cpu", mirroring=False, folds=["0"])(image)
    assert np.abs(both - first).max() > 1e-3


def test_photographs_are_resized_as_the_conversion_does(predictor, tmp_path):
    file = tmp_path / "a.jpg"
    Image.fromarray(photograph((300, 400))).save(file)
    small = np.asarray(read_photograph(file, (64, 64)).image).transpose(2, 0, 1)[:, None].astype(np.float32)
    expected = predictor.preprocessor.run_case_npy(
        small, None, {"spacing": (999, 1, 1)}, predictor.plans, predictor.configuration, predictor.model.dataset
    )[0]
    prepared = predictor.read(file)
    assert torch.equal(prepared.data, torch.from_numpy(expected))
    assert prepared.shape == (300, 400)


def test_arrays_images_and_files_give_the_same(predictor, tmp_path):
    image = photograph((90, 120))
    Image.fromarray(image).save(tmp_path / "a.png")
    mask, probability = predictor(image)
    assert mask.shape == probability.shape == (90, 120)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, probability > 0.5)
    for other in (Image.fromarray(image), tmp_path / "a.png", str(tmp_path / "a.png")):
        assert np.array_equal(predictor(other)[1], probability)


def save_odd(image, folder):
    """Files of one photograph that need more than opening."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    for suffix in ("jpg", "png", "webp", "tif"):
        Image.fromarray(image).save(folder / f"turned.{suffix}", exif=exif)
    Image.fromarray(image[..., 0].astype(np.uint16) * 257).save(folder / "16bit.png")
    alpha = np.full(image.shape[:2], 255, np.uint8)
    alpha[:30] = 0
    Image.fromarray(np.dstack([image, alpha])).save(folder / "translucent.png")
    Image.fromarray(image).quantize(32).save(folder / "palette.png", transparency=3)
    return sorted(folder.iterdir())


def test_images_are_read_as_their_files_are(predictor, tmp_path):
    for file in save_odd(photograph((60, 76)), tmp_path):  # too small for a JPEG to be decoded at a reduced scale
        mask, probability = predictor(file)
        with Image.open(file) as image:
            for _ in range(2):  # the first call loads it
                assert np.array_equal(predictor(image)[1], probability), file.name
        assert mask.shape == ((76, 60) if file.stem == "turned" else (60, 76)), file.name


def test_an_image_without_a_right_reading_is_refused(predictor, tmp_path):
    dark = Image.fromarray(np.full((8, 8), 4000, np.uint16))
    with pytest.raises(ImageReadError, match="'image': uses less than 1/16"):
        predictor(dark)
    dark.save(tmp_path / "dark.png")
    with Image.open(tmp_path / "dark.png") as image, pytest.raises(ImageReadError, match=r"dark\.png': uses less"):
        predictor(image)


def test_black_borders_that_nnunet_crops_come_back(predictor):
    image = photograph((64, 64))
    image[:20], image[:, -10:] = 0, 0
    mask, probability = predictor(image)
    assert not probability[:20].any()
    assert not probability[:, -10:].any()
    assert probability[20:, :-10].all()
    assert mask.shape == (64, 64)


@pytest.mark.parametrize("image", [np.zeros((8, 8, 4), np.uint8), np.zeros((8, 8, 3)), np.zeros(8, np.uint8)])
def test_arrays_of_another_kind_are_refused(predictor, image):
    with pytest.raises(ValueError, match="expected is uint8"):
        predictor(image)


def test_edges_are_smooth_at_native_size():
    native = (1200, 1600)
    rendered = render(binary(disc(48, 64), native))
    assert np.count_nonzero(rendered.labels != (disc(*native) > 0.5)) < 0.005 * rendered.labels.sum()
    # thresholded before it is enlarged, the edge has steps
    stairs = np.asarray(Image.fromarray((disc(48, 64) > 0.5).astype(np.uint8)).resize(native[::-1], 0))
    assert np.count_nonzero(stairs != (disc(*native) > 0.5)) > 0.02 * rendered.labels.sum()


def test_strips_meet_without_a_seam():
    native = (3000, 2000)
    assert native[0] * native[1] > 2 * STRIP_PIXELS
    channel = np.random.default_rng(0).random((30, 40), np.float32)
    rendered = render(binary(channel, native), np.float32)
    whole = np.asarray(Image.fromarray(channel).resize(native[::-1], Image.Resampling.BILINEAR))
    assert np.abs(rendered.probability[0] - whole).max() < 1e-5
    assert rendered.mean_inside[0] == pytest.approx(whole[whole > 0.5].mean(), rel=1e-4)


def test_several_classes_get_the_label_of_the_most_probable():
    channels = np.random.default_rng(0).dirichlet(np.ones(4), (10, 12)).transpose(2, 0, 1).astype(np.float32)
    classes = Classes((1, 2, 3), ("a", "b", "c"), True)
    rendered = render(Prediction(channels, (10, 12), classes), np.uint16)
    assert np.array_equal(rendered.labels, channels.argmax(0))
    assert rendered.probability.shape == (3, 10, 12)


def test_of_regions_the_last_one_above_half_is_the_label():
    regions = np.array([[[0.9, 0.9, 0.1]], [[0.2, 0.8, 0.6]]], np.float32)
    rendered = render(Prediction(regions, (1, 3), Classes((1, 2), ("whole", "core"), False)))
    assert rendered.labels.tolist() == [[1, 2, 2]]
