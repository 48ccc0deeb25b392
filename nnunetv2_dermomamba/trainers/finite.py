"""Keeping NaN and infinity out of a training, without waiting for the device in its steps."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def skip_broken_steps(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimizer pass over steps with a gradient that is not finite, as the gradient scaler does on CUDA.

    Every gradient is looked at, which waits for the device: for the CPU.
    """

    def drop(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not all(torch.isfinite(parameter.grad).all() for parameter in parameters if parameter.grad is not None):
            optimizer.zero_grad(set_to_none=True)  # what has no gradient is not stepped

    optimizer.register_step_pre_hook(drop)


class RunningStatistics:
    """Puts BatchNorm's running means and variances back where a step made them NaN or infinite.

    A gradient scaler skips the step of a batch that overflows in float16, but its forward pass has then already entered
    the running statistics, which no later batch cleans. Training does not read them, so it is enough to `repair` them
    now and then and before something does.

    Args:
        network: whose layers are looked after; its present statistics are the first to go back to.
    """

    def __init__(self, network: nn.Module) -> None:
        layers = [module for module in network.modules() if isinstance(module, _BatchNorm)]
        buffers = [buffer for layer in layers for buffer in (layer.running_mean, layer.running_var)]
        self.buffers = [buffer for buffer in buffers if buffer is not None]
        self.kept = [buffer.clone() for buffer in self.buffers]

    @torch.no_grad()
    def repair(self) -> None:
        """Replace what is not finite by its value at the last call, without waiting for the device."""
        for buffer, kept in zip(self.buffers, self.kept, strict=True):
            buffer.copy_(torch.where(torch.isfinite(buffer), buffer, kept))
            kept.copy_(buffer)


def skipped_at_end(outputs: list[dict]) -> int:
    """How many of the last steps in a row had a loss or gradient that is not finite; waits for the device.

    Args:
        outputs: of ``train_step``: tensors or arrays by name, equally shaped in all steps.
    """
    if not outputs:
        return 0
    columns = [torch.stack([torch.as_tensor(output[name]) for output in outputs]) for name in outputs[0]]
    finite = (
        torch.stack([torch.isfinite(column).reshape(len(outputs), -1).all(1) for column in columns]).all(0).tolist()
    )
    return finite[::-1].index(True) if True in finite else len(finite)
