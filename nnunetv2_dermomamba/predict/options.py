"""Command-line options that choose a trained model, shared by all sub-commands that read one."""

from __future__ import annotations

import argparse
from pathlib import Path

__all__ = ["FINAL_CHECKPOINT", "add_model_arguments"]

FINAL_CHECKPOINT = "checkpoint_final.pth"


def add_model_arguments(parser: argparse.ArgumentParser, use: str = "", required: bool = False) -> None:
    """Declare ``-m``, ``-f``, ``-chk`` and ``--trust``; those of ``nnUNetv2_predict`` have the same names.

    Args:
        parser: To add them to.
        use: What the model is read for, added to the help of ``-m``.
        required: Whether ``-m`` must be given.
    """
    parser.add_argument(
        "-m",
        "--model",
        required=required,
        type=Path,
        metavar="MODEL",
        help=f"nnU-Net's results folder of a trainer, or the zip that nnUNetv2_export_model_to_zip wrote{use}",
    )
    parser.add_argument("-f", nargs="+", metavar="FOLD", help="folds of the model (default: all that are there)")
    parser.add_argument("-chk", default=FINAL_CHECKPOINT, metavar="FILE", help="checkpoint of each fold")
    parser.add_argument(
        "--trust",
        action="store_true",
        help="load a model that could run any code on this machine: only if you know who made it",
    )
