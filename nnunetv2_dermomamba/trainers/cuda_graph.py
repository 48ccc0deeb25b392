"""Forward pass, loss and backward pass of a training as one CUDA graph: no time goes into launching kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: compilation, cuDNN's choice of algorithms and Triton's kernels must be behind it."""


class CapturedPass:
    """Calls ``compute`` for the first batches, then captures it and replays the graph for all that follow.

    The graph writes gradients to memory of its own: whoever calls this clears them before every call with
    ``optimizer.zero_grad(set_to_none=True)`` until `captured`, and leaves them alone from then on.

    Args:
        compute: takes data and target, leaves gradients in the parameters and returns the loss; must not wait for
            the device. All batches have the shapes and types of the first.
        report: called with a line of text if the capture fails; ``compute`` is then called as it is.
    """

    def __init__(self, compute: Callable[[Tensor, Tensor], Tensor], report: Callable[[str], None] = print) -> None:
        self.compute = compute
        self.report = report
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph."""
        return self.graph is not None

    def __call__(self, data: Tensor, target: Tensor) -> Tensor:
        """Loss of a batch, detached; the gradients are in the parameters."""
        self.calls += 1
        if self.graph is None and not self.failed and self.calls > WARM_UP:
            self._capture(data, target)
        if self.graph is None:
            return self._on_side_stream(data, target) if self.calls <= WARM_UP else self.compute(data, target).detach()
        self.data.copy_(data, non_blocking=True)
        self.target.copy_(target, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()

    def _on_side_stream(self, data: Tensor, target: Tensor) -> Tensor:
        # a capture runs on a stream of its own, and wants what it captures to have been warmed up on such a one
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            loss = self.compute(data, target).detach()
        torch.cuda.current_stream().wait_stream(side)
        return loss

    def _capture(self, data: Tensor, target: Tensor) -> None:
        self.data, self.target = data.clone(), target.clone()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.loss = self.compute(self.data, self.target).detach()
        except RuntimeError as error:
            self.failed = True
            first_line = str(error).partition("\n")[0]
            self.report(f"The training step was not captured as a CUDA graph and runs without one: {first_line}")
        else:
            self.graph = graph
