import numpy as np
import pandas as pd
import pytest
from scipy.stats import wilcoxon

from nnunetv2_dermomamba.evaluation.compare import check_comparable, compare


def frame(values, names=None):
    return pd.DataFrame({"case": names or [f"c{i}" for i in range(len(values))], "dice": values})


def test_pairs_by_name_and_leaves_out_what_one_lacks():
    mine = frame([0.9, 0.8, 0.7, np.nan, 0.5], ["a", "b", "c", "d", "e"])
    theirs = frame([0.1, 0.6, 0.85, 0.4], ["x", "c", "a", "d"])
    difference = compare(mine, theirs, ["dice", "iou"])
    assert list(difference) == ["dice"]
    assert difference["dice"].n == 2
    assert difference["dice"].mean == pytest.approx(0.8)
    assert difference["dice"].other == pytest.approx(0.725)


def test_p_value_of_the_smallest_exact_case():
    # Six pairs, all better: of 2**6 sign patterns only this one and its mirror are as extreme.
    mine = np.linspace(0.6, 0.9, 6)
    assert compare(frame(mine), frame(mine - np.arange(1, 7) / 100), ["dice"])["dice"].p == pytest.approx(2 / 64)


def test_ties_are_left_out():
    rng = np.random.default_rng(0)
    mine, theirs = rng.random(30), rng.random(30)
    theirs[:5] = mine[:5]
    expected = wilcoxon(mine[5:], theirs[5:], method="approx").pvalue
    assert compare(frame(mine), frame(theirs), ["dice"])["dice"].p == pytest.approx(expected)


def test_a_method_against_itself():
    same = frame([0.5, 0.6])
    assert compare(same, same, ["dice"])["dice"].p == 1


def table(cases, label=1, tp=5.0):
    return pd.DataFrame({"case": cases, "label": label, "tp": tp, "dice": 0.5})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (table(["b"]), "t.csv has no case of class 1 in common with this evaluation; it has b, say"),
        (table(["a"], label=2), "t.csv has no scored case of class 1; evaluate it with the same --labels"),
        (table(["a"], tp=np.nan), "t.csv has no scored case of class 1"),
        (table(["b", "a", "a"]), "t.csv has case a of class 1 more than once; keep one row of each"),
    ],
)
def test_tables_that_cannot_be_compared_with(other, message):
    with pytest.raises(ValueError, match=message):
        check_comparable(other, 1, {"a", "c"}, "t.csv")


def test_a_table_with_one_common_case_and_other_classes_can_be_compared_with():
    check_comparable(pd.concat([table(["a", "b"]), table(["a", "b"], label=2)]), 1, {"a"}, "t.csv")
