"""Masks from photographs, with a trained nnU-Net model.

Writes NAME_mask.png for each photograph, of its own size: 0 and 255, or the
labels' values if the model has several classes. Folders are kept. In MASKS only
results of earlier runs are replaced, and one run works at a time.
Photographs that cannot be read are listed in failed.txt in MASKS; the exit
status is then 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_dermomamba.files import check_writable
from nnunetv2_dermomamba.predict.options import add_model_arguments
from nnunetv2_dermomamba.predict.photos import FAILED_FILE, InputError, find_photos

if TYPE_CHECKING:
    from nnunetv2_dermomamba.predict.predictor import Predictor
    from nnunetv2_dermomamba.predict.stream import Report

__all__ = ["EXAMPLES", "add_arguments", "run"]

EXAMPLES = """examples:
  dermomamba predict -i photos -o masks -m model.zip --overlay --csv
  dermomamba predict -i 'photos/**/*.dcm' -o masks -m model.zip -f 0 -device cpu
  dermomamba predict -i photos -o masks -m model.zip --resume
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dermomamba predict``; those of ``nnUNetv2_predict`` have the same names."""
    parser.add_argument(
        "-i",
        required=True,
        metavar="PHOTOS",
        help="a file, a folder (with those below it), a quoted glob, or a .txt file with a path on each line: JPEG, "
        "PNG, BMP, TIFF, WebP or DICOM dermoscopy",
    )
    parser.add_argument("-o", required=True, type=Path, metavar="MASKS", help="folder for the masks; made if missing")
    add_model_arguments(parser, use="; the folds are averaged", required=True)
    parser.add_argument(
        "-device",
        choices=("cuda", "cpu", "mps"),
        help="where the network runs (default: cuda if there is a GPU, else cpu)",
    )
    parser.add_argument(
        "-step_size",
        type=_step_size,
        default=0.5,
        metavar="SHARE",
        help="step of the sliding window, as a share of the patch",
    )
    parser.add_argument(
        "--disable_tta", action="store_true", help="do not average over flipped images: up to 4 times as fast"
    )
    parser.add_argument(
        "--overlay",
        action="store_true",
        help="write NAME_overlay.jpg, the photograph with the predicted mask's contour in green (several classes, in "
        "their order: green, blue, yellow, magenta, orange)",
    )
    parser.add_argument(
        "--probabilities",
        action="store_true",
        help="write NAME_probability.png with 16 bits, 65535 is 1 (NAME_probability_LABEL.png if there are several)",
    )
    parser.add_argument(
        "--csv",
        action="store_true",
        help="write predictions.csv to MASKS: size, area, bounding box, centroid, parts, mean probability and seconds",
    )
    parser.add_argument("--resume", action="store_true", help="skip photographs whose results are there")


def _step_size(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not above 0 and at most 1")
    return value


def run(args: argparse.Namespace) -> int:
    """Run ``dermomamba predict``.

    Returns:
        Exit status: 0, 1 if some photographs have no mask, 2 if the run could not start or could not go on.
    """
    try:
        photos = find_photos(args.i, args.o)
    except (InputError, OSError) as error:
        return _fail(error)
    try:
        check_writable(args.o)
    except OSError as error:
        return _fail(f"{error}. Nothing was started; give another folder with -o, or make this one writable")

    import torch
    from tqdm import tqdm

    from nnunetv2_dermomamba.predict.model import ModelError
    from nnunetv2_dermomamba.predict.outputs import Outputs
    from nnunetv2_dermomamba.predict.stream import predict_photos

    try:
        predictor = _load(args)
    except (ModelError, RuntimeError) as error:  # the device is not there, or its memory is too small
        return _fail(error)
    settings = {"folds": predictor.model.folds, "mirroring": not args.disable_tta, "step size": args.step_size}
    try:
        with tqdm(total=len(photos), unit="photo", disable=None) as bar:
            report = predict_photos(
                predictor,
                photos,
                Outputs(args.o, args.overlay, args.probabilities),
                table=args.csv,
                resume=args.resume,
                settings=settings,
                progress=bar.update,
            )
    except InputError as error:
        return _fail(error)
    except OSError as error:
        return _fail(f"{error}. What is complete was kept; give the command again with --resume to go on")
    except torch.OutOfMemoryError as error:
        return _fail(f"{error} What is complete was kept; go on with --resume when there is room, or with -device cpu")
    _tell(report, args.o)
    return 1 if report.failed else 0


def _load(args: argparse.Namespace) -> Predictor:
    """Read the model, and print what it is and what it runs on."""
    from nnunetv2_dermomamba.predict.predictor import Predictor

    predictor = Predictor(
        args.model,
        args.device,
        folds=args.f,
        checkpoint=args.chk,
        mirroring=not args.disable_tta,
        step_size=args.step_size,
        trust=args.trust,
    )
    model = predictor.model
    left_out = f" (fold {', '.join(model.left_out)} has none and is left out)" if model.left_out else ""
    folds = ", ".join(model.folds)
    print(f"{model.trainer}, {model.checkpoint} of fold {folds}{left_out}, on {predictor.device}", file=sys.stderr)
    if predictor.scan:
        print(predictor.scan, file=sys.stderr)
    return predictor


def _tell(report: Report, folder: Path) -> None:
    """Print how a run went."""
    skipped = f", {report.skipped} were there already" if report.skipped else ""
    print(f"{report.done} {'mask' if report.done == 1 else 'masks'} written to {str(folder)!r}{skipped}")
    for failure in report.failed:
        print(f"failed: {failure}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    if report.failed:
        plural = "s" * (len(report.failed) > 1)
        print(
            f"{len(report.failed)} photograph{plural} failed, listed in {str(folder / FAILED_FILE)!r}", file=sys.stderr
        )


def _fail(error: object) -> int:
    print(f"dermomamba predict: error: {error}".encode("utf-8", "backslashreplace").decode(), file=sys.stderr)
    return 2
