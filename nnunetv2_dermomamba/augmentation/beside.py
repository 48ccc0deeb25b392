"""Making a batch on a GPU while the step before it runs there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

AHEAD = 2
"""Steps that may be waiting on the GPU when a batch is made: one keeps it busy, and each has a batch in memory."""


class Beside:
    """A stream of its own for batches: their many short kernels fill what those of a step leave idle.

    Args:
        device: a GPU. What batches are made of is there, or on its way on the present stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        self.taken: deque[torch.cuda.Event] = deque()

    def __call__(self, make: Callable[[], dict]) -> dict:
        """What ``make`` returns, made on the stream; its tensors and lists of tensors are for the present one."""
        if len(self.taken) > AHEAD:
            self.taken.popleft().synchronize()
        consumer = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            batch = make()
        consumer.wait_stream(self.stream)
        for value in batch.values():
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, torch.Tensor):
                    part.record_stream(consumer)  # no other batch gets its memory before the step is through with it
        self.taken.append(consumer.record_event())
        return batch
