import os

import numpy as np
import pytest
from PIL import Image

from nnunetv2_dermomamba.images.png import write_png


@pytest.mark.parametrize(("kind", "shape"), [("uint8", (9, 7)), ("uint8", (9, 7, 3)), ("uint16", (9, 7))])
def test_what_is_written_is_read_again(tmp_path, kind, shape):
    pixels = np.random.default_rng(0).integers(0, np.iinfo(kind).max, shape, kind, endpoint=True)
    write_png(Image.fromarray(pixels), tmp_path / "a.png")
    read = np.asarray(Image.open(tmp_path / "a.png"))
    assert read.dtype == kind
    np.testing.assert_array_equal(read, pixels)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(source, target):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_png(Image.new("L", (9, 9)), tmp_path / "a.png")
    assert os.listdir(tmp_path) == []
