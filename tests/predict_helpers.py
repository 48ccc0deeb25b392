"""Photographs for the tests of prediction."""

import numpy as np

from nnunetv2_dermomamba.synthetic import draw_case


def photograph(shape, seed=0):
    """Synthetic dermoscopy, uint8 of shape (height, width, 3)."""
    return draw_case(np.random.default_rng(seed), shape)[0].copy()
