"""Many photographs through a predictor: reading, the network and writing overlap, and memory does not grow."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from nnunetv2_dermomamba.conversion.errors import ImageReadError
from nnunetv2_dermomamba.files import remove_unfinished, write_file
from nnunetv2_dermomamba.journal import Journal, fingerprint, read_journal
from nnunetv2_dermomamba.png import write_png
from nnunetv2_dermomamba.predict.measurements import measure, write_csv
from nnunetv2_dermomamba.predict.outputs import Outputs
from nnunetv2_dermomamba.predict.overlay import write_overlay
from nnunetv2_dermomamba.predict.photos import CSV_FILE, FAILED_FILE, JOURNAL_FILE, InputError, Photo
from nnunetv2_dermomamba.predict.predictor import Predictor, Prepared
from nnunetv2_dermomamba.predict.reading import read_photo
from nnunetv2_dermomamba.predict.rendering import render

__all__ = ["Report", "predict_photos"]

AHEAD = 2  # photographs read ahead, and results that may wait to be written


@dataclass
class Report:
    """How a run went.

    Attributes:
        done: Photographs with results of this run.
        skipped: Photographs with results of an earlier run.
        failed: Why each of the others has none.
    """

    done: int = 0
    skipped: int = 0
    failed: list[ImageReadError] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    photo: Photo
    fingerprint: list
    prepared: Prepared
    seconds: float


def predict_photos(
    predictor: Predictor,
    photos: list[Photo],
    outputs: Outputs,
    *,
    table: bool = False,
    resume: bool = False,
    settings: dict[str, Any] | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Report:
    """Write the results of photographs.

    Args:
        predictor: The model.
        photos: With distinct names.
        outputs: What to write, and where.
        table: Write ``predictions.csv`` with the figures of all of them in the end.
        resume: Skip photographs whose results are there and were made from the same file.
        settings: Options of the predictor that change results; with the model, they must be those of the run that is
            resumed.
        progress: Called with the number of photographs finished since the last call.

    Returns:
        How it went; ``failed.txt`` in the output folder lists the photographs that have no result.

    Raises:
        InputError: Results would overwrite photographs, or those to resume were made by another model or otherwise.
        OSError: Something cannot be written; what is complete stays, and `resume` goes on from there.
    """
    _check_targets(photos, outputs, predictor)
    settings = {"model": predictor.model.fingerprint, "checkpoint": predictor.model.checkpoint, **(settings or {})}
    outputs.folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    if resume:
        entries = _resumable(outputs.folder / JOURNAL_FILE, settings)
        remove_unfinished({outputs.folder, *(outputs.mask(photo.name).parent for photo in photos)})
    report = Report()
    todo = []
    for photo in photos:
        if _is_done(photo, entries.get(photo.name), outputs, predictor):
            report.skipped += 1
        else:
            todo.append(photo)
            entries.pop(photo.name, None)  # what was made of the file as it was
    progress(report.skipped)
    with closing(Journal(outputs.folder / JOURNAL_FILE, settings, entries)) as journal:
        _stream(predictor, todo, outputs, journal, report, progress)
    if table:
        named = [journal.entries[photo.name] for photo in photos if photo.name in journal.entries]
        write_csv([row for entry in named for row in entry["rows"]], outputs.folder / CSV_FILE)
    failed = outputs.folder / FAILED_FILE
    if report.failed:
        text = "".join(f"{error}\n" for error in report.failed)
        write_file(failed, text.encode("utf-8", "backslashreplace"))
    else:
        failed.unlink(missing_ok=True)
    return report


def _check_targets(photos: list[Photo], outputs: Outputs, predictor: Predictor) -> None:
    sources = {os.path.realpath(photo.path) for photo in photos}
    folder = os.path.realpath(outputs.folder)
    for photo in photos:
        for file in outputs.files(photo.name, predictor.classes):
            target = os.path.join(folder, file.relative_to(outputs.folder))
            if target in sources:
                raise InputError(f"{str(file)!r} would overwrite a photograph; give another folder for the masks")


def _resumable(path: Path, settings: dict) -> dict[str, dict]:
    earlier = read_journal(path)
    if earlier is None:
        return {}
    if earlier[0] != settings:
        differing = ", ".join(key for key in settings if earlier[0].get(key) != settings[key]) or "version"
        raise InputError(
            f"the results in {str(path.parent)!r} were made with another {differing}; leave --resume away to make all "
            "of them again, or give another folder"
        )
    return earlier[1]


def _is_done(photo: Photo, entry: dict | None, outputs: Outputs, predictor: Predictor) -> bool:
    if entry is None:
        return False
    try:
        same = entry["fingerprint"] == fingerprint(photo.path)
    except OSError:
        return False
    return same and all(file.is_file() for file in outputs.files(photo.name, predictor.classes))


def _stream(
    predictor: Predictor,
    photos: list[Photo],
    outputs: Outputs,
    journal: Journal,
    report: Report,
    progress: Callable[[int], None],
) -> None:
    with ThreadPoolExecutor(1, "reader") as reader, ThreadPoolExecutor(1, "writer") as writer:
        reads = _ahead(reader, predictor, photos, outputs)
        writes: deque[Future[None]] = deque()

        def finish_one() -> None:
            try:
                writes.popleft().result()
                report.done += 1
            except ImageReadError as error:
                report.failed.append(error)
            progress(1)

        try:
            for future in reads:
                try:
                    read = future.result()
                except ImageReadError as error:
                    report.failed.append(error)
                    progress(1)
                    continue
                start = time.perf_counter()
                logits = predictor.network(read.prepared)
                seconds = read.seconds + time.perf_counter() - start
                while len(writes) >= AHEAD:
                    finish_one()
                writes.append(writer.submit(_write, predictor, read, logits, seconds, outputs, journal))
            while writes:
                finish_one()
        except BaseException:
            reader.shutdown(wait=False, cancel_futures=True)
            writer.shutdown(wait=False, cancel_futures=True)
            raise


def _ahead(
    reader: ThreadPoolExecutor, predictor: Predictor, photos: list[Photo], outputs: Outputs
) -> Iterator[Future[_Read]]:
    """Each photograph in turn, the next ones being read in the meantime."""
    waiting: deque[Future[_Read]] = deque()
    for photo in photos:
        waiting.append(reader.submit(_read, predictor, photo, outputs))
        if len(waiting) > AHEAD:
            yield waiting.popleft()
    yield from waiting


def _read(predictor: Predictor, photo: Photo, outputs: Outputs) -> _Read:
    start = time.perf_counter()
    if problem := outputs.name_problem(photo.name, predictor.classes):
        raise ImageReadError(photo.path, problem)
    try:
        read_from = fingerprint(photo.path)
    except OSError as error:
        raise ImageReadError(photo.path, error.strerror or str(error)) from error
    prepared = predictor.read(photo.path)
    return _Read(photo, read_from, prepared, time.perf_counter() - start)


def _write(
    predictor: Predictor, read: _Read, logits: torch.Tensor, seconds: float, outputs: Outputs, journal: Journal
) -> None:
    """Write a photograph's results, the mask last, and note it in the journal."""
    start = time.perf_counter()
    name, classes = read.photo.name, predictor.classes
    try:
        prediction = predictor.finish(logits, read.prepared)
    except FloatingPointError as error:
        raise ImageReadError(read.photo.path, str(error)) from error
    rendered = render(prediction)
    mask = outputs.mask(name)
    mask.parent.mkdir(parents=True, exist_ok=True)
    if outputs.overlay:
        # Read again instead of kept, so that no full-size photographs wait in memory. First, since it may fail.
        write_overlay(read_photo(read.photo.path).image, rendered.labels, classes, outputs.overlay_file(name))
    if outputs.probabilities:
        # Rendered again instead of kept, so that maps and the photograph are not in memory together.
        maps = render(prediction, np.uint16).probability
        assert maps is not None
        for pixels, file in zip(maps, outputs.probability_files(name, classes), strict=True):
            write_png(Image.fromarray(pixels), file)
        del maps, pixels
    # A viewer shows 255 as white; several labels are kept as they are.
    write_png(
        Image.fromarray(rendered.labels if len(classes.values) > 1 else (rendered.labels != 0) * np.uint8(255)), mask
    )
    seconds += time.perf_counter() - start
    origin = {
        "photo": str(read.photo.path),
        "mask": mask.relative_to(outputs.folder).as_posix(),
        "seconds": round(seconds, 3),
    }
    rows = [{**origin, **figures} for figures in measure(rendered, classes)]
    journal.add({"name": name, "fingerprint": read.fingerprint, "rows": rows})
