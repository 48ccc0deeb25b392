"""Which files are written for each photograph."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_dermomamba.files import MAX_NAME_BYTES
from nnunetv2_dermomamba.predict.photos import MASK_ENDING, OVERLAY_ENDING
from nnunetv2_dermomamba.predict.rendering import Classes

__all__ = ["Outputs"]


@dataclass(frozen=True)
class Outputs:
    """Which files to write.

    Attributes:
        folder: For all of them.
        overlay: Draw the contours on the photograph.
        probabilities: Write 16-bit probability maps.
    """

    folder: Path
    overlay: bool = False
    probabilities: bool = False

    def mask(self, name: str) -> Path:
        """The mask of a photograph, which is written last."""
        return self.folder / f"{name}{MASK_ENDING}"

    def overlay_file(self, name: str) -> Path:
        """The photograph with contours."""
        return self.folder / f"{name}{OVERLAY_ENDING}"

    def probability_files(self, name: str, classes: Classes) -> list[Path]:
        """A map for each class."""
        if len(classes.values) == 1:
            return [self.folder / f"{name}_probability.png"]
        return [self.folder / f"{name}_probability_{value}.png" for value in classes.values]

    def files(self, name: str, classes: Classes) -> list[Path]:
        """All files of a photograph."""
        return [
            self.mask(name),
            *([self.overlay_file(name)] if self.overlay else []),
            *(self.probability_files(name, classes) if self.probabilities else []),
        ]

    def name_problem(self, name: str, classes: Classes) -> str | None:
        """Why the file system would not take a photograph's results, if so."""
        excess = max(len(os.fsencode(file.name)) for file in self.files(name, classes)) - MAX_NAME_BYTES
        return f"its name is too long by {excess} bytes for its results; rename it" if excess > 0 else None
