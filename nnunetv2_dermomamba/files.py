"""Files that appear under their names only when they are complete."""

from __future__ import annotations

import hashlib
import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MAX_NAME_BYTES", "check_writable", "remove_unfinished", "whole_file", "write_file"]

MAX_NAME_BYTES = 255  # of one file name, on common file systems
UNFINISHED = ".writing-"
RANDOM_BYTES = 8


@contextmanager
def whole_file(path: Path, unfinished: str | None = None) -> Iterator[Path]:
    """Write a file beside its place; it gets its name, and replaces an earlier file, when the body is done.

    A reader, or a kill at any moment, finds the earlier file or the new one, never a part of one.

    Args:
        path: Where it shall be.
        unfinished: The name until then. None for one that no other process uses, short, since that of `path` may be as
            long as a name can be. A given one suits a large file with one writer: what a kill leaves is overwritten.

    Yields:
        Where to write it. Whatever the body raises, nothing is left there.
    """
    temporary = path.with_name(unfinished or f"{_unfinished(path)}{secrets.token_hex(RANDOM_BYTES)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes | memoryview) -> None:
    """Write a file that appears under its name only when it is complete.

    Raises:
        OSError: It cannot be written, and names `path`; nothing is left, and an earlier file is still there.
    """
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def remove_unfinished(files: Iterable[Path]) -> None:
    """Remove what a killed process was writing of these files under a name of `whole_file`'s own choice."""
    beginnings = {file.with_name(_unfinished(file)) for file in files}
    for folder in {beginning.parent for beginning in beginnings}:
        for file in folder.glob(f"{UNFINISHED}*"):
            if file.with_name(file.name[: -2 * RANDOM_BYTES]) in beginnings:
                file.unlink(missing_ok=True)


def _unfinished(path: Path) -> str:
    """How the names begin that a file has until it is complete: no other file's do."""
    return f"{UNFINISHED}{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def check_writable(folder: Path) -> None:
    """Try to write into a folder, or where it would be made; nothing is left there.

    Raises:
        OSError: It cannot be written; the message says where.
    """
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
            file.write(b"0")
    except OSError as error:
        where = "" if existing == folder else f" ({str(existing)!r} takes no files)"
        raise OSError(f"{str(folder)!r} cannot be written{where}: {error.strerror}") from error
