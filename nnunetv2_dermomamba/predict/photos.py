"""Which photographs to segment, and what to call what comes of them."""

from __future__ import annotations

import codecs
import glob
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_dermomamba.images.photograph import IMAGE_SUFFIXES
from nnunetv2_dermomamba.journal import read_journal
from nnunetv2_dermomamba.predict.reading import is_dicom

__all__ = [
    "CSV_FILE",
    "FAILED_FILE",
    "JOURNAL_FILE",
    "OVERLAY_ENDING",
    "InputError",
    "Photo",
    "find_photos",
    "is_companion",
]

SUFFIXES = (*IMAGE_SUFFIXES, ".webp", ".dcm", ".dicom")
LIST_SUFFIX = ".txt"

# What a run writes beside the masks.
CSV_FILE = "predictions.csv"
FAILED_FILE = "failed.txt"
JOURNAL_FILE = ".dermomamba_predict.jsonl"
MASK_ENDING = "_mask.png"
OVERLAY_ENDING = "_overlay.jpg"
PROBABILITY_MAP = re.compile(r".+_probability(_\d{1,3})?\.png", re.ASCII)


class InputError(ValueError):
    """There is nothing to segment, or the results would overwrite it; the message says what to do."""


@dataclass(frozen=True)
class Photo:
    """A photograph to segment.

    Attributes:
        path: The file.
        name: What its results are called, relative to the output folder and without ending.
    """

    path: Path
    name: str


def is_companion(name: str) -> bool:
    """Whether a file name is one that ``dermomamba predict`` gives to what it writes beside the masks."""
    if name in (CSV_FILE, FAILED_FILE, JOURNAL_FILE):
        return True
    return name.endswith(OVERLAY_ENDING) or PROBABILITY_MAP.fullmatch(name) is not None


def find_photos(source: str | Path, output: Path) -> list[Photo]:
    """Find photographs and name their results.

    Args:
        source: A file; a folder, searched recursively; a glob; or a ``.txt`` file with a path on each line (relative
            ones to its own folder), or with paths that end in zero bytes.
        output: Folder for the results; if it lies in the source folder, or where a glob looks, it is not searched.
            Results of runs into other folders there are no photographs either.

    Returns:
        The photographs, sorted. Each is named by its path below the folder, without suffix; photographs that would get
        one name keep their suffix, and if that is not enough are numbered. Names that differ in case only count as one.

    Raises:
        InputError: Nothing is found, or results would lie among the photographs.
    """
    root, files = _files(str(source), output)
    if not files:
        raise InputError(f"no photographs in {str(source)!r}; looked for {', '.join(SUFFIXES)} and DICOM")
    return _named(root, sorted(set(files)))


def _files(source: str, output: Path) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files."""
    path = Path(source)
    if path.is_dir():
        if os.path.realpath(path) == os.path.realpath(output):
            raise _among_photographs(output)
        return path, _without_results(list(_search(path, os.path.realpath(output))))
    if path.suffix.lower() == LIST_SUFFIX and path.is_file():
        files = [Path(os.path.abspath(path)).parent / line for line in _lines(path)]
        return _common_folder(files), files
    if os.path.lexists(path):
        return path.parent, [path]
    if glob.has_magic(source):
        fixed = Path(*_until_magic(path.parent.parts))
        return fixed, _without_results(_matching(source, fixed, output))
    raise InputError(f"{source!r} does not exist")


def _without_results(files: list[Path]) -> list[Path]:
    """The files but those that runs into folders around them wrote, as the journals there tell."""
    results = set()
    for folder in {parent for file in files for parent in file.parents}:
        _, entries = read_journal(folder / JOURNAL_FILE) or ({}, {})
        results |= {(folder / name).with_name(file) for name, e in entries.items() for file in e.get("files", [])}
    return [file for file in files if file not in results]


def _among_photographs(output: Path) -> InputError:
    return InputError(f"{str(output)!r} holds the photographs; give another folder for the masks")


def _matching(pattern: str, fixed: Path, output: Path) -> list[Path]:
    """Photographs that a glob names, less those in an output folder at or below its fixed part."""
    found = [Path(file) for file in glob.glob(pattern, recursive=True)]
    found = [file for file in found if file.is_file() and _is_photo(file)]
    if os.path.realpath(fixed) != os.path.realpath(output) and _lies_in(fixed, output):
        return found
    there = {file for file in found if _lies_in(file.parent, output)}
    if not all(is_companion(file.name) or file.name.endswith(MASK_ENDING) for file in there):
        raise _among_photographs(output)
    return [file for file in found if file not in there]


def _lies_in(folder: Path, other: Path) -> bool:
    return Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(other))


def _until_magic(parts: tuple[str, ...]) -> list[str]:
    fixed = []
    for part in parts:
        if glob.has_magic(part):
            break
        fixed.append(part)
    return fixed


def _lines(path: Path) -> list[str]:
    data = path.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell's > writes it
        data = data.decode("utf-16", "replace").encode()
    data = data.removeprefix(codecs.BOM_UTF8)  # as Windows's editors write it
    separated = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(line) for line in separated if line.strip()]


def _common_folder(files: list[Path]) -> Path:
    try:
        return Path(os.path.commonpath([file.parent for file in files]))
    except ValueError:  # none, or on several Windows drives
        return Path()


def _search(root: Path, skipped: str) -> Iterable[Path]:
    """Photographs below a folder; links to folders are followed, but no folder is entered twice."""
    seen = {skipped}
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and _is_photo(file):
                yield file


def _is_photo(file: Path) -> bool:
    suffix = file.suffix.lower()
    return suffix in SUFFIXES or (not suffix[1:].isalpha() and is_dicom(file))  # DICOM names may be mere numbers


def _named(root: Path, files: list[Path]) -> list[Photo]:
    names = {file: _relative(file.with_suffix("") if file.suffix else file, root) for file in files}
    for group in _clashes(names):
        for file in group:
            names[file] = _relative(file, root)
    while groups := _clashes(names):
        for group in groups:
            for number, file in enumerate(group[1:], start=2):
                names[file] += f"~{number}"
    return [Photo(file, names[file]) for file in files]


def _clashes(names: dict[Path, str]) -> list[list[Path]]:
    same: dict[str, list[Path]] = defaultdict(list)
    for file, name in names.items():
        same[unicodedata.normalize("NFC", name).casefold()].append(file)
    return [group for group in same.values() if len(group) > 1]


def _relative(file: Path, root: Path) -> str:
    try:
        relative = file.relative_to(root)
    except ValueError:  # a list may name anything
        relative = Path(file.name)
    return Path(*(part for part in relative.parts if part != "..")).as_posix()
