"""Inference on a GPU by replays of a CUDA graph: without, kernels take many times longer to launch than to run."""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

from nnunetv2_dermomamba.cuda_graph import CapturedPass

MOST = 2
"""Graphs that are kept, each with its memory: one for an image and one for its mirror images, say."""


def can_replay(x: Tensor) -> bool:
    """Whether a call is inference as nnU-Net's predictor does it, on a GPU, and nobody compiles or captures it."""
    if torch.compiler.is_compiling() or not x.is_cuda:
        return False
    return torch.is_inference_mode_enabled() and not torch.cuda.is_current_stream_capturing()


class Replays:
    """Graphs of a module's forward pass, one for each kind of input; copies of it start without any.

    A graph reads parameters where they were when it was captured. Changed in place, as ``load_state_dict`` changes
    them, they are read as they are; where one has moved, all graphs are dropped. What else a forward pass depends on,
    such as PyTorch's switches for TF32 and cuDNN or ``DERMOMAMBA_BACKEND``, is as it was at the capture.
    """

    def __init__(self) -> None:
        self._passes: dict[Hashable, CapturedPass] = {}
        self._tensors: list[Hashable] = []
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[Replays], tuple[()]]:
        return Replays, ()

    def __call__(self, module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``forward(x)``, a method of the module that reads no other tensors than the module's.

        It is called as it is while a part of the module is in training or has hooks.

        Raises:
            torch.OutOfMemoryError: As ``forward`` does; no graph is kept then.
        """
        tensors = _tensors_of(module)
        if tensors is None:
            return forward(x)
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        kind = x.shape, x.dtype, autocast, torch.cuda.current_stream(x.device)
        with self._lock, torch.cuda.device(x.device):
            if tensors != self._tensors:
                self._passes.clear()
                self._tensors = tensors
            if kind not in self._passes:
                if len(self._passes) == MOST:
                    del self._passes[next(iter(self._passes))]
                # nnU-Net's predictor has a thread that waits for the GPU
                call = _without_cached_casts(forward, *autocast)
                self._passes[kind] = CapturedPass(call, _report, "network", rehearses=False)
            try:
                return self._passes[kind](x)
            except torch.OutOfMemoryError:
                self._passes.clear()
                raise


def _tensors_of(module: nn.Module) -> list[Hashable] | None:
    """Where and how parameters and buffers lie; None where a graph would not do what the module does."""
    tensors: list[Hashable] = []
    for part in module.modules():
        if part.training or part._forward_hooks or part._forward_pre_hooks:
            return None
        for m in (*part._parameters.values(), *part._buffers.values()):
            if m is not None:
                tensors.append((m.data_ptr(), m.stride(), m.dtype))
    return tensors


def _without_cached_casts(
    forward: Callable[[Tensor], Tensor], enabled: bool, dtype: torch.dtype
) -> Callable[[Tensor], Tensor]:
    """Autocast keeps its copies of the weights; a graph that read them would not see weights that have changed."""
    method = weakref.WeakMethod(forward)  # or the module would belong to its own graphs, and outlive its last user

    def call(x: Tensor) -> Tensor:
        alive = method()
        assert alive is not None
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            return alive(x)  # type: ignore[no-any-return]

    return call


def _report(line: str) -> None:
    print(line, file=sys.stderr)
