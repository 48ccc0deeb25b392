"""The command line that the data sets share."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_dermomamba.arguments import positive
from nnunetv2_dermomamba.conversion.dataset import (
    CHANNEL_NAMES,
    SKIPPED_FILE,
    Description,
    Options,
    convert_dataset,
)
from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.pairing import Inventory
from nnunetv2_dermomamba.conversion.paper_split import PAPER_CASES, paper_split, write_paper_split
from nnunetv2_dermomamba.cores import available_cores
from nnunetv2_dermomamba.images.resample import MAX_SIDE

__all__ = ["DatasetKind", "run", "size"]

INTERRUPTED = 130  # 128 + SIGINT, as shells report it
FOLDS = 5  # nnU-Net's


@dataclass(frozen=True)
class DatasetKind:
    """A data set that can be converted.

    Attributes:
        description: For ``dataset.json``; its name names the data set folder.
        default_id: nnU-Net's data set number.
        layout: What the source holds, for ``--help``.
        find: Takes the source folder, returns what is there.
        archives: Official archives, without ".zip"; empty if they cannot be downloaded.
        download_address: Where they are.
        has_paper_split: The paper's hold-out is of this data set.
    """

    description: Description
    default_id: int
    layout: str
    find: Callable[[Path], Inventory]
    archives: tuple[str, ...] = ()
    download_address: str = ""
    has_paper_split: bool = False


def size(text: str) -> tuple[int, int] | None:
    """Parse ``HEIGHTxWIDTH`` or ``native``.

    Returns:
        (height, width) in pixels, or None for native.

    Raises:
        argparse.ArgumentTypeError: Anything else.
    """
    if text == "native":
        return None
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", text, re.ASCII)
    if not match or not all(1 <= int(side) <= MAX_SIDE for side in match.groups()):
        raise argparse.ArgumentTypeError(f"{text!r} is neither HEIGHTxWIDTH, each from 1 to {MAX_SIDE}, nor 'native'")
    return int(match[1]), int(match[2])


def run(kind: DatasetKind, arguments: Sequence[str] | None, default_source: Path) -> int:
    """Convert a data set as the command line says.

    Args:
        kind: The data set.
        arguments: Command line without the program's name, or None for this process's.
        default_source: Where to look without ``--source``.

    Returns:
        The exit code: 0, 1 for an error, 2 for a missing source or a wrong command line, 130 if interrupted.
    """
    options = _parser(kind, default_source).parse_args(arguments)
    try:
        _convert(kind, options)
    except ConversionError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"Error: {error}. What was converted is kept; run again to go on.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. What was converted is kept; run again to go on.", file=sys.stderr)
        return INTERRUPTED
    return 0


def _convert(kind: DatasetKind, options: argparse.Namespace) -> None:
    folder = _dataset_folder(kind, options.dataset_id)
    wants_split = kind.has_paper_split and options.paper_split
    preprocessed = _environment_folder("nnUNet_preprocessed") / folder.name if wants_split else None
    source = Path(os.path.abspath(options.source))
    if kind.archives and options.download:
        from nnunetv2_dermomamba.conversion.download import download_archives

        download_archives(kind.archives, options.download, source)
    inventory = kind.find(source)

    def write_split(training_cases: list[str]) -> None:
        if preprocessed is not None:
            print(f"Split: {write_paper_split(training_cases, preprocessed, options.overwrite)}")
            if len(training_cases) != PAPER_CASES:
                print(f"Note: {len(training_cases)} training cases, not {PAPER_CASES}: not the paper's hold-out.")

    if wants_split:
        paper_split([case.case_id for case in inventory.cases if case.subset == "training"])
    problems = convert_dataset(
        inventory,
        kind.description,
        folder,
        Options(options.size, options.normalization, options.workers, options.overwrite, options.skip_bad),
        write_split,
    )
    print(f"Data set: {folder}")
    if problems:
        print(f"Left out as bad: {len(problems)}, listed in {folder / SKIPPED_FILE}")
    _tell_what_is_next(folder, options.dataset_id)


def _dataset_folder(kind: DatasetKind, number: int) -> Path:
    """Where the data set goes, unless another one has its number."""
    name = f"Dataset{number:03d}_{kind.description.name}"
    folder = _environment_folder("nnUNet_raw") / name
    for other in folder.parent.glob(f"Dataset{number:03d}_*"):
        if other.name != name:
            raise ConversionError(f"number {number} is taken by {str(other)!r}; give another --dataset-id.")
    return folder


def _tell_what_is_next(folder: Path, number: int) -> None:
    training = json.loads((folder / "dataset.json").read_text())["numTraining"]
    if training < FOLDS:
        print(
            f"Note: nnU-Net's {FOLDS} folds need {FOLDS} training cases, and here are {training}: add images, or train "
            f"on all, none held out: nnUNetv2_train {number} 2d all -tr nnUNetTrainerDermoMamba"
        )
    print(
        f"Next: nnUNetv2_plan_and_preprocess -d {number} -c 2d --verify_dataset_integrity\n"
        "(to train on a CPU with smaller batches: -gpu_memory_target 1 -overwrite_plans_name nnUNetPlans_small)"
    )


def _environment_folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise ConversionError(
            f"the environment variable {variable} is not set. Set it to the folder where nnU-Net keeps its data, "
            f"for example: export {variable}=$HOME/{variable}"
        )
    return Path(os.path.abspath(value))


def _parser(kind: DatasetKind, default_source: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=f"Convert {kind.description.name} to a folder such as "
        f"$nnUNet_raw/Dataset{kind.default_id:03d}_{kind.description.name}, in nnU-Net's raw data format. "
        "The data set appears only when it is complete; an interrupted run goes on when the "
        "same command is given again.",
        epilog="Exit codes: 0 done, 1 error, 2 no data found or wrong command line, 130 interrupted. "
        f"Data: {kind.description.reference}. Licence: {kind.description.licence}.",
    )
    parser.add_argument(
        "--source",
        type=Path,
        default=default_source,
        metavar="DIR",
        help=f"the unpacked data: {kind.layout}; a folder above or below is found too (default: %(default)s)",
    )
    parser.add_argument(
        "--dataset-id", type=_dataset_id, default=kind.default_id, metavar="N", help="1 to 999 (default: %(default)s)"
    )
    parser.add_argument(
        "--size",
        type=size,
        default="192x256",
        metavar="HEIGHTxWIDTH",
        help="resample every image to this size, whatever its aspect ratio, or 'native' to keep their own "
        "(default: %(default)s, the paper's)",
    )
    parser.add_argument(
        "--normalization",
        choices=tuple(CHANNEL_NAMES),
        default="zscore",
        help="how nnU-Net shall normalise: per image and channel to mean 0 and deviation 1, or divide by 255 as the "
        "paper does (default: %(default)s)",
    )
    parser.add_argument(
        "--workers", type=positive, default=available_cores(), metavar="N", help="processes (default: %(default)s)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an existing data set, once the new one is whole"
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help=f"leave out files that cannot be read in one right way, and list them in {SKIPPED_FILE} in the data set; "
        "without this they are listed and nothing is written",
    )
    if kind.archives:
        parser.add_argument(
            "--download",
            nargs="?",
            const=kind.download_address,
            metavar="ADDRESS",
            help="first fetch the missing archives, about 13 GB, into the source folder and unpack them; one that is "
            "unpacked is removed, also if you put it there; goes on where a broken download stopped (from %(const)s, "
            "or a mirror's address)",
        )
    if kind.has_paper_split:
        parser.add_argument(
            "--paper-split",
            action="store_true",
            help="write splits_final.json to $nnUNet_preprocessed: fold 0 is the released code's hold-out of 520 of "
            f"{PAPER_CASES} cases, folds 1 to 4 hold out a quarter of the others each",
        )
    return parser


def _dataset_id(text: str) -> int:
    number = positive(text)
    if number > 999:
        raise argparse.ArgumentTypeError(f"{text!r} is not from 1 to 999")
    return number
