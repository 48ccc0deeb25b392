"""Results of earlier runs in an output folder, as its journal tells.

The journal lists a photograph's files right before they are written, so that no run replaces or removes a file that is
not a run's own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nnunetv2_dermomamba.journal import fingerprint, read_journal
from nnunetv2_dermomamba.predict.measurements import COLUMNS
from nnunetv2_dermomamba.predict.outputs import Outputs
from nnunetv2_dermomamba.predict.photos import CSV_FILE, FAILED_FILE, JOURNAL_FILE, InputError, Photo
from nnunetv2_dermomamba.predict.rendering import Classes

__all__ = ["earlier_entries", "remove_results", "result_files", "take_up"]

# How what a run writes beside the masks begins: the table with its heading, the list with a path in quotes.
BEGINNINGS = {CSV_FILE: (",".join(COLUMNS).encode(),), FAILED_FILE: (b"'", b'"')}

Entries = dict[str, dict[str, Any]]
"""Of the journal, by the name of the photograph: its ``files``; and once they are complete, what they were made of."""


def earlier_entries(folder: Path, settings: dict, resume: bool) -> Entries:
    """Entries of the journal in an output folder; unless they are resumed, only which files there are results.

    Raises:
        InputError: The results to resume were made otherwise, or what the run writes beside them is not a run's own.
    """
    earlier = read_journal(folder / JOURNAL_FILE)
    _refuse_to_replace(
        folder / name for name in BEGINNINGS if earlier is None or not _begins_as_a_runs_own(folder / name)
    )
    if earlier is None:
        return {}
    if not resume:
        return {name: {"name": name, "files": entry.get("files", [])} for name, entry in earlier[1].items()}
    if earlier[0] != settings:
        differing = ", ".join(key for key in settings if earlier[0].get(key) != settings[key]) or "version"
        raise InputError(
            f"the results in {str(folder)!r} were made with another {differing}; leave --resume away to make all "
            "of them again, or give another folder"
        )
    return earlier[1]


def take_up(photos: list[Photo], entries: Entries, outputs: Outputs, classes: Classes) -> list[Photo]:
    """The photographs without results of the same file.

    Raises:
        InputError: Results would overwrite photographs, or files that are no results of earlier runs.
    """
    sources = {os.path.realpath(photo.path) for photo in photos}
    todo = []
    for photo in photos:
        entry = entries.get(photo.name, {})
        if not _is_done(photo, entry, outputs, classes):
            _check(photo.name, entry, outputs, classes, sources)
            todo.append(photo)
    return todo


def result_files(name: str, entry: dict[str, Any], outputs: Outputs) -> list[Path]:
    """What runs wrote of a photograph, by its entry."""
    mask = outputs.mask(name)
    return [mask.with_name(file) for file in entry.get("files", [])]


def remove_results(name: str, entry: dict[str, Any], outputs: Outputs) -> None:
    """Remove what an earlier run wrote of a photograph, which may not be what this one will write.

    Raises:
        OSError: Something cannot be removed.
    """
    for file in result_files(name, entry, outputs):
        if os.path.lexists(file):
            file.unlink()


def _is_done(photo: Photo, entry: dict[str, Any], outputs: Outputs, classes: Classes) -> bool:
    if "fingerprint" not in entry:
        return False
    try:
        same = entry["fingerprint"] == fingerprint(photo.path)
    except OSError:
        return False
    files = outputs.files(photo.name, classes)
    return same and {*files} <= {*result_files(photo.name, entry, outputs)} and all(file.is_file() for file in files)


def _check(name: str, entry: dict[str, Any], outputs: Outputs, classes: Classes, sources: set[str]) -> None:
    """Refuse a photograph whose results, these or earlier ones, are photographs or nobody's results."""
    earlier = result_files(name, entry, outputs)
    files = {*earlier, *outputs.files(name, classes)}
    folder = os.path.realpath(outputs.mask(name).parent)
    for file in sorted(files):
        if os.path.join(folder, file.name) in sources:
            raise InputError(f"{str(file)!r} would overwrite a photograph; give another folder for the masks")
    _refuse_to_replace(files.difference(earlier))


def _begins_as_a_runs_own(file: Path) -> bool:
    return file.is_file() and file.read_bytes().startswith(BEGINNINGS[file.name])


def _refuse_to_replace(files: Iterable[Path]) -> None:
    for file in sorted(files):
        if os.path.lexists(file):
            raise InputError(
                f"{str(file)!r} exists and is no result of an earlier run into that folder; give another folder for "
                "the masks, or move the file away"
            )
