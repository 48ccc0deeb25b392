"""Random numbers that depend on nothing but a seed and how far the training is."""

from __future__ import annotations

import os
import random

import numpy as np
import torch

OPTION = "DERMOMAMBA_SEED"


def environment_seed() -> int | None:
    """The seed that the environment variable ``DERMOMAMBA_SEED`` asks for, if any.

    Raises:
        ValueError: it is no whole number, or negative.
    """
    value = os.environ.get(OPTION)
    if value is None:
        return None
    if not value.isdecimal():
        raise ValueError(f"{OPTION} is {value!r}; set it to a whole number from 0 on, or unset it")
    return int(value)


def seed_generators(*entropy: int) -> None:
    """Set the states of Python's, NumPy's and PyTorch's global generators from a few numbers, all devices included."""
    python, numpy, pytorch = (int(word) for word in np.random.SeedSequence(entropy).generate_state(3))
    random.seed(python)
    np.random.seed(numpy)
    torch.manual_seed(pytorch)
