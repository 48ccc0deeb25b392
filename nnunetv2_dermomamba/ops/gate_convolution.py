"""The 7 x 7 convolution of CBAM's spatial gate, two channels to one, as an operator of CUDA kernels."""

from __future__ import annotations

from torch import Tensor

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
