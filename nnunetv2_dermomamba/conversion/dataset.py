"""An nnU-Net raw data set, written so that it appears only when it is complete.

Everything is built in a hidden sibling, ``.<name>.partial``, with a journal of the finished cases; a killed conversion
goes on from there. The complete data set is renamed into place; an old one is moved aside to ``.<name>.replaced`` for
the moment between two renames, and put back by the next run if a kill falls into that moment. One conversion at a time
does so: it locks ``.<name>.lock``, an empty file that stays.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nnunetv2_dermomamba.conversion.case import convert_case, output_files
from nnunetv2_dermomamba.conversion.errors import ConversionError
from nnunetv2_dermomamba.conversion.pairing import Case, Inventory, Problem
from nnunetv2_dermomamba.cores import available_cores
from nnunetv2_dermomamba.folder_lock import locked
from nnunetv2_dermomamba.journal import Journal, fingerprint, read_journal

__all__ = ["CHANNEL_NAMES", "CONVERSION_KEY", "SKIPPED_FILE", "Description", "Options", "convert_dataset"]

# nnU-Net derives the normalisation from the channel names: these mean z-score per image, and division by 255.
CHANNEL_NAMES = {"zscore": ("R", "G", "B"), "rgb_to_0_1": ("rgb_to_0_1",) * 3}
CONVERSION_KEY = "dermomamba_conversion"  # in dataset.json, which nnU-Net copies into every trained model's folder
CASES_FILE = "conversion.json"
SKIPPED_FILE = "skipped_cases.txt"
STRETCH = 1.05  # a change of width over height up to this is not worth a line; 4:3 from 3:2 is 1.125
JOURNAL_FORMAT = 2  # a journal of another format, or with another shape, is not resumed


@dataclass(frozen=True)
class Description:
    """What ``dataset.json`` says of a data set."""

    name: str
    labels: dict[str, int]
    description: str
    reference: str
    licence: str
    citation: list[str]


@dataclass(frozen=True)
class Options:
    """How to convert.

    Attributes:
        shape: (height, width) in pixels, or None to keep each image's size.
        normalization: A key of `CHANNEL_NAMES`.
        workers: Processes; 1 works in this one.
        overwrite: Replace an existing data set, at the very end.
        skip_bad: Leave bad cases out and list them in ``skipped_cases.txt`` instead of failing.
    """

    shape: tuple[int, int] | None = (192, 256)
    normalization: str = "zscore"
    workers: int = field(default_factory=available_cores)
    overwrite: bool = False
    skip_bad: bool = False


def convert_dataset(
    inventory: Inventory,
    description: Description,
    folder: Path,
    options: Options,
    before_publishing: Callable[[list[str]], None] = lambda training_cases: None,
) -> list[Problem]:
    """Convert the cases of an inventory into an nnU-Net raw data set.

    Args:
        inventory: Cases, and the problems already known of.
        description: For ``dataset.json``.
        folder: The data set folder, ``$nnUNet_raw/DatasetXXX_Name``.
        options: How to convert.
        before_publishing: Called with the sorted training case identifiers when all is written, before the data set
            appears; what it raises keeps the data set from appearing.

    Returns:
        The problems of the cases left out; empty unless `Options.skip_bad` is set.

    Raises:
        ConversionError: The data set exists, another conversion is at work, a case is bad, or no training case is left.
        OSError: Something cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f".{folder.name}.lock")
    lock.touch()  # it stays: were it removed, two conversions could hold the locks of two files of this name
    with locked(lock, ConversionError(f"another conversion to {str(folder)!r} is at work; wait, or stop it")):
        _put_back(folder)
        _refuse_to_remove(inventory, folder)
        if os.path.lexists(folder) and not options.overwrite:
            raise ConversionError(f"{str(folder)!r} exists. Give --overwrite to replace it, or another --dataset-id.")
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(exist_ok=True)
        records, problems = _convert_cases(inventory, partial, options)
        problems = sorted(inventory.problems + problems, key=lambda problem: problem.case_id)
        if problems and not options.skip_bad:
            listed = "\n".join(f"  {problem}" for problem in problems)
            raise ConversionError(
                f"{len(problems)} bad case{'s' * (len(problems) > 1)}:\n{listed}\n"
                "Mend or remove what is bad, or give --skip-bad to go on without it. "
                f"No data set was written; the cases already converted wait in {str(partial)!r} for the next run."
            )
        _describe(partial / "dataset", records, problems, description, options)
        _remove_strays(partial / "dataset", {file for record in records for file in record["files"]})
        _say_what_was_stretched(records)
        before_publishing(sorted(record["case"] for record in records if record["subset"] == "training"))
        _publish(partial, folder)
    return problems


def _refuse_to_remove(inventory: Inventory, folder: Path) -> None:
    """A source in the data set's own folder would go with what is replaced."""
    inside = os.path.realpath(folder)
    for case in inventory.cases:
        for file in filter(None, (case.image, case.mask)):
            if Path(os.path.realpath(file)).is_relative_to(inside):
                raise ConversionError(
                    f"{str(file)!r} lies in {str(folder)!r}, the folder of the converted data set; move the source "
                    "elsewhere"
                )


def _put_back(folder: Path) -> None:
    """Mend what a kill between the two renames of `_publish`, or right behind them, left."""
    replaced = _replaced(folder)
    if replaced.exists() and not os.path.lexists(folder):
        replaced.rename(folder)
    _drop(replaced)


def _publish(partial: Path, folder: Path) -> None:
    """Give the complete data set its name, and remove what it replaces."""
    if hasattr(os, "sync"):
        os.sync()  # so that after a power cut, too, what has its final name is whole
    replaced = _replaced(folder)
    if os.path.lexists(folder):
        folder.rename(replaced)
    (partial / "dataset").rename(folder)
    shutil.rmtree(partial)
    _drop(replaced)


def _replaced(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.replaced")


def _drop(replaced: Path) -> None:
    """Remove it under another name, so that no half of it is put back."""
    removing = replaced.with_suffix(".removing")
    _remove(removing)
    if os.path.lexists(replaced):
        replaced.rename(removing)
        _remove(removing)


def _convert_cases(inventory: Inventory, partial: Path, options: Options) -> tuple[list[dict], list[Problem]]:
    settings = {"format": JOURNAL_FORMAT, "shape": options.shape and list(options.shape)}
    staging, file = partial / "dataset", partial / "journal.jsonl"
    earlier = read_journal(file)
    if earlier is not None and earlier[0] == settings:
        done = earlier[1]
    else:
        done = {}
        _remove(staging)
    for case in inventory.cases:
        for path in output_files(case):
            (staging / path).parent.mkdir(parents=True, exist_ok=True)

    records, problems, todo = [], [], []
    for case in inventory.cases:
        entry = done.get(case.case_id)
        whole = all((staging / path).exists() for path in output_files(case))
        if whole and entry is not None and entry["inputs"] == _fingerprints(case):
            records.append(entry["record"])
        else:
            todo.append(case)
    with (
        contextlib.closing(Journal(file, settings, done)) as journal,
        tqdm(total=len(inventory.cases), initial=len(records), unit="case") as bar,
    ):
        for case, result in _run(todo, staging, options):
            if isinstance(result, Problem):
                problems.append(result)
            else:
                records.append(result)
                journal.add({"name": case.case_id, "inputs": _fingerprints(case), "record": result})
            bar.update()
    return records, problems


def _run(cases: list[Case], staging: Path, options: Options) -> Iterator[tuple[Case, dict | Problem]]:
    if options.workers == 1 or len(cases) < 2:
        for case in cases:
            yield case, convert_case(case, staging, options.shape)
        return
    # Spawned, because a fork of a process with threads (tqdm's, a caller's) may deadlock.
    context = multiprocessing.get_context("spawn")
    workers = min(options.workers, len(cases))
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_initialise_worker) as pool:
        try:
            futures: dict[Future, Case] = {
                pool.submit(convert_case, case, staging, options.shape): case for case in cases
            }
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BrokenProcessPool:
            raise ConversionError(
                "a worker process died, perhaps for lack of memory. Run again with fewer --workers to go on."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _initialise_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _describe(
    staging: Path, records: list[dict], problems: list[Problem], description: Description, options: Options
) -> None:
    """Write ``dataset.json``, and what became of which case."""
    training = [record for record in records if record["subset"] == "training"]
    if not training:
        raise ConversionError("no training case is left")
    rule: dict[str, Any] = {
        "size": "native" if options.shape is None else list(options.shape),
        "normalization": options.normalization,
        "image_filter": "lanczos",
        "mask_rule": "most covered pixels, share of the frame kept",
    }
    _write_json(
        staging / "dataset.json",
        {
            "channel_names": {str(i): name for i, name in enumerate(CHANNEL_NAMES[options.normalization])},
            "labels": description.labels,
            "numTraining": len(training),
            "file_ending": ".png",
            "overwrite_image_reader_writer": "NaturalImage2DIO",
            "name": description.name,
            "description": description.description,
            "reference": description.reference,
            "licence": description.licence,
            "citation": description.citation,
            CONVERSION_KEY: rule,
        },
    )
    _write_json(staging / CASES_FILE, {**rule, "cases": sorted(records, key=lambda record: record["case"])})
    (staging / SKIPPED_FILE).unlink(missing_ok=True)
    if problems:
        text = "".join(f"{problem}\n" for problem in problems)
        (staging / SKIPPED_FILE).write_text(text, encoding="utf-8", errors="backslashreplace")


def _remove_strays(staging: Path, kept: set[str]) -> None:
    """Remove what an earlier, interrupted run with other cases left."""
    for sub_folder in staging.iterdir():
        if sub_folder.is_dir():
            for file in sub_folder.iterdir():
                if f"{sub_folder.name}/{file.name}" not in kept:
                    file.unlink()
            with contextlib.suppress(OSError):
                sub_folder.rmdir()


def _say_what_was_stretched(records: list[dict]) -> None:
    changes = [
        (record["shape"][1] / record["shape"][0]) / (record["original_shape"][1] / record["original_shape"][0])
        for record in records
    ]
    stretched = sum(max(change, 1 / change) > STRETCH for change in changes)
    if stretched:
        print(
            f"{stretched} of {len(records)} images had their aspect ratio changed by more than {STRETCH - 1:.0%} to "
            "fit the common size, and their masks alike. `dermomamba predict` does the same to photographs and resizes "
            "its masks back to them."
        )


def _fingerprints(case: Case) -> list[list]:
    return [fingerprint(file) for file in (case.image, case.mask) if file is not None]


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
