"""A pass through a network, in training with loss and gradients, as one CUDA graph: no kernel is launched by itself."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: compilation, cuDNN's choice of algorithms and Triton's kernels must be behind it."""

_CAPTURING = threading.Lock()  # PyTorch does one capture at a time


@cache
def _side_stream(device: int) -> torch.cuda.Stream:
    """One for all warm-up calls and captures: of every stream that it is called on cuBLAS keeps some memory."""
    return torch.cuda.Stream(device)


class CapturedPass:
    """Calls ``compute`` for the first batches, then captures it and replays the graph for all that follow.

    The graph reads parameters where they are, and writes gradients to memory of its own: only ``compute`` may set them
    to None, and nobody once it is `captured`. Where it cannot be captured, ``compute`` is called as it is, for good.

    Args:
        compute: takes the tensors of a batch and returns one: the logits, or in training the loss, after it has set the
            gradients to None and left new ones in the parameters. Must not wait for the device. All batches have the
            shapes and types of the first.
        report: called with a line of text if the capture fails.
        name: what is captured, for that line.
        rehearses: whether to find out before the capture if ``compute`` waits for the device, which would break it and
            leave memory behind. During that call no other thread may wait for the device either: PyTorch raises there.
        shares: a pass whose graph's memory serves this one, too. They are not called at the same time, and this one
            writes over what the other one's graph left, but for tensors that are in use when this one is captured.
    """

    def __init__(
        self,
        compute: Callable[..., Tensor],
        report: Callable[[str], None] = print,
        name: str = "training step",
        rehearses: bool = True,
        shares: CapturedPass | None = None,
    ) -> None:
        self.compute = compute
        self.report = report
        self.name = name
        self.rehearses = rehearses
        self.shares = shares
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False

    @property
    def captured(self) -> bool:
        """Whether calls replay the graph."""
        return self.graph is not None

    def __call__(self, *batch: Tensor) -> Tensor:
        """What ``compute`` returns for a batch, detached."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self._rehearse(batch) if self.rehearses and self.calls == WARM_UP else self._on_side_stream(batch)
        if self.graph is None and not self.failed:
            self._capture(batch)
        if self.graph is None:
            return self.compute(*batch).detach()
        for own, given in zip(self.batch, batch, strict=True):
            own.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result.clone()

    def _on_side_stream(self, batch: tuple[Tensor, ...]) -> Tensor:
        # a capture runs on a stream of its own, and wants what it captures to have been warmed up on such a one
        side = _side_stream(torch.cuda.current_device())
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                return self.compute(*batch).detach()
        finally:
            torch.cuda.current_stream().wait_stream(side)

    def _rehearse(self, batch: tuple[Tensor, ...]) -> Tensor:
        # what waits for the device would break the capture, and PyTorch 2.11 does not get that one's memory back
        try:
            with _refusing_to_wait():
                return self._on_side_stream(batch)
        except RuntimeError as error:
            self._give_up(error)
        return self.compute(*batch).detach()

    def _capture(self, batch: tuple[Tensor, ...]) -> None:
        self.batch = [m.clone() for m in batch]
        graph, pool = torch.cuda.CUDAGraph(), self._memory()
        stream, side = torch.cuda.current_stream(), _side_stream(torch.cuda.current_device())
        try:
            # nnU-Net's threads that pin the next batches or bring patches to the GPU go on; "global" has them fail
            with _CAPTURING, torch.cuda.graph(graph, pool, side, capture_error_mode="thread_local"):
                self.result = self.compute(*self.batch).detach()
        except RuntimeError as error:
            torch.cuda.set_stream(stream)
            _forget_capture(batch[0].device.index, pool)
            del self.batch
            self._give_up(error)
        else:
            self.graph = graph

    def _memory(self) -> tuple[int, int]:
        other = None if self.shares is None else self.shares.graph
        return torch.cuda.graph_pool_handle() if other is None else other.pool()

    def _give_up(self, error: RuntimeError) -> None:
        self.failed = True
        cause = error.__context__ or error  # the end of a broken capture fails, too
        first_line = str(cause).partition("\n")[0]
        self.report(f"The {self.name} was not captured as a CUDA graph and runs without one: {first_line}")


def _forget_capture(device: int, pool: tuple[int, int]) -> None:
    """Undo what PyTorch leaves of a capture that broke: it goes on believing in it."""
    # or no random number can be drawn outside it
    generator = torch.cuda.default_generators[device]
    generator.graphsafe_set_state(generator.clone_state())
    # or empty_cache, which nnU-Net calls when the training is over, fails; PyTorch after 2.11 has done it
    with suppress(AttributeError, RuntimeError):
        torch._C._cuda_endAllocateToPool(device, pool)


@contextmanager
def _refusing_to_wait() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype, which does not see everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
