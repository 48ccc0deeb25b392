"""ISIC 2018 Task 1 in its official folders.

Format: ``ISIC2018_Task1-2_Training_Input/ISIC_0000000.jpg`` with
``ISIC2018_Task1_Training_GroundTruth/ISIC_0000000_segmentation.png``, 2 594 pairs; the same for Validation (100) and
Test (1 000), which become nnU-Net's test set where they are present. A source with plain ``images/`` and ``masks/``
folders is read too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_dermomamba.conversion.cli import DatasetKind, run
from nnunetv2_dermomamba.conversion.dataset import Description
from nnunetv2_dermomamba.conversion.errors import SourceNotFoundError
from nnunetv2_dermomamba.conversion.pairing import Inventory, find_folder, folder_around, image_files, merge, pair

__all__ = ["ARCHIVES", "ISIC2018", "find_isic2018", "main"]

SUBSETS = {
    subset.lower(): (f"ISIC2018_Task1-2_{subset}_Input", f"ISIC2018_Task1_{subset}_GroundTruth")
    for subset in ("Training", "Validation", "Test")
}
ARCHIVES = tuple(folder for folders in SUBSETS.values() for folder in folders)
DOWNLOAD_ADDRESS = "https://isic-archive.s3.amazonaws.com/challenges/2018/"
PLAIN_FOLDERS = ("images", "masks")
MASK_ENDING = "_segmentation"
SUPERPIXELS_ENDING = "_superpixels"  # lie beside the images in some releases

DESCRIPTION = Description(
    name="ISIC2018",
    labels={"background": 0, "lesion": 1},
    description="Skin lesion segmentation in dermoscopy, ISIC 2018 challenge, Task 1: lesion boundary segmentation",
    reference="https://challenge.isic-archive.com/data/#2018",
    licence="CC-0 (the statement of the ISIC archive decides)",
    citation=[
        "Codella N, Rotemberg V, Tschandl P, et al. Skin lesion analysis toward melanoma detection 2018: a challenge "
        "hosted by the International Skin Imaging Collaboration (ISIC). arXiv:1902.03368, 2019.",
        "Tschandl P, Rosendahl C, Kittler H. The HAM10000 dataset, a large collection of multi-source dermatoscopic "
        "images of common pigmented skin lesions. Scientific Data 5:180161, 2018.",
    ],
)


def find_isic2018(source: Path) -> Inventory:
    """Find the official folders at, above or below a folder, and pair their files.

    Args:
        source: The folder that holds the official ones, or one above it, or one of the official ones.

    Raises:
        SourceNotFoundError: The training images or masks are not there; the message names the archives.
        ConversionError: A folder is there twice.
    """
    source = folder_around(source, ARCHIVES)
    if not source.is_dir():
        raise SourceNotFoundError(how_to_get(source))
    folders = {subset: tuple(find_folder(source, name) for name in names) for subset, names in SUBSETS.items()}
    if folders["training"] == (None, None):
        folders = {"training": tuple(find_folder(source, name) for name in PLAIN_FOLDERS)}
    if None in folders["training"]:
        raise SourceNotFoundError(how_to_get(source))

    inventories = []
    for subset, (images, masks) in folders.items():
        if images is not None:
            photographs = [(f.stem, f) for f in image_files(images) if not f.stem.endswith(SUPERPIXELS_ENDING)]
            lesions = None if masks is None else [(f.stem.removesuffix(MASK_ENDING), f) for f in image_files(masks)]
            inventories.append(pair(photographs, lesions, subset))
    inventory = merge(inventories)
    if not inventory.cases and not inventory.problems:
        raise SourceNotFoundError(how_to_get(source))
    return inventory


def how_to_get(source: Path) -> str:
    """Which archives to fetch, and where to unpack them."""
    archives = "\n".join(f"  {name}.zip{'' if '_Training_' in name else '  (optional)'}" for name in ARCHIVES)
    absent = "" if source.exists() else ", which does not exist"
    return (
        f"ISIC 2018 Task 1 is not in {str(source)!r}{absent}.\n"
        f"Fetch these archives from {DESCRIPTION.reference}\n{archives}\n"
        f"and unpack them there, so that {str(source / ARCHIVES[0] / 'ISIC_0000000.jpg')!r} exists; "
        "or let dataset_conversion/isic2018.py --download do it; or name another folder with --source."
    )


ISIC2018 = DatasetKind(
    description=DESCRIPTION,
    default_id=118,
    layout="a folder with ISIC2018_Task1-2_Training_Input/ISIC_*.jpg and "
    "ISIC2018_Task1_Training_GroundTruth/ISIC_*_segmentation.png (Validation and Test likewise, optional), or with "
    "plain images/ and masks/",
    find=find_isic2018,
    archives=ARCHIVES,
    download_address=DOWNLOAD_ADDRESS,
    has_paper_split=True,
)


def main(arguments: Sequence[str] | None = None, default_source: Path = Path("data", "ISIC2018")) -> int:
    """Command line; see ``--help``. Returns the exit code."""
    return run(ISIC2018, arguments, default_source)


if __name__ == "__main__":
    sys.exit(main())
