"""nnU-Net's ``progress.png``, drawn while the next epoch trains."""

from __future__ import annotations

from collections.abc import Callable
from threading import Thread

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class BackgroundPlotMixin(nnUNetTrainer):
    """Draws ``progress.png`` in a thread; list it before the trainer.

    It takes most of a second after every epoch, for which a GPU would wait. What is drawn are lists that only grow, up
    to the epoch that all of them have reached, so that the next epoch does not disturb it.
    """

    _drawing: Thread | None = None

    def initialize(self) -> None:
        """As nnU-Net."""
        super().initialize()
        draw = self.logger.plot_progress_png
        self.logger.plot_progress_png = lambda folder: self._draw_in_background(draw, folder)

    def on_train_end(self) -> None:
        """As nnU-Net; the last drawing is finished then."""
        super().on_train_end()
        self._finish_drawing()

    def _draw_in_background(self, draw: Callable[[str], None], folder: str) -> None:
        def draw_or_tell() -> None:
            try:
                draw(folder)
            except OSError as error:
                self.print_to_log_file(f"WARNING: progress.png was not written: {error}. Training goes on.")

        self._finish_drawing()  # Matplotlib draws one figure at a time
        self._drawing = Thread(target=draw_or_tell, name="progress.png")  # Python waits for it when it ends
        self._drawing.start()

    def _finish_drawing(self) -> None:
        if self._drawing is not None:
            self._drawing.join()
