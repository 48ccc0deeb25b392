"""Errors of reading images."""

from __future__ import annotations


class ImageReadError(ValueError):
    """A file cannot be read, or has no single right reading as a photograph or mask.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: object, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{str(self.path)!r}: {self.reason}"


class AmbiguousMaskError(ImageReadError):
    """A file holds more than one lesion and its background, or not clearly these two."""
