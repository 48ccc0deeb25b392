import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap

from nnunetv2_dermomamba.evaluation.aggregate import AUTHORS, PER_IMAGE, POOLED, summarise


def table(rows):
    return pd.DataFrame(rows, columns=["tp", "fp", "fn", "tn", "dice"])


def test_mean_and_pooled_differ_by_the_weight_of_large_lesions():
    frame = table([(100, 0, 0, 900, 1.0), (0, 1, 1, 998, 0.0)])
    figures = summarise(frame, ["dice"])
    assert figures[PER_IMAGE]["dice"].value == 0.5
    assert figures[POOLED]["dice"].value == pytest.approx(200 / 202)
    assert figures[POOLED]["recall"].value == pytest.approx(100 / 101)


def test_intervals_agree_with_scipy():
    rng = np.random.default_rng(0)
    dice = rng.beta(8, 2, size=200)
    tp = rng.integers(100, 1000, size=200)
    frame = table([(t, 50, 30, 500, d) for t, d in zip(tp, dice, strict=True)])
    figures = summarise(frame, ["dice"])
    for figure, data, statistic in [
        (figures[PER_IMAGE]["dice"], dice, np.mean),
        (figures[POOLED]["iou"], tp, lambda t, axis: t.sum(axis) / (t.sum(axis) + 80 * t.shape[axis])),
    ]:
        expected = bootstrap((data,), statistic, n_resamples=20_000, method="percentile").confidence_interval
        width = expected.high - expected.low
        assert figure.low == pytest.approx(expected.low, abs=0.08 * width)  # Monte Carlo error of 2 000 draws
        assert figure.high == pytest.approx(expected.high, abs=0.08 * width)


def test_undefined_values_are_left_out_and_counted():
    rows = [(0, 0, 0, 10, np.nan), *[(1, 0, 0, 9, score) for score in [0.4] * 5 + [0.8] * 5]]
    figure = summarise(table(rows), ["dice"])[PER_IMAGE]["dice"]
    assert (figure.value, figure.n, figure.undefined, figure.median) == (pytest.approx(0.6), 10, 1, pytest.approx(0.6))
    assert 0.4 < figure.low < 0.6 < figure.high < 0.8


def test_few_images_have_no_interval():
    rows = [(1, 0, 0, 9, 0.4 + i / 20) for i in range(9)]
    for figures in summarise(table(rows), ["dice"]).values():
        assert np.isnan([figures["dice"].low, figures["dice"].high]).all()
    assert not np.isnan(summarise(table([*rows, rows[0]]), ["dice"])[PER_IMAGE]["dice"].low)
    undefined = (1, 0, 0, 9, np.nan)
    assert np.isnan(summarise(table([*rows, undefined]), ["dice"])[PER_IMAGE]["dice"].low)


def test_nothing_defined():
    figures = summarise(table([(0, 0, 0, 10, np.nan)] * 2), ["dice"])
    assert figures[PER_IMAGE]["dice"].n == 0
    assert np.isnan(figures[PER_IMAGE]["dice"].value)
    assert np.isnan(figures[POOLED]["dice"].low)


def test_same_images_same_interval():
    frame = table([(i, 1, 2, 30, i / 20) for i in range(1, 20)])
    assert summarise(frame, ["dice"]) == summarise(frame, ["dice"])


def test_authors_figures_need_probabilities():
    columns = ["iou", "soft_dice", "authors_precision", "authors_recall"]
    frame = table([(5, 1, 2, 30, 0.7)] * 3).assign(iou=0.6, soft_dice=0.65, authors_precision=0.8, authors_recall=0.5)
    figures = summarise(frame, ["dice", *columns])[AUTHORS]
    assert {name: figure.value for name, figure in figures.items()} == pytest.approx(
        {"dice": 0.65, "iou": 0.6, "precision": 0.8, "recall": 0.5}
    )
    assert AUTHORS not in summarise(frame, ["dice"])


def test_no_rows():
    with pytest.raises(ValueError, match="no image"):
        summarise(table([]), ["dice"])
