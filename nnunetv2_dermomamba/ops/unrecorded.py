"""Operators with a gradient of their own, called where none is recorded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Unrecorded:
    """A context that keeps nothing."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *tensors: Tensor) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``; in inference its forward pass alone, since PyTorch's call takes as long as a small kernel."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_Unrecorded(), *arguments)
