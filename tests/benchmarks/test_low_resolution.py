"""nnU-Net's pipeline without simulated low resolution."""

import numpy as np
from batchgeneratorsv2.transforms.spatial.low_resolution import SimulateLowResolutionTransform
from low_resolution import WithoutLowResolutionMixin
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class Without(WithoutLowResolutionMixin, nnUNetTrainer):
    pass


def test_only_the_low_resolution_is_left_out() -> None:
    arguments = ((16, 16), (-np.pi, np.pi), None, (0, 1), False)
    nnunets, ours = (
        [type(getattr(t, "transform", t)) for t in trainer.get_training_transforms(*arguments).transforms]
        for trainer in (nnUNetTrainer, Without)
    )
    assert SimulateLowResolutionTransform in nnunets
    assert ours == [kind for kind in nnunets if kind is not SimulateLowResolutionTransform]
