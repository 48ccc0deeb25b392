"""Photographs and masks brought together by case."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.files import MAX_NAME_BYTES
from nnunetv2_dermomamba.images.photograph import IMAGE_SUFFIXES

__all__ = [
    "Case",
    "Inventory",
    "Problem",
    "find_folder",
    "folder_around",
    "image_files",
    "merge",
    "pair",
]

SEARCH_DEPTH = 3


@dataclass(frozen=True)
class Case:
    """One photograph with its mask.

    Attributes:
        case_id: nnU-Net's case identifier.
        image: The photograph.
        mask: The lesion mask, or None for a test image without one.
        subset: "training", "validation" or "test"; the latter two become nnU-Net's test set.
    """

    case_id: str
    image: Path
    mask: Path | None
    subset: str


@dataclass(frozen=True)
class Problem:
    """Files that cannot become a case, and why."""

    case_id: str
    files: tuple[Path, ...]
    reason: str

    def __str__(self) -> str:
        return f"{self.case_id!r}: {self.reason} ({', '.join(repr(str(file)) for file in self.files)})"


@dataclass
class Inventory:
    """What a source holds."""

    cases: list[Case] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def pair(
    images: Iterable[tuple[str, Path]], masks: Iterable[tuple[str, Path]] | None, subset: str = "training"
) -> Inventory:
    """Bring photographs and masks of the same case together.

    Args:
        images: (case identifier, file) of every photograph.
        masks: (case identifier, file) of every mask, or None if the subset has none.
        subset: See `Case`.

    Returns:
        The pairs, and as problems: photographs without mask, masks without photograph, several files of one kind for a
        case (identifiers that differ in case only count as one, since they collide on some file systems), and
        identifiers that cannot be file names.
    """
    files: dict[str, tuple[list[Path], list[Path]]] = defaultdict(lambda: ([], []))
    spellings: dict[str, set[str]] = defaultdict(set)
    for kind, named in enumerate((images, masks or ())):
        for name, file in named:
            case_id = unicodedata.normalize("NFC", name)
            files[case_id][kind].append(file)
            spellings[case_id.casefold()].add(case_id)

    inventory = Inventory()
    for case_id, (photographs, lesions) in sorted(files.items()):
        everything = (*photographs, *lesions)
        reason = _name_problem(case_id)
        if len(photographs) > 1 or len(lesions) > 1 or len(spellings[case_id.casefold()]) > 1:
            reason = "the identifier occurs more than once"
            everything = tuple(f for i in sorted(spellings[case_id.casefold()]) for kind in files[i] for f in kind)
        elif not photographs:
            reason = f"a mask without image (looked for {', '.join(IMAGE_SUFFIXES)})"
        elif not lesions and masks is not None:
            reason = "an image without mask"
        if reason:
            inventory.problems.append(Problem(case_id, everything, reason))
        else:
            inventory.cases.append(Case(case_id, photographs[0], lesions[0] if lesions else None, subset))
    return inventory


def merge(inventories: Iterable[Inventory]) -> Inventory:
    """Join the subsets of a data set; a case in more than one of them is a problem."""
    merged = Inventory()
    same: dict[str, list[Case]] = defaultdict(list)
    for inventory in inventories:
        merged.problems += inventory.problems
        for case in inventory.cases:
            same[case.case_id.casefold()].append(case)
    for cases in same.values():
        if len(cases) == 1:
            merged.cases += cases
        else:
            files = tuple(file for case in cases for file in (case.image, case.mask) if file is not None)
            subsets = " and ".join(case.subset for case in cases)
            reason = f"the identifier occurs more than once, in {subsets}"
            merged.problems.append(Problem(cases[0].case_id, files, reason))
    return merged


def image_files(folder: Path) -> list[Path]:
    """Image files directly in a folder, sorted, without hidden ones (macOS leaves `._` files in archives)."""
    return sorted(
        file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
    )


def find_folder(root: Path, name: str) -> Path | None:
    """The folder of a given name at or below `root` that is not just a wrapper around another of that name.

    Returns:
        The folder, or None if there is none within three levels.

    Raises:
        ConversionError: Several folders qualify.
    """
    found: list[Path] = []
    level, seen = [root], set()
    for _ in range(SEARCH_DEPTH + 1):
        below: list[Path] = []
        for folder in level:
            if (real := folder.resolve()) in seen:
                continue
            seen.add(real)
            children = sorted(child for child in folder.iterdir() if child.is_dir() and child.name[0] != ".")
            if folder.name == name and name not in (child.name for child in children):
                found.append(folder)
            else:
                below += children
        level = below
    if len(found) > 1:
        listed = ", ".join(repr(str(folder)) for folder in found)
        raise ConversionError(f"several folders are named {name}: {listed}. Give --source the one that is meant.")
    return found[0] if found else None


def folder_around(folder: Path, names: Collection[str]) -> Path:
    """The folder itself or, where it has one of the names, the first above it that has none of them."""
    while folder.name in names:
        folder = folder.parent
    return folder


def _name_problem(case_id: str) -> str | None:
    try:
        length = len(f"{case_id}_0000.png".encode())
    except UnicodeEncodeError:
        return "the file name is not valid Unicode"
    if not case_id:
        return "the file name holds no case identifier"
    return f"the file name is too long by {length - MAX_NAME_BYTES} bytes" if length > MAX_NAME_BYTES else None
