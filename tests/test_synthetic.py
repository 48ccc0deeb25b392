import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.conversion.isic2018 import find_isic2018
from nnunetv2_dermomamba.synthetic import draw_case, write_isic2018_layout


@pytest.mark.parametrize("shape", [(64, 64), (192, 256), (301, 199)])
def test_draws_a_darker_lesion_under_the_mask(shape):
    for seed in range(5):
        image, mask = draw_case(np.random.default_rng(seed), shape)
        assert image.shape == (*shape, 3)
        assert image.dtype == np.uint8
        assert mask.shape == shape
        assert mask.dtype == bool
        assert 0.02 < mask.mean() < 0.8
        rows, columns = np.nonzero(mask)
        around = image[max(rows.min() - 5, 0) : rows.max() + 6, max(columns.min() - 5, 0) : columns.max() + 6]
        ring = ~mask[max(rows.min() - 5, 0) : rows.max() + 6, max(columns.min() - 5, 0) : columns.max() + 6]
        assert image[mask].mean() < around[ring].mean() - 5


def test_writes_the_official_layout_reproducibly(tmp_path):
    for name in ("a", "b"):
        write_isic2018_layout(tmp_path / name, training=2, test=1, seed=3)
    inventory = find_isic2018(tmp_path / "a")
    assert not inventory.problems
    assert [(case.case_id, case.subset) for case in inventory.cases] == [
        ("ISIC_0000000", "training"),
        ("ISIC_0000001", "training"),
        ("ISIC_0000002", "test"),
    ]
    for case in inventory.cases:
        assert Image.open(case.image).size == Image.open(case.mask).size
        twin = tmp_path / "b" / case.image.relative_to(tmp_path / "a")
        assert case.image.read_bytes() == twin.read_bytes()
    assert len({Image.open(case.image).size for case in inventory.cases}) > 1
