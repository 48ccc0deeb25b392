import math

import pytest
import torch

from nnunetv2_dermomamba.finite_images import NotFiniteError, check_images


def test_images_of_finite_numbers_pass() -> None:
    check_images({"data": torch.full((2, 3, 64, 64), 3e38), "keys": ["a", "b"]})  # their sum is not finite
    with pytest.raises(NotFiniteError, match="of b, as"):
        check_images({"data": torch.tensor([1.0, math.inf]).reshape(2, 1, 1, 1), "keys": ["a", "b"]})
