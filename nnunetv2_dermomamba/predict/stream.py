"""Many photographs through a predictor: reading, the network and writing overlap, and memory does not grow."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from PIL import Image

from nnunetv2_dermomamba.files import remove_unfinished, write_file
from nnunetv2_dermomamba.folder_lock import locked
from nnunetv2_dermomamba.images.errors import ImageReadError
from nnunetv2_dermomamba.images.png import write_png
from nnunetv2_dermomamba.journal import Journal, fingerprint
from nnunetv2_dermomamba.predict.earlier import earlier_entries, remove_results, result_files, take_up
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


class _NotThereError(ImageReadError):
    """A photograph is away, maybe for now, which says nothing against its earlier results."""


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
        InputError: Results would overwrite photographs or other files that are no results, those to resume were made
            by another model or otherwise, or another run is at work in the output folder.
        OSError: Something cannot be written; what is complete stays, and `resume` goes on from there.
    """
    settings = {"model": predictor.model.fingerprint, "checkpoint": predictor.model.checkpoint, **(settings or {})}
    folder = outputs.folder
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, InputError(f"another prediction is at work in {str(folder)!r}; wait, or give another folder")):
        entries = earlier_entries(folder, settings, resume)
        todo = take_up(photos, entries, outputs, predictor.classes)
        if resume:
            # Of this folder's runs only: another one may be at work in a folder below it, or above.
            beside = [folder / name for name in (CSV_FILE, FAILED_FILE, JOURNAL_FILE)]
            remove_unfinished([*beside, *(file for item in entries.items() for file in result_files(*item, outputs))])
        report = Report(skipped=len(photos) - len(todo))
        progress(report.skipped)
        with closing(Journal(folder / JOURNAL_FILE, settings, entries)) as journal:
            _stream(predictor, todo, outputs, journal, report, progress)
        if table or (folder / CSV_FILE).exists():  # one of an earlier run's would say what is no longer so
            named = [journal.entries.get(photo.name, {}) for photo in photos]
            write_csv([row for entry in named for row in entry.get("rows", [])], folder / CSV_FILE)
        _list_failed(report, folder / FAILED_FILE)
    return report


def _list_failed(report: Report, file: Path) -> None:
    if report.failed:
        text = "".join(f"{error}\n" for error in report.failed)
        write_file(file, text.encode("utf-8", "backslashreplace"))
    else:
        file.unlink(missing_ok=True)


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

        def submit(*call: Any) -> None:
            while len(writes) >= AHEAD:
                finish_one()
            writes.append(writer.submit(*call))

        try:
            for photo, future in zip(photos, reads, strict=True):
                try:
                    read = future.result()
                except ImageReadError as error:
                    submit(_fail, error, photo, outputs, journal)
                    continue
                start = time.perf_counter()
                logits = predictor.network(read.prepared)
                seconds = read.seconds + time.perf_counter() - start
                submit(_write, predictor, read, logits, seconds, outputs, journal)
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
        raise _NotThereError(photo.path, error.strerror or str(error)) from error
    prepared = predictor.read(photo.path)
    return _Read(photo, read_from, prepared, time.perf_counter() - start)


def _fail(error: ImageReadError, photo: Photo, outputs: Outputs, journal: Journal) -> NoReturn:
    """Raise the error; what an earlier run made of the photograph may not pass for results of what it is now."""
    if not isinstance(error, _NotThereError):
        remove_results(photo.name, journal.entries.get(photo.name, {}), outputs)
        journal.add({"name": photo.name, "files": []})
    raise error


def _write(
    predictor: Predictor, read: _Read, logits: torch.Tensor, seconds: float, outputs: Outputs, journal: Journal
) -> None:
    """Write a photograph's results, the mask last, and note it in the journal."""
    start = time.perf_counter()
    name, classes = read.photo.name, predictor.classes
    try:
        prediction = predictor.finish(logits, read.prepared)
    except FloatingPointError as error:
        _fail(ImageReadError(read.photo.path, str(error)), read.photo, outputs, journal)
    earlier = journal.entries.get(name, {})
    claimed = {*result_files(name, earlier, outputs), *outputs.files(name, classes)}
    journal.add({"name": name, "files": sorted(file.name for file in claimed)})
    remove_results(name, earlier, outputs)
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
    files = sorted(file.name for file in outputs.files(name, classes))
    journal.add({"name": name, "files": files, "fingerprint": read.fingerprint, "rows": rows})
