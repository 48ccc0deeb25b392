"""nnU-Net's ``progress.png``, drawn while the next epoch trains."""

from __future__ import annotations

import gc
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

PATIENCE = 60.0  # seconds that a drawing may take, and a second is usual


class BackgroundPlotMixin(nnUNetTrainer):
    """Draws ``progress.png`` in a forked process; list it before the trainer.

    It takes most of a second after every epoch, for which a GPU would wait; a thread would hold up the steps. Elsewhere
    than on Linux, and where several GPUs' processes talk to each other, a fork is not safe: there nnU-Net draws.
    """

    _drawing: BaseProcess | None = None

    def initialize(self) -> None:
        """As nnU-Net."""
        super().initialize()
        if sys.platform.startswith("linux") and not self.is_ddp:
            draw = self.logger.plot_progress_png
            self.logger.plot_progress_png = lambda folder: self._draw_in_background(draw, folder)

    def on_train_end(self) -> None:
        """As nnU-Net; the last drawing is finished then."""
        super().on_train_end()
        self._finish_drawing()

    def _draw_in_background(self, draw: Callable[[str], None], folder: str) -> None:
        def draw_or_tell() -> None:
            gc.disable()  # what belongs to the GPU is not this process's to free
            try:
                draw(folder)
            except OSError as error:
                self.print_to_log_file(f"WARNING: progress.png was not written: {error}. Training goes on.")

        self._finish_drawing()
        self._drawing = multiprocessing.get_context("fork").Process(target=draw_or_tell, name="progress.png")
        self._drawing.start()

    def _finish_drawing(self) -> None:
        if self._drawing is None:
            return
        self._drawing.join(PATIENCE)
        if self._drawing.is_alive():
            self.print_to_log_file(f"WARNING: progress.png was not drawn within {PATIENCE:.0f} s. Training goes on.")
            self._drawing.kill()
            self._drawing.join()
        self._drawing = None
