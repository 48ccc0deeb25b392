"""Evaluation of a folder of predicted masks."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm import tqdm

from nnunetv2_dermomamba.evaluation.aggregate import Figure, counting, summarise
from nnunetv2_dermomamba.evaluation.compare import Difference, check_comparable, compare
from nnunetv2_dermomamba.evaluation.gallery import Drawing, draw
from nnunetv2_dermomamba.evaluation.metrics import BOUNDARY_TOLERANCE, mask_metrics, probability_metrics
from nnunetv2_dermomamba.evaluation.pairing import Case, Pairing, pair
from nnunetv2_dermomamba.evaluation.reading import MaskError, read_labels, read_probability

__all__ = ["FAILED", "MISSING", "PROBABILITY_METRICS", "SCORED", "Evaluation", "Settings", "evaluate"]

MASK_METRICS = [
    "dice",
    "iou",
    "precision",
    "recall",
    "specificity",
    "thresholded_jaccard",
    "hd95",
    "assd",
    "boundary_f1",
]
PROBABILITY_METRICS = ["soft_dice", "authors_precision", "authors_recall"]
SCORED, MISSING, FAILED = "scored", "missing", "failed"


@dataclass(frozen=True)
class Settings:
    """What is scored and how.

    Attributes:
        labels: Foreground classes; ``None`` for binary masks (0 and 1, or 0 and 255), whose one class is 1.
        missing_as_empty: Score a case without prediction as an empty mask instead of leaving it out.
        resize: Bring a prediction of another size to its ground truth's (nearest neighbour; probabilities bilinear)
            instead of failing the case.
        tolerance: Boundary F1's tolerance as a share of the image's diagonal.

    Raises:
        ValueError: A label is not between 1 and 255, or the tolerance is negative.
    """

    labels: tuple[int, ...] | None = None
    missing_as_empty: bool = False
    resize: bool = False
    tolerance: float = BOUNDARY_TOLERANCE

    def __post_init__(self) -> None:
        if not all(1 <= label <= 255 for label in self.classes):
            raise ValueError(f"labels are between 1 and 255 (0 is background), not {list(self.classes)}")
        if not self.tolerance >= 0:
            raise ValueError(f"the boundary tolerance cannot be {self.tolerance}")

    @property
    def classes(self) -> tuple[int, ...]:
        """The foreground classes, 1 alone for binary masks."""
        return self.labels or (1,)


@dataclass
class Evaluation:
    """Figures per image and over all images.

    Attributes:
        frame: One row per ground-truth mask and class: ``case``, ``label``, ``status`` (``scored``, ``missing`` or
            ``failed``), ``message``, the image's ``height`` and ``width``, pixel counts and metrics.
        pairing: Which files were matched, and which were left over.
        settings: What was asked for.
        metrics: The metrics' names, in order.
        figures: By class and kind (``per_image``, ``pooled``, ``authors``), a :class:`Figure` for each metric.
        differences: By class, a :class:`Difference` for each metric, if there is another method.
        other: What ``differences`` compares with.
        drawings: By case, what the report shows of it.
    """

    frame: pd.DataFrame
    pairing: Pairing
    settings: Settings
    metrics: list[str]
    figures: dict[int, dict[str, dict[str, Figure]]]
    differences: dict[int, dict[str, Difference]] = field(default_factory=dict)
    other: str = ""
    drawings: dict[str, Drawing] = field(default_factory=dict)

    def of(self, label: int) -> pd.DataFrame:
        """The rows of one class that count in its figures."""
        return counting(self.frame, label)

    def against(self, other: pd.DataFrame, name: str) -> None:
        """Add the paired comparison with another method.

        Args:
            other: Its ``frame``, or the CSV file that it was written to.
            name: What to call it.

        Raises:
            ValueError: The two have no case of a class in common, or the other has a case twice.
        """
        for label in self.settings.classes:
            check_comparable(other, label, set(self.of(label)["case"]), name)
        self.other = name
        self.differences = {
            label: compare(self.of(label), counting(other, label), self.metrics) for label in self.settings.classes
        }


def evaluate(
    predictions: Path,
    ground_truth: Path,
    *,
    probabilities: Path | None = None,
    images: Path | None = None,
    settings: Settings | None = None,
    processes: int = 1,
    thumbnail: Callable[[int], int] | None = None,
    progress: bool = False,
    before_scoring: Callable[[set[str]], None] = lambda cases: None,
) -> Evaluation:
    """Score every ground-truth mask of a folder against its prediction.

    A case that has no prediction, that cannot be read or whose sizes differ does not stop the others: its row says so.

    Args:
        predictions: Folder of predicted masks.
        ground_truth: Folder of true masks.
        probabilities: Folder of probability maps, for the soft Dice.
        images: Folder of photographs, for the gallery.
        settings: What is scored and how.
        processes: Worker processes.
        thumbnail: If the gallery is wanted: pixels on the longer side of its pictures, given the number of cases.
        progress: Show a progress bar.
        before_scoring: Called with the names of the cases before any is scored; what it raises keeps them from being.

    Raises:
        PairingError: The folders cannot be matched.
        MaskError: Not one case could be scored; the message is the first case's.
    """
    settings = settings or Settings()
    pairing = pair(predictions, ground_truth, probabilities, images)
    before_scoring({case.name for case in pairing.cases})
    score = partial(
        _score_case,
        settings=settings,
        with_probability=probabilities is not None,
        thumbnail=thumbnail(len(pairing.cases)) if thumbnail else None,
    )
    rows, drawings = [], {}
    for case, (case_rows, drawing) in zip(
        pairing.cases, _in_processes(score, pairing.cases, processes, progress), strict=True
    ):
        rows += case_rows
        if drawing is not None:
            drawings[case.name] = drawing
    metrics = MASK_METRICS + (PROBABILITY_METRICS if probabilities else [])
    columns = ["case", "label", "status", "message", "height", "width", "tp", "fp", "fn", "tn", *metrics]
    frame = pd.DataFrame(rows, columns=columns)
    if frame["tp"].notna().sum() == 0:
        raise MaskError(f"no case could be scored; the first: {frame['message'].iloc[0]}")
    figures = {label: summarise(counting(frame, label), metrics) for label in settings.classes}
    return Evaluation(frame, pairing, settings, metrics, figures, drawings=drawings)


def _in_processes(function: Callable, cases: list[Case], processes: int, progress: bool) -> Any:
    """Results of ``function`` for every case, in order."""
    bar = partial(tqdm, total=len(cases), desc="evaluating", unit="case", disable=not progress)
    if processes <= 1:
        yield from bar(map(function, cases))
        return
    # "spawn" because the caller may have threads running, whose locks a fork would copy.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from bar(pool.map(function, cases, chunksize=max(1, min(8, len(cases) // (4 * processes)))))


def _score_case(
    case: Case, settings: Settings, with_probability: bool, thumbnail: int | None
) -> tuple[list[dict[str, Any]], Drawing | None]:
    """The case's rows, one for each class, and its drawing if one is wanted."""
    common: dict[str, Any] = {"case": case.name, "status": SCORED, "message": ""}
    truth = prediction = None
    scores: list[dict[str, Any]] = [{} for _ in settings.classes]
    try:
        truth = read_labels(case.ground_truth, settings.labels)
        common |= {"height": truth.shape[0], "width": truth.shape[1]}
        if case.prediction is None:
            common |= {"status": MISSING, "message": f"no prediction for {case.ground_truth.name}"}
        else:
            prediction = read_labels(case.prediction, settings.labels)
            prediction = _fit(prediction, truth.shape, settings.resize, case.prediction)
        if prediction is not None or settings.missing_as_empty:
            scored = np.zeros_like(truth) if prediction is None else prediction
            scores = [mask_metrics(scored == k, truth == k, settings.tolerance) for k in settings.classes]
        if with_probability and scores[0]:
            common["message"] = _add_probability(scores, case, truth, settings) or common["message"]
    except MaskError as error:
        common |= {"status": FAILED, "message": str(error)}
        scores = [{} for _ in settings.classes]
    rows = [{**common, "label": label, **score} for label, score in zip(settings.classes, scores, strict=True)]
    return rows, draw(truth, prediction, case.image, settings.classes, thumbnail) if thumbnail else None


def _add_probability(scores: list[dict[str, Any]], case: Case, truth: np.ndarray, settings: Settings) -> str:
    """Add the figures of the probability maps; returns why there are none, or an empty text."""
    try:
        maps = _read_maps(case, truth.shape, settings)
    except MaskError as error:
        return str(error)
    for label, score, probability in zip(settings.classes, scores, maps, strict=True):
        score |= probability_metrics(probability, truth == label)
    return ""


def _read_maps(case: Case, shape: tuple[int, ...], settings: Settings) -> list[np.ndarray]:
    """The probability of each class; 0 everywhere if there is no prediction."""
    if case.prediction is None:
        return [np.zeros(shape, dtype=np.float32) for _ in settings.classes]
    paths = [case.probabilities.get(label, case.probabilities.get(None)) for label in settings.classes]
    lacking = [str(label) for label, path in zip(settings.classes, paths, strict=True) if path is None]
    if lacking:
        of_class = f" of class {', '.join(lacking)}" if len(lacking) < len(paths) else ""
        raise MaskError(f"no probability map{of_class} for {case.ground_truth.name}")
    maps = []
    for label, path in zip(settings.classes, paths, strict=True):
        assert path is not None
        classes = (label,) if label in case.probabilities else settings.classes  # a map of one class holds only that
        maps.append(_fit(read_probability(path, label, classes), shape, settings.resize, path))
    return maps


def _fit(array: np.ndarray, shape: tuple[int, ...], resize: bool, path: Path) -> np.ndarray:
    """The array of a file at ``shape``: as it is, resized if that is wanted, or an error."""
    if array.shape == shape:
        return array
    if not resize:
        raise MaskError(
            f"{path} is {array.shape[1]} x {array.shape[0]} pixels, its ground truth "
            f"{shape[1]} x {shape[0]}; predict at native size, or pass --resize to bring it to that size"
        )
    # Square or 16:9 squeezed to 4:3 is a third off; portrait against landscape is off by more than a half.
    ratio = (array.shape[0] / shape[0]) / (array.shape[1] / shape[1])
    if abs(math.log(ratio)) > math.log(1.5):
        raise MaskError(f"{path} cannot be of the same photograph as its ground truth: other proportions")
    method = Image.Resampling.BILINEAR if array.dtype == np.float32 else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(array).resize((shape[1], shape[0]), method))
