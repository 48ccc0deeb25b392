"""What a run over many files has done, so that a killed one can go on."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from nnunetv2_dermomamba.files import write_file

__all__ = ["Journal", "fingerprint", "read_journal"]


class Journal:
    """What is done, a line of JSON for each file or case, so that a killed run can go on.

    Args:
        path: The file; it is replaced.
        settings: What decides the results; entries of other settings are not resumed.
        entries: Those to keep, by name.
    """

    def __init__(self, path: Path, settings: dict, entries: dict[str, dict]):
        lines = [settings, *entries.values()]
        write_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
        self.entries = entries
        self._file = path.open("a")

    def add(self, entry: dict) -> None:
        """Note what is finished under ``entry["name"]``."""
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()
        self.entries[entry["name"]] = entry

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> tuple[dict, dict[str, dict]] | None:
    """Settings and entries by name of an earlier run, or None if there was none."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    parsed = []
    for line in lines:
        with suppress(ValueError):  # the line that a kill cut short
            entry = json.loads(line)
            if isinstance(entry, dict):
                parsed.append(entry)
    if not parsed:
        return None
    return parsed[0], {entry["name"]: entry for entry in parsed[1:] if "name" in entry}


def fingerprint(path: Path) -> list:
    """What tells a file from another one, and from itself before it was changed, without reading it.

    Raises:
        OSError: There is no such file.
    """
    status = path.stat()
    return [os.path.abspath(path), status.st_size, status.st_mtime_ns]
