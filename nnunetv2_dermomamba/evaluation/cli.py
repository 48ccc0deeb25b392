"""Score a folder of masks against the truth: a table, CSV, JSON, HTML report.

Masks are PNG, BMP, TIFF or NIfTI with 0 and 1, or 0 and 255 (several classes:
--labels). Lesions in another grey or one colour on black, in alpha or with soft
contours are read as the conversion reads them; EXIF orientation is undone.
Folders are searched with their sub-folders. A case's name is its path without
extension and without _mask, _segmentation, _lesion, _prediction and the like,
so ISIC_0000000_mask.png is scored against ISIC_0000000_segmentation.png. What
`dermomamba predict` writes beside the masks is passed over; other files that
are no masks are listed.

Figures, in the order of the paper's table: parameters and operations (as
`dermomamba info` counts them, with --model), DSC, IoU, precision, recall:
  mean of images        each image counts once; 95 % interval by bootstrap over
                        images, of which it needs 10
  pooled over pixels    one figure from the pixel counts of all images (VM-UNet
                        and its kin); large images weigh more
  as the authors' code  with --probabilities: soft Dice, IoU of the mask,
                        precision and recall at a logit of 0.5

Defined as follows:
  both masks empty      DSC, IoU, precision, recall, distances, boundary F1
                        undefined: left out of the mean and counted (as
                        nnUNetv2_evaluate_folder); thresholded Jaccard 1 (as
                        the ISIC challenge's scorer)
  soft DSC              undefined, too, if the ground truth is empty and no
                        probability is above one half
  one mask empty        DSC, IoU, precision, recall, boundary F1 are 0,
                        distances the image's diagonal
  thresholded Jaccard   IoU, but 0 below 0.65 (ISIC 2018)
  HD95, ASSD            in pixels of the ground truth, between contours
  boundary F1           contours within 0.75 % of the image's diagonal of each
                        other agree (--boundary-tolerance)
  no prediction         listed, not in the figures, exit status 1 (--missing)
  no ground truth       listed, not scored
  sizes differ          listed, not in the figures, exit status 1 (--resize)
  unreadable            listed, not in the figures, exit status 1
  no or bad map         listed, not in the figures of --probabilities, exit
                        status 1

Exit status: 0 if every case was scored, 1 if some were not, 2 if nothing was.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nnunetv2_dermomamba.arguments import positive
from nnunetv2_dermomamba.cores import available_cores
from nnunetv2_dermomamba.files import check_writable
from nnunetv2_dermomamba.predict.options import add_model_arguments
from nnunetv2_dermomamba.predict.sized_network import trained_model

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["EXAMPLES", "add_arguments", "run"]

MOST_PROCESSES = 8  # unless more are asked for

EXAMPLES = """examples:
  dermomamba evaluate -p masks -g truth
  dermomamba evaluate -p masks -g truth --images photos --report report.html
  dermomamba evaluate -p masks -g truth --probabilities masks --against other
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``dermomamba evaluate``."""
    parser.add_argument("-p", "--predictions", type=Path, required=True, metavar="FOLDER", help="predicted masks")
    parser.add_argument("-g", "--ground-truth", type=Path, required=True, metavar="FOLDER", help="true masks")
    parser.add_argument(
        "-l", "--labels", type=int, nargs="+", metavar="N", help="foreground classes (default: one, binary masks)"
    )
    parser.add_argument(
        "--probabilities",
        type=Path,
        metavar="FOLDER",
        help="probability maps, 16-bit PNG or nnU-Net's .npz: adds the soft Dice",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="photographs for the report's gallery")
    parser.add_argument(
        "--against",
        type=Path,
        metavar="OTHER",
        help="another method's masks, or the --csv of its evaluation: adds paired Wilcoxon p-values",
    )
    add_model_arguments(parser, use=": adds its parameters and operations to the table")
    parser.add_argument(
        "--missing",
        choices=("fail", "empty", "skip"),
        default="fail",
        help="a ground truth without prediction: leave out and exit with 1 (fail), score as an empty mask (empty), "
        "or leave out (skip); listed in any case",
    )
    parser.add_argument("--resize", action="store_true", help="bring predictions of another size to the ground truth's")
    parser.add_argument(
        "--boundary-tolerance",
        type=float,
        default=0.75,
        metavar="PERCENT",
        help="distance within which contours agree, of the diagonal",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row for each case and class")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write an HTML page with a gallery of all cases")
    parser.add_argument("-np", type=positive, metavar="N", help=f"processes (default: cores, at most {MOST_PROCESSES})")


def run(args: argparse.Namespace) -> int:
    """Run ``dermomamba evaluate``; returns the exit status."""
    from concurrent.futures.process import BrokenProcessPool

    args.np = args.np or min(MOST_PROCESSES, available_cores())
    try:
        return _run(args)
    except BrokenProcessPool:
        return _error(f"a worker process was killed, most likely for memory; use fewer than -np {args.np}")
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _error(str(error))


def _error(message: str) -> int:
    print(f"dermomamba evaluate: error: {message}", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    from nnunetv2_dermomamba.evaluation import output
    from nnunetv2_dermomamba.evaluation.compare import check_comparable
    from nnunetv2_dermomamba.evaluation.evaluate import MISSING, Settings, evaluate
    from nnunetv2_dermomamba.evaluation.report import thumbnail_pixels, write_report

    settings = Settings(
        labels=tuple(sorted(set(args.labels))) if args.labels else None,
        missing_as_empty=args.missing == "empty",
        resize=args.resize,
        tolerance=args.boundary_tolerance / 100,
    )
    targets = [file for file in (args.csv, args.json, args.report) if file]
    for target in targets:
        _check_target(target)
    _check_distinct([args.against, *targets] if args.against else targets)
    other = None
    if args.against and args.against.suffix.lower() == ".csv":
        other = output.read_csv(args.against)
    cost = None
    if args.model:
        from nnunetv2_dermomamba.cost import count_cost

        model = trained_model(args.model, args.f, args.chk, args.trust)
        cost = count_cost(model.network, model.channels, model.patch_size)
    shared = {"settings": settings, "processes": args.np, "progress": True}
    if args.against and other is None:
        other = evaluate(args.against, args.ground_truth, **shared).frame

    def check_other(cases: set[str]) -> None:
        if other is not None:
            for label in settings.classes:
                check_comparable(other, label, cases, str(args.against))

    evaluation = evaluate(
        args.predictions,
        args.ground_truth,
        probabilities=args.probabilities,
        images=args.images,
        thumbnail=thumbnail_pixels if args.report else None,
        before_scoring=check_other,
        **shared,
    )
    if other is not None:
        evaluation.against(other, str(args.against))
    if args.csv:
        output.write_csv(evaluation, args.csv)
    if args.json:
        output.write_json(evaluation, args.json, cost)
    if args.report:
        write_report(evaluation, args.report, args.predictions, args.ground_truth, cost)
    print(output.format_table(evaluation, cost))  # last: its reader may have enough of it
    if args.report:
        print(f"Report: {args.report}")
    return int(_is_incomplete(evaluation.frame, tolerated=MISSING if args.missing != "fail" else None))


def _check_target(file: Path) -> None:
    """Before anything is scored, whose figures would be lost.

    Raises:
        OSError: The file cannot be written.
    """
    if file.is_dir():
        raise IsADirectoryError(f"{str(file)!r} is a folder; nothing was scored, name a file")
    try:
        check_writable(file.parent)
    except OSError as error:
        raise OSError(f"{error}. Nothing was scored; name a file elsewhere, or make this folder writable") from error


def _check_distinct(files: list[Path]) -> None:
    """Before one is written over another.

    Raises:
        ValueError: Two are the same.
    """
    seen: set[str] = set()
    for file in files:
        if (place := os.path.realpath(file)) in seen:
            raise ValueError(f"{str(file)!r} is named twice and would be overwritten; nothing was scored, name another")
        seen.add(place)


def _is_incomplete(frame: pd.DataFrame, tolerated: str | None) -> bool:
    """Whether a case was not scored (but for the status ``tolerated``) or not from all that was asked for."""
    from nnunetv2_dermomamba.evaluation.evaluate import SCORED

    scored = frame["status"] == SCORED
    return bool((~scored & (frame["status"] != tolerated)).any() or (frame.loc[scored, "message"] != "").any())
