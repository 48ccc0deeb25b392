"""Inference on a GPU by replays of a CUDA graph: without, kernels take many times longer to launch than to run."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable
from itertools import chain

import torch
from torch import Tensor, nn

from nnunetv2_dermomamba.cuda_graph import CapturedPass

MOST = 2
"""Graphs that are kept, each with its memory: one for an image and one for its mirror images, say."""


def can_replay(module: nn.Module, x: Tensor) -> bool:
    """Whether a call is inference as nnU-Net's predictor does it, on a GPU, and nobody compiles or captures it."""
    if torch.compiler.is_compiling() or module.training or not x.is_cuda:
        return False
    return torch.is_inference_mode_enabled() and not torch.cuda.is_current_stream_capturing()


class Replays:
    """Graphs of a module's forward pass, one for each kind of input; copies of it start without any.

    A graph reads parameters where they were when it was captured. Changed in place, as ``load_state_dict`` changes
    them, they are read as they are; where one has moved, all graphs are dropped.
    """

    def __init__(self) -> None:
        self._passes: dict[Hashable, CapturedPass] = {}
        self._addresses: list[int] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def __call__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``forward(x)``, which reads no other tensors than the module's."""
        addresses = [m.data_ptr() for m in chain(module.parameters(), module.buffers())]
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kind = x.shape, x.dtype, autocast, torch.cuda.current_stream(x.device)
        with self._lock, torch.cuda.device(x.device):
            if addresses != self._addresses:
                self._passes.clear()
                self._addresses = addresses
            if kind not in self._passes:
                if len(self._passes) == MOST:
                    del self._passes[next(iter(self._passes))]
                # nnU-Net's predictor has a thread that waits for the GPU
                call = _without_cached_casts(forward, *autocast)
                self._passes[kind] = CapturedPass(call, _report, "network", rehearses=False)
            return self._passes[kind](x)


def _without_cached_casts(
    forward: Callable[[Tensor], Tensor], enabled: bool, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Autocast keeps its copies of the weights; a graph that read them would not see weights that have changed."""

    def call(x: Tensor) -> Tensor:
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            return forward(x)

    return call


def _report(line: str) -> None:
    print(line, file=sys.stderr)
