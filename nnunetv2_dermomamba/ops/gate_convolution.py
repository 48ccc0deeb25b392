"""The 7 x 7 convolution of CBAM's spatial gate, two channels to one, and for inference the gate, by CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

import torch
from torch import Tensor, nn

from .library import as_autocast, register_convolution


def _one_channel(x: Tensor, weight: Tensor) -> tuple[int, ...]:
    return x.shape[0], 1, *x.shape[2:]


_operator = register_convolution("gate_convolution", "cuda_gate_convolution", "gate", _one_channel)


def gate_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Convolution with "same" padding, summed in float32; where ``backends.own_cuda_kernels``.

    Args:
        x: (B, 2, H, W), not empty.
        weight: (1, 2, 7, 7).

    Returns:
        (B, 1, H, W), of autocast's type under autocast.
    """
    return _operator(as_autocast(x), weight.float())


@torch.library.custom_op("dermomamba::spatial_gate", mutates_args=())
def _inference(maximum: Tensor, mean: Tensor, weight: Tensor, norm: Sequence[Tensor], eps: float) -> Tensor:
    kernel = import_module(".cuda_gate_convolution", __package__)  # needs CUDA
    return kernel.gate_inference(maximum, mean, weight, norm, eps)  # type: ignore[no-any-return]


@_inference.register_fake
def _(maximum: Tensor, mean: Tensor, weight: Tensor, norm: Sequence[Tensor], eps: float) -> Tensor:
    return maximum.new_empty(maximum.shape[0], 1, *maximum.shape[1:])


def spatial_gate(maximum: Tensor, mean: Tensor, weight: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    """``sigmoid(norm(convolution))`` of two maps, for inference; where ``backends.own_cuda_kernels``.

    Args:
        maximum: (B, H, W), not empty.
        mean: as maximum.
        weight: (1, 2, 7, 7).
        norm: of one channel, affine, with running statistics.

    Returns:
        (B, 1, H, W), of autocast's type under autocast.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    numbers = [m.float() for m in (norm.weight, norm.bias, norm.running_mean, norm.running_var)]
    maps = as_autocast(maximum), as_autocast(mean)
    return _inference(*maps, weight.float(), numbers, norm.eps)  # type: ignore[no-any-return]
