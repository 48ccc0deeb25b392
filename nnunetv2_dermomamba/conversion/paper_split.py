"""The released code's hold-out as nnU-Net's folds.

Fold 0 validates on the hold-out of the released code, scikit-learn's ``train_test_split(sorted ids, test_size=520,
random_state=257)``. Folds 1 to 4 are ours: they validate on the other cases in four equal, shuffled parts, so that the
five folds together validate every case once, as ``nnUNetv2_find_best_configuration`` expects. With other than the 2 594
training cases of ISIC 2018 the same rule is applied, but it does not give the paper's hold-out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.files import write_file

__all__ = ["PAPER_CASES", "paper_split", "write_paper_split"]

PAPER_CASES = 2594
HOLD_OUT = 520
SEED = 257
OTHER_FOLDS = 4


def paper_split(case_ids: Sequence[str]) -> list[dict[str, list[str]]]:
    """Five folds, each with sorted "train" and "val" case identifiers.

    Raises:
        ConversionError: Fewer than 524 cases, so that a fold would have nothing to validate on.
    """
    from sklearn.model_selection import KFold, train_test_split  # takes a second, and few conversions need it

    ids = sorted(case_ids)
    if len(ids) < HOLD_OUT + OTHER_FOLDS:
        raise ConversionError(
            f"the paper's split holds {HOLD_OUT} cases out of {PAPER_CASES}; it needs at least "
            f"{HOLD_OUT + OTHER_FOLDS}, and here are {len(ids)}. Leave --paper-split away for nnU-Net's own folds."
        )
    others, hold_out = train_test_split(ids, test_size=HOLD_OUT, random_state=SEED)
    others = sorted(others)
    parts = KFold(OTHER_FOLDS, shuffle=True, random_state=SEED).split(others)
    validation = [set(hold_out), *({others[i] for i in part} for _, part in parts)]
    return [{"train": [i for i in ids if i not in val], "val": sorted(val)} for val in validation]


def write_paper_split(case_ids: Sequence[str], folder: Path, overwrite: bool = False) -> Path:
    """Write ``splits_final.json`` where nnU-Net reads it.

    Args:
        case_ids: Training case identifiers.
        folder: ``$nnUNet_preprocessed/DatasetXXX_Name``; made if missing.
        overwrite: Replace a different split.

    Returns:
        The file.

    Raises:
        ConversionError: Too few cases, or a different split is there.
    """
    file = folder / "splits_final.json"
    split = paper_split(case_ids)
    if file.exists() and not overwrite and not _holds(file, split):
        raise ConversionError(f"{str(file)!r} holds another split. Remove it, or give --overwrite to replace it.")
    folder.mkdir(parents=True, exist_ok=True)
    write_file(file, (json.dumps(split, indent=2) + "\n").encode())
    return file


def _holds(file: Path, split: list[dict[str, list[str]]]) -> bool:
    try:
        return json.loads(file.read_text()) == split
    except ValueError:  # it is damaged
        return False
