import json

import numpy as np
import pytest
from scipy import ndimage

from nnunetv2_dermomamba.predict.measurements import measure
from nnunetv2_dermomamba.predict.rendering import Classes, Rendered


def test_figures_of_a_mask_against_scipy():
    rng = np.random.default_rng(0)
    labels = (ndimage.gaussian_filter(rng.random((60, 80)), 3) > 0.52).astype(np.uint8)
    (row,) = measure(Rendered(labels, None, (0.8,)), Classes((1,), ("lesion",), True))
    y, x = ndimage.center_of_mass(labels)
    rows, columns = ndimage.find_objects(labels)[0]
    assert (row["centroid_y"], row["centroid_x"]) == pytest.approx((y, x), abs=0.01)
    assert (row["y_min"], row["y_max"] + 1) == (rows.start, rows.stop)
    assert (row["x_min"], row["x_max"] + 1) == (columns.start, columns.stop)
    assert row["parts"] == ndimage.label(labels, np.ones((3, 3)))[1] > 1


def test_figures_of_an_empty_mask():
    (row,) = measure(Rendered(np.zeros((4, 5), np.uint8), None, (float("nan"),)), Classes((1,), ("lesion",), True))
    assert (row["area_pixels"], row["parts"], row["x_min"], row["mean_probability"]) == (0, 0, None, None)
    assert json.dumps(row)
