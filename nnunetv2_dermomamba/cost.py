"""A network's parameters, and its operations for one image."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Cost", "count_cost"]


@dataclass(frozen=True)
class Cost:
    """A network's size and its work for one image.

    Attributes:
        parameters: Trainable parameters.
        convolutions: Multiply-adds of convolutions.
        linear: Multiply-adds of linear layers.
        scan_projections: Multiply-adds of the selective scans' projections.
        scan_updates: State updates of the selective scans.
    """

    parameters: int
    convolutions: int
    linear: int
    scan_projections: int
    scan_updates: int

    @property
    def operations(self) -> int:
        """All multiply-adds and state updates."""
        return self.convolutions + self.linear + self.scan_projections + self.scan_updates


def count_cost(network: nn.Module, channels: int, patch_size: tuple[int, ...]) -> Cost:
    """Count a network's parameters and its operations for one image of the patch size; nothing is computed.

    Args:
        network: On the CPU; without selective scans too.
        channels: Input channels.
        patch_size: Size of the input.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    from nnunetv2_dermomamba.network.ss2d import SS2D

    projections = updates = 0

    def count_scan(module: nn.Module, inputs: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        nonlocal projections, updates
        pixels = inputs[0].shape[:3].numel()
        projections += pixels * (module.x_proj_weight.numel() + module.dt_projs_weight.numel())
        updates += pixels * module.A_logs.numel()

    hooks = [m.register_forward_hook(count_scan) for m in network.modules() if isinstance(m, SS2D)]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    was_training = network.training
    try:
        network.eval()
        with _automatic_backend(), torch.no_grad(), mode, FlopCounterMode(display=False) as counter:
            network(torch.empty(1, channels, *patch_size))
    finally:
        network.train(was_training)
        for hook in hooks:
            hook.remove()
    # PyTorch counts two operations for a multiply-add.
    counts = {str(op): count // 2 for op, count in counter.get_flop_counts()["Global"].items()}
    convolutions = counts.pop("aten.convolution", 0)
    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return Cost(parameters, convolutions, sum(counts.values()), projections, updates)


@contextmanager
def _automatic_backend() -> Iterator[None]:
    """Leave the backend to automatic choice: on the CPU that is a fused scan, which counts as no other operation."""
    from nnunetv2_dermomamba.ops import ENVIRONMENT_VARIABLE, describe_choice

    requested = os.environ.pop(ENVIRONMENT_VARIABLE, None)
    describe_choice("cpu")  # counts as announced: this choice is none of the user's concern
    try:
        yield
    finally:
        if requested is not None:
            os.environ[ENVIRONMENT_VARIABLE] = requested
