"""Colour jitter in nnU-Net's pipeline and in that for batches."""

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from colour_jitter import GAIN, PROBABILITY, SHIFT, ColourJitterMixin
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import stats

from nnunetv2_dermomamba.augmentation.translate import BatchAugmenter

DRAWS = 4000
P_VALUE = 1e-3  # seeds are fixed, so a test fails always or never


class Jittered(ColourJitterMixin, nnUNetTrainer):
    pass


def jitter() -> list[RandomTransform]:
    pipeline = Jittered.get_training_transforms((16, 16), (-np.pi, np.pi), None, (0, 1), False)
    return pipeline.transforms[:2]


def augmenter(transform) -> BatchAugmenter:
    return BatchAugmenter(transform, (-1, 0, 1), torch.device("cpu"), np.random.default_rng(0))


def test_only_the_jitter_is_added() -> None:
    arguments = ((16, 16), (-np.pi, np.pi), None, (0, 1), False)
    with_jitter = Jittered.get_training_transforms(*arguments).transforms
    without = nnUNetTrainer.get_training_transforms(*arguments).transforms
    assert [type(t) for t in with_jitter[2:]] == [type(t) for t in without]


@pytest.mark.parametrize("n", [0, 1])
def test_both_paths_have_one_distribution(n: int) -> None:
    np.random.seed(0)
    torch.manual_seed(0)
    transform = jitter()[n]
    ones = torch.ones(DRAWS, 3, 2, 2)
    theirs = torch.stack([transform(image=image.clone())["image"] for image in ones])
    ours, _ = augmenter(transform)(ones.clone(), torch.zeros(DRAWS, 1, 2, 2, dtype=torch.int16))
    for values in (ours, theirs):
        assert torch.equal(values.amin((2, 3)), values.amax((2, 3)))  # constant in each channel
    ours, theirs = ours[:, :, 0, 0].numpy(), theirs[:, :, 0, 0].numpy()
    changed = [values[(values != 1).any(1)] for values in (ours, theirs)]
    for values in changed:
        assert abs(len(values) / DRAWS - PROBABILITY) < 0.03
        assert abs(np.corrcoef(values.T)[0, 1]) < 0.1  # channels are independent
    for channel in range(3):
        assert stats.ks_2samp(changed[0][:, channel], changed[1][:, channel]).pvalue > P_VALUE
    expected = (stats.uniform(GAIN[0], GAIN[1] - GAIN[0]), stats.norm(1, SHIFT))[n]
    assert stats.kstest(changed[0][:, 0], expected.cdf).pvalue > P_VALUE
