"""Errors of the conversion and the exit codes they lead to."""

from __future__ import annotations


class ConversionError(Exception):
    """The conversion cannot go on; the message names the cause and the remedy. Exit code 1."""

    exit_code = 1


class SourceNotFoundError(ConversionError):
    """The source data are not where they were looked for. Exit code 2."""

    exit_code = 2


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
