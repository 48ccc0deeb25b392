import numpy as np
from PIL import Image

from nnunetv2_dermomamba.predict.overlay import draw_overlay
from nnunetv2_dermomamba.predict.rendering import Classes


def changed_by_overlay(rows: slice, columns: slice) -> np.ndarray:
    """Where the contour of a rectangle changes a photograph of 160 x 200."""
    photo = Image.new("RGB", (200, 160), (180, 140, 120))
    labels = np.zeros((160, 200), np.uint8)
    labels[rows, columns] = 1
    drawn = np.asarray(draw_overlay(photo.copy(), labels, Classes((1,), ("lesion",), True)))
    return (drawn != np.asarray(photo)).any(axis=2)


def test_the_overlay_marks_the_contour_and_nothing_else():
    changed = changed_by_overlay(slice(40, 120), slice(50, 150))
    assert changed[40, 50:150].all()
    assert changed[40:120, 149].all()
    assert not changed[50:110, 60:140].any()
    assert not changed[:30].any()


def test_a_lesion_at_the_edge_of_the_photograph_has_a_closed_contour():
    changed = changed_by_overlay(slice(0, 90), slice(120, 200))
    assert changed[0, 120:].all()
    assert changed[:90, 199].all()
    assert not changed[10:80, 130:190].any()
    assert not changed[100:].any()
