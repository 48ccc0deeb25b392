"""The thresholded Jaccard against the ISIC challenge's own scorer, which ``make references`` installs where it can."""

import numpy as np
import pytest
from masks import blob, disc, save_mask

from nnunetv2_dermomamba.evaluation.evaluate import evaluate

segmentation = pytest.importorskip("isic_challenge_scoring.segmentation")


def bar(length):
    """A bar in an empty mask; of two bars, the shorter one's length over the longer one's is their Jaccard index."""
    mask = np.zeros((64, 128), dtype=bool)
    mask[30, :length] = True
    return mask


def save(folder, pairs):
    """Under the challenge's names."""
    for number, (prediction, truth) in enumerate(pairs):
        save_mask(folder / "masks" / f"ISIC_{number:07d}_segmentation.png", prediction)
        save_mask(folder / "truth" / f"ISIC_{number:07d}_segmentation.png", truth)
    return folder / "masks", folder / "truth"


def test_lesions_of_all_qualities(tmp_path):
    rng = np.random.default_rng(0)
    discs = [disc(radius=30, centre=(48, 64 + shift)) for shift in range(0, 40, 2)]
    pairs = [(moved, discs[0]) for moved in discs] + [(blob(rng), blob(rng)) for _ in range(20)]
    masks, truth = save(tmp_path, pairs)
    ours = evaluate(masks, truth)
    shares = ours.frame["iou"]
    assert (shares < 0.65).any()
    assert (shares > 0.65).any()
    theirs = segmentation.SegmentationScore.from_dir(truth, masks).macro_average
    figures = ours.figures[1]["per_image"]
    assert figures["thresholded_jaccard"].value == pytest.approx(theirs["threshold_jaccard"], abs=1e-12)
    assert figures["iou"].value == pytest.approx(theirs["jaccard"], abs=1e-12)
    assert figures["dice"].value == pytest.approx(theirs["dice"], abs=1e-12)


@pytest.mark.parametrize(
    ("predicted", "true", "expected"),
    [(65, 100, 0.65), (100, 65, 0.65), (64, 100, 0.0), (100, 100, 1.0), (0, 0, 1.0), (0, 50, 0.0), (50, 0, 0.0)],
)
def test_the_threshold_and_empty_masks(tmp_path, predicted, true, expected):
    # A second pair, since not one defined Dice would be an error here.
    masks, truth = save(tmp_path, [(bar(predicted), bar(true)), (bar(80), bar(80))])
    ours = evaluate(masks, truth).frame["thresholded_jaccard"]
    theirs = segmentation.SegmentationScore.from_dir(truth, masks).macro_average["threshold_jaccard"]
    assert ours.iloc[0] == expected
    assert ours.mean() == pytest.approx(theirs, abs=1e-12)
