"""Errors of the conversion and the exit codes they lead to."""

from __future__ import annotations


class ConversionError(Exception):
    """The conversion cannot go on; the message names the cause and the remedy. Exit code 1."""

    exit_code = 1


class SourceNotFoundError(ConversionError):
    """The source data are not where they were looked for. Exit code 2."""

    exit_code = 2
