"""PH2 in its official folders.

Format: ``PH2 Dataset images/IMD002/IMD002_Dermoscopic_Image/IMD002.bmp`` beside
``IMD002_lesion/IMD002_lesion.bmp``, 200 cases.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_dermomamba.conversion.cli import DatasetKind, run
from nnunetv2_dermomamba.conversion.dataset import Description
from nnunetv2_dermomamba.conversion.errors import SourceNotFoundError
from nnunetv2_dermomamba.conversion.pairing import Inventory, Problem, find_folder, image_files, pair

__all__ = ["PH2", "find_ph2", "main"]

FOLDER = "PH2 Dataset images"
IMAGE_ENDING = "_Dermoscopic_Image"
MASK_ENDING = "_lesion"

DESCRIPTION = Description(
    name="PH2",
    labels={"background": 0, "lesion": 1},
    description="Skin lesion segmentation in dermoscopy, PH2 database of the Hospital Pedro Hispano",
    reference="https://www.fc.up.pt/addi/ph2%20database.html",
    licence="research and education only; see the database's own terms",
    citation=[
        "Mendonça T, Ferreira PM, Marques JS, Marcal ARS, Rozeira J. PH2 - a dermoscopic image database for research "
        "and benchmarking. EMBC 2013, pp. 5437-5440."
    ],
)


def find_ph2(source: Path) -> Inventory:
    """Find the official folder at, above or below a folder, and pair its files.

    Args:
        source: The folder that holds ``PH2 Dataset images``, or one above it, or one in it.

    Raises:
        SourceNotFoundError: The folder is not there; the message names the archive.
        ConversionError: The folder is there twice.
    """
    source = next((folder for folder in (source, *source.parents) if folder.name == FOLDER), source)
    folder = find_folder(source, FOLDER) if source.is_dir() else None
    if folder is None:
        raise SourceNotFoundError(how_to_get(source))
    cases = sorted(case for case in folder.iterdir() if case.is_dir() and not case.name.startswith("."))
    inventory = pair(
        [(f.stem, f) for case in cases for f in _files(case / f"{case.name}{IMAGE_ENDING}")],
        [(f.stem.removesuffix(MASK_ENDING), f) for case in cases for f in _files(case / f"{case.name}{MASK_ENDING}")],
    )
    known = {case.case_id for case in inventory.cases} | {problem.case_id for problem in inventory.problems}
    inventory.problems += [
        Problem(case.name, (case,), "neither image nor mask in its folder") for case in cases if case.name not in known
    ]
    if not inventory.cases and not inventory.problems:
        raise SourceNotFoundError(how_to_get(source))
    return inventory


def how_to_get(source: Path) -> str:
    """Which archive to fetch, and where to unpack it."""
    absent = "" if source.exists() else ", which does not exist"
    return (
        f"PH2 is not in {str(source)!r}{absent}.\n"
        f"Ask for PH2Dataset.rar at {DESCRIPTION.reference} and unpack it there, so "
        f"that {str(source / 'PH2Dataset' / FOLDER / 'IMD002')!r} exists; or name another folder with --source."
    )


def _files(folder: Path) -> list[Path]:
    return image_files(folder) if folder.is_dir() else []


PH2 = DatasetKind(
    description=DESCRIPTION,
    default_id=119,
    layout="a folder with 'PH2 Dataset images/IMD*/', which is in PH2Dataset.rar",
    find=find_ph2,
)


def main(arguments: Sequence[str] | None = None, default_source: Path = Path("data", "PH2")) -> int:
    """Command line; see ``--help``. Returns the exit code."""
    return run(PH2, arguments, default_source)


if __name__ == "__main__":
    sys.exit(main())
