from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.conversion.isic2018 import SUBSETS
from nnunetv2_dermomamba.synthetic import draw_case


@pytest.fixture
def nnunet(tmp_path, monkeypatch):
    """nnU-Net's folders, set in the environment; returns the one they are in."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


class IsicFolder:
    """A source in ISIC 2018's official layout, with small images."""

    def __init__(self, root: Path):
        self.root = root
        self.rng = np.random.default_rng(0)

    def files(self, case_id: str, subset: str = "training") -> tuple[Path, Path]:
        images, masks = SUBSETS[subset]
        return self.root / images / f"{case_id}.jpg", self.root / masks / f"{case_id}_segmentation.png"

    def add(self, *case_ids: str, subset: str = "training", shape: tuple[int, int] = (72, 96)) -> None:
        for case_id in case_ids:
            image, mask = draw_case(self.rng, shape)
            photograph, lesion = self.files(case_id, subset)
            for file in (photograph, lesion):
                file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(photograph)
            Image.fromarray(mask.astype(np.uint8) * 255).save(lesion)


@pytest.fixture
def isic(tmp_path):
    return IsicFolder(tmp_path / "isic")
