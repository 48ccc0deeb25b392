"""Which file belongs to which case.

A case is named by its path below the folder without extension and without the endings that data sets and tools add:
``ISIC_0000000_segmentation.png``, ``ISIC_0000000_mask.png`` and ``ISIC_0000000.nii.gz`` are all case ``ISIC_0000000``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from nnunetv2_dermomamba.predict.photos import SUFFIXES as PHOTO_SUFFIXES
from nnunetv2_dermomamba.predict.photos import is_companion

__all__ = ["Case", "Pairing", "PairingError", "case_id", "index_images", "index_masks", "index_probabilities", "pair"]

MASK_EXTENSIONS = (".png", ".bmp", ".tif", ".tiff", ".nii.gz", ".nii")
PROBABILITY_EXTENSIONS = (".png", ".npz")
MASK_ENDINGS = ("_mask", "_segmentation", "_lesion", "_prediction", "_pred", "_seg", "_label", "_groundtruth", "_gt")
PROBABILITY_ENDINGS = ("_probability", "_probabilities", "_prob")
LABEL_OF_MAP = re.compile(rf"(.+(?:{'|'.join(PROBABILITY_ENDINGS)}))_(\d{{1,3}})", re.ASCII | re.IGNORECASE)
OTHER_ENDINGS = ("_overlay",)
BESIDE_NNUNETS_MASKS = ("dataset.json", "plans.json", "predict_from_raw_data_args.json")
CHANNEL_ENDING = "_0000"  # nnU-Net's first channel


Key = TypeVar("Key", str, tuple[str, "int | None"])


class PairingError(ValueError):
    """The folders cannot be matched case by case."""


ProbabilityMaps = dict[int | None, Path]
"""Probability maps of a case by label; under ``None`` a file of the only class, or of all classes."""


@dataclass(frozen=True)
class Case:
    """One ground truth and what belongs to it; ``None`` or empty where a file is not there."""

    name: str
    ground_truth: Path
    prediction: Path | None = None
    probabilities: ProbabilityMaps = field(default_factory=dict)
    image: Path | None = None


@dataclass
class Pairing:
    """All cases of the ground truth, in order, and what was left over.

    Attributes:
        cases: One entry per ground-truth mask, sorted by name.
        extra: Predictions without ground truth, by case name.
        ignored: Files in the two mask folders that are no masks by their name, and that neither ``dermomamba predict``
            nor ``nnUNetv2_predict`` writes beside masks.
    """

    cases: list[Case]
    extra: dict[str, Path] = field(default_factory=dict)
    ignored: list[Path] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        """Names of the cases without a prediction."""
        return [case.name for case in self.cases if case.prediction is None]


def case_id(path: Path, extensions: Iterable[str], endings: Iterable[str]) -> str | None:
    """Name of the case that a file shows, or ``None`` if the extension is not one of ``extensions``.

    Args:
        path: Path relative to its folder.
        extensions: Lower-case extensions with their dot.
        endings: Endings to take off the stem, repeatedly, whatever their case.
    """
    name = path.as_posix()
    extension = next((e for e in sorted(extensions, key=len, reverse=True) if name.lower().endswith(e)), None)
    if extension is None:
        return None
    return _without_endings(name[: -len(extension)], tuple(endings))


def _without_endings(name: str, endings: tuple[str, ...]) -> str:
    while ending := next((e for e in endings if name.lower().endswith(e) and len(Path(name).name) > len(e)), None):
        name = name[: -len(ending)]
    return name


def pair(
    predictions: Path, ground_truth: Path, probabilities: Path | None = None, images: Path | None = None
) -> Pairing:
    """Match the files of up to four folders, searched with their sub-folders.

    Raises:
        PairingError: A folder is missing or holds no file of its kind, or two files of one folder name one case.
    """
    truth, ignored = index_masks(ground_truth)
    predicted, ignored_too = index_masks(predictions)
    predicted = {_without_channel(name, truth, predicted): path for name, path in predicted.items()}
    probability = index_probabilities(probabilities) if probabilities else {}
    image = index_images(images) if images else {}
    if not truth.keys() & predicted.keys():
        raise PairingError(
            f"no prediction matches a ground truth by name: {predictions} has {_some(predicted)}, "
            f"{ground_truth} has {_some(truth)}{_hint(truth, predicted, ground_truth)}"
        )
    cases = [
        Case(name, path, predicted.get(name), probability.get(name, {}), image.get(name))
        for name, path in sorted(truth.items())
    ]
    extra = {name: path for name, path in sorted(predicted.items()) if name not in truth}
    return Pairing(cases, extra, ignored + ignored_too)


def _without_channel(name: str, truth: Iterable[str], predicted: Iterable[str]) -> str:
    """Case of a mask predicted from nnU-Net's ``<case>_0000.png``, if that is the only mask of a true case."""
    case = name.removesuffix(CHANNEL_ENDING)
    return case if name not in truth and case in truth and case not in predicted else name


def index_masks(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """Masks of a folder by case name, and the files that are neither masks nor written with them by prediction."""
    found, ignored = [], []
    for path in _files(folder):
        if is_companion(path.name) or path.name in BESIDE_NNUNETS_MASKS:
            continue
        name = case_id(path.relative_to(folder), MASK_EXTENSIONS, MASK_ENDINGS)
        if name is None or _split_label(name)[0].lower().endswith(PROBABILITY_ENDINGS + OTHER_ENDINGS):
            ignored.append(path)
        else:
            found.append((name, path))
    return _unique(found, folder, "mask", MASK_EXTENSIONS), ignored


def index_probabilities(folder: Path) -> dict[str, ProbabilityMaps]:
    """Probability maps of a folder by case name.

    ``<case>_probability.png``, or ``<case>_probability_<label>.png`` of each class, counts as one anywhere; a plain
    ``<case>.png`` only in a folder without any such name, so that maps and masks may share a folder.
    """
    marked: list[tuple[tuple[str, int | None], Path]] = []
    plain: list[tuple[tuple[str, int | None], Path]] = []
    for path in _files(folder):
        name = case_id(path.relative_to(folder), PROBABILITY_EXTENSIONS, ())
        if name is None:
            continue
        stem, label = _split_label(name)
        case = _without_endings(stem, PROBABILITY_ENDINGS)
        is_marked = case != stem or path.suffix.lower() == ".npz"
        (marked if is_marked else plain).append(((case, label), path))
    indexed = _unique(marked or plain, folder, "probability map", PROBABILITY_EXTENSIONS)
    cases: dict[str, ProbabilityMaps] = {}
    for (case, label), path in indexed.items():
        cases.setdefault(case, {})[label] = path
    return cases


def _split_label(name: str) -> tuple[str, int | None]:
    """``a_probability_2`` as (``a_probability``, 2); other names as they are, with ``None``."""
    match = LABEL_OF_MAP.fullmatch(name)
    return (match[1], int(match[2])) if match else (name, None)


def index_images(folder: Path) -> dict[str, Path]:
    """Photographs of a folder by case name; nnU-Net's ``<case>_0000.png`` counts as ``<case>``."""
    found = [(case_id(path.relative_to(folder), PHOTO_SUFFIXES, ()), path) for path in _files(folder)]
    named = [(name, path) for name, path in found if name is not None]
    exact = _unique(named, folder, "photograph", PHOTO_SUFFIXES)
    channel = {name.removesuffix(CHANNEL_ENDING): path for name, path in exact.items() if name.endswith(CHANNEL_ENDING)}
    return {**channel, **exact}


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise PairingError(f"{folder} is not a folder")
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))


def _unique(found: list[tuple[Key, Path]], folder: Path, what: str, extensions: Iterable[str]) -> dict[Key, Path]:
    """The files by case name, or by case name and label."""
    if not found:
        raise PairingError(f"no {what} in {folder}: looked for {', '.join(extensions)}")
    index: dict[Key, Path] = {}
    for name, path in found:
        if name in index:
            case = name if isinstance(name, str) else name[0]
            raise PairingError(f"two files are {what} of case {case}: {index[name]} and {path}; remove one of them")
        index[name] = path
    return index


def _hint(truth: Iterable[str], predicted: Collection[str], ground_truth: Path) -> str:
    """The folder below the given one in which the ground truth has the predictions' names, if there is one."""
    folders = {name.rpartition("/")[0] for name in truth if name.rpartition("/")[2] in predicted}
    return f"; give -g {str(ground_truth / folders.pop())!r}" if len(folders) == 1 else ""


def _some(names: Iterable[str], count: int = 3) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")
