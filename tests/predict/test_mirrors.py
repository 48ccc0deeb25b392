"""A patch and its mirror images as one batch: nnU-Net's own results."""

import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from predict_helpers import photograph
from tolerances import FORWARD, relative_error
from torch import nn

from nnunetv2_dermomamba.predict import Predictor
from nnunetv2_dermomamba.predict.mirrors import MirrorsAtOncePredictor

CPU = torch.device("cpu")


def initialised(kind, axes, mirroring, network):
    predictor = kind(use_mirroring=mirroring, device=CPU, allow_tqdm=False)
    predictor.network, predictor.allowed_mirroring_axes = network, axes
    return predictor


@pytest.mark.parametrize(("axes", "mirroring"), [((0, 1), True), ((1,), True), (None, True), ((0, 1), False)])
def test_is_the_mean_over_the_images_that_nnunet_mirrors(axes, mirroring):
    torch.manual_seed(0)
    network, x = nn.Conv2d(3, 2, (3, 5), padding="same"), torch.randn(1, 3, 8, 6)
    ours, theirs = (initialised(k, axes, mirroring, network) for k in (MirrorsAtOncePredictor, nnUNetPredictor))
    expected = theirs._internal_maybe_mirror_and_predict(x)
    with torch.inference_mode():
        assert relative_error(ours._at_once(x), expected) < FORWARD[torch.float32]
    assert torch.equal(ours._internal_maybe_mirror_and_predict(x), expected)  # nnU-Net's way on a CPU


@pytest.mark.parametrize("fits", [1, 0])
def test_where_the_batch_does_not_fit_images_come_one_after_the_other(monkeypatch, fits):
    network, x = nn.Conv2d(3, 2, 1), torch.randn(1, 3, 8, 6)
    predictor = initialised(MirrorsAtOncePredictor, (0, 1), True, network)
    expected = predictor._internal_maybe_mirror_and_predict(x)
    calls = []

    def at_once(x):
        calls.append(x)
        if len(calls) > fits:
            raise torch.OutOfMemoryError
        return x

    predictor.device = torch.device("cuda")
    monkeypatch.setattr(predictor, "_at_once", at_once)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    results = [predictor._internal_maybe_mirror_and_predict(x) for _ in range(4)]
    assert len(calls) == fits + 1
    assert all(torch.equal(result, expected) for result in results[fits:])


@pytest.mark.gpu
@pytest.mark.parametrize("mirroring", [False, True])
def test_probabilities_on_a_gpu_are_nnunets_own(model, mirroring):
    mine = Predictor(model, "cuda", mirroring=mirroring)
    theirs = nnUNetPredictor(use_mirroring=mirroring, device=torch.device("cuda"), allow_tqdm=False)
    theirs.initialize_from_trained_model_folder(str(model), (0, 1))
    for number in range(3):
        image = np.roll(photograph((64, 64)), 5 * number, 1)
        _, probability = mine(image)
        data = image.transpose(2, 0, 1)[:, None].astype(np.float32)
        _, expected = theirs.predict_single_npy_array(data, {"spacing": (999, 1, 1)}, None, None, True)
        assert relative_error(torch.tensor(probability), torch.tensor(expected[1, 0])) < 0.01
