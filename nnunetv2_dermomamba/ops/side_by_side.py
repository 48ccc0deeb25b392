"""SS2D layers that are independent of each other at once, for inference: small maps leave most of a GPU idle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from .backends import LOADED, choose_backend, own_cuda_kernels, own_gpu_kernels
from .depthwise_silu import depthwise_silu_by_taps
from .norm_linear import norm_linear_by_kernel

OPERANDS = 11
"""Of a layer, in the order of ``_layer``'s arguments."""


@cache
def _streams(device: int, main: int, count: int) -> list[torch.cuda.Stream]:
    """Streams beside a ``main`` one, the same ones in every call."""
    return [torch.cuda.Stream(device) for _ in range(count)]


def _at_once(calls: Sequence[Callable[[], Tensor]], like: Tensor) -> list[Tensor]:
    """Results of all calls, on streams of their own but for the first; what comes after them waits for them."""
    if not like.is_cuda:
        return [call() for call in calls]
    with torch.cuda.device_of(like):
        main = torch.cuda.current_stream()
        before = main.record_event()
        streams = _streams(like.get_device(), main.cuda_stream, len(calls) - 1)
        others = []
        for stream, call in zip(streams, calls[1:], strict=True):
            stream.wait_event(before)
            with torch.cuda.stream(stream):
                others.append(call())
        results = [calls[0](), *others]
        for stream, result in zip(streams, others, strict=True):
            main.wait_stream(stream)
            result.record_stream(main)  # its memory is the other stream's
        return results


def _layer(
    x: Tensor,
    gate: Tensor,
    taps: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    scale: Tensor,
    shift: Tensor,
    matrix: Tensor,
    eps: float,
) -> Tensor:
    scan = LOADED[choose_backend(x.device.type, x.dtype)].directions_2d
    assert scan is not None
    y = scan(depthwise_silu_by_taps(x, taps), x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    return norm_linear_by_kernel(y, gate, scale, shift, eps, matrix, x.dtype, len(y))


# PyTorch 2.6 does not know what list[Tensor] is
@torch.library.custom_op(
    "dermomamba::ss2d_side_by_side", mutates_args=(), schema="(Tensor[] operands, float[] eps) -> Tensor[]"
)
def _forward(operands: Sequence[Tensor], eps: Sequence[float]) -> list[Tensor]:
    layers = [operands[n * OPERANDS : (n + 1) * OPERANDS] for n in range(len(eps))]
    return _at_once([lambda n=n: _layer(*layers[n], eps=eps[n]) for n in range(len(eps))], operands[0])  # type: ignore[misc]


@_forward.register_fake
def _(operands: Sequence[Tensor], eps: Sequence[float]) -> list[Tensor]:
    layers = zip(operands[::OPERANDS], operands[OPERANDS - 1 :: OPERANDS], strict=True)
    return [x.new_empty(*x.shape[:-1], len(matrix)) for x, matrix in layers]


def serves(x: Tensor, channels: Sequence[int]) -> bool:
    """Whether layers whose scans run on so many channels can be done at once: in inference, for maps like ``x``."""
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if not x.is_cuda or torch.is_grad_enabled() or not x.numel():
        return False
    return all(c % 4 == 0 and c <= 128 for c in channels) and own_cuda_kernels(kind) and own_gpu_kernels(kind)


def ss2d_side_by_side(operands: Sequence[Tensor], eps: Sequence[float]) -> list[Tensor]:
    """What SS2D layers make of their projected inputs; where it ``serves``.

    Args:
        operands: of each layer x and gate, (B, H, W, d), the convolution's ``taps_of``, the scan's parameters (see
            ``selective_scan_2d``), and out_norm's weight and bias and out_proj's weight, float32.
        eps: of each layer's out_norm.

    Returns:
        For each layer (B, H, W, c) of the type of its x.
    """
    return _forward(operands, eps)  # type: ignore[no-any-return]
