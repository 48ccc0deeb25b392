"""nnU-Net's ``progress.png``, drawn while the next epoch trains."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

PATIENCE = 60.0  # seconds until a drawing is given up; one is usual
LAST_PATIENCE = 5.0  # the same when the training ends, however it does: a cluster kills soon after it asked to stop


class BackgroundPlotMixin(nnUNetTrainer):
    """Draws ``progress.png`` in a forked process; list it before the trainer.

    It takes most of a second after every epoch, for which a GPU would wait; a thread would hold up the steps. Whatever
    becomes of a drawing, training goes on, and the log tells. Elsewhere than on Linux, and where several GPUs'
    processes talk to each other, a fork is not safe: there nnU-Net draws.
    """

    _drawing: BaseProcess | None = None
    _drawing_since = 0.0

    def initialize(self) -> None:
        """As nnU-Net."""
        super().initialize()
        if sys.platform.startswith("linux") and not self.is_ddp:
            draw = self.logger.plot_progress_png
            self.logger.plot_progress_png = lambda folder: self._draw_in_background(draw, folder)

    def run_training(self) -> None:
        """As the trainer's own; no drawing outlives it."""
        try:
            super().run_training()
        finally:
            self.finish_drawing()

    def finish_drawing(self) -> None:
        """Wait for a drawing that has begun, not for long."""
        if self._drawing is not None:
            self._drawing.join(LAST_PATIENCE)
            self._end_drawing()

    def _draw_in_background(self, draw: Callable[[str], None], folder: str) -> None:
        def draw_or_tell() -> None:
            gc.disable()  # what belongs to the GPU is not this process's to free
            try:
                _draw_whole(draw, Path(folder))
            except Exception as error:  # whatever it is, it is no reason to stop training
                self.print_to_log_file(f"WARNING: progress.png was not drawn: {error!r}.")

        if self._drawing is not None:
            if self._drawing.is_alive() and time.monotonic() - self._drawing_since < PATIENCE:
                return  # the next epoch's will show this one, too
            self._end_drawing()
        process = multiprocessing.get_context("fork").Process(target=draw_or_tell, name="progress.png")
        try:
            process.start()
        except OSError as error:  # too many processes, too little memory
            self.print_to_log_file(f"WARNING: progress.png was not drawn: no process for it, {error}.")
            return
        self._drawing, self._drawing_since = process, time.monotonic()

    def _end_drawing(self) -> None:
        """Of a drawing that is through, or has had its time."""
        assert self._drawing is not None
        if self._drawing.is_alive():
            self._drawing.kill()
            self._drawing.join()
        if self._drawing.exitcode:
            self.print_to_log_file(
                f"WARNING: the process that draws progress.png ended with code {self._drawing.exitcode} after "
                f"{time.monotonic() - self._drawing_since:.0f} s."
            )
        self._drawing = None


def _draw_whole(draw: Callable[[str], None], folder: Path) -> None:
    """Draw beside the place, so that a kill leaves the picture before."""
    partial = folder / ".progress.partial"
    partial.mkdir(exist_ok=True)
    draw(str(partial))
    for picture in partial.iterdir():
        picture.replace(folder / picture.name)
    partial.rmdir()
