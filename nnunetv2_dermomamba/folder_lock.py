"""One process at a time in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such lock; two processes at once are the user's affair there
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked"]


@contextmanager
def locked(folder: Path, taken: Exception) -> Iterator[None]:
    """Keep out of a folder every other process that would lock it; a kill leaves no lock.

    Args:
        folder: It, or a file that stands for it, exists.
        taken: Raised if another process has it.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise taken from None
        except OSError:  # some network file systems have no such lock either
            pass
        yield
    finally:
        os.close(descriptor)
