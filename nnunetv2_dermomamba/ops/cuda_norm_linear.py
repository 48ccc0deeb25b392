"""LayerNorm, gate and linear map of few channels as CUDA kernels (``cuda/norm_linear.cu``)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .cuda_block import INPUTS, ceil_div
from .nvrtc import launch

FILES = ("four.cuh", "input.cuh", "norm_linear.cu")
THREADS = 128
LARGEST = 64
"""Elements of a matrix whose gradient's sums a thread holds in registers."""
FORWARD_BLOCKS, BACKWARD_BLOCKS = 7 * 132, 4 * 132
"""That fill a large GPU of 132 processors: threads walk over all rows."""


class Sizes(ctypes.Structure):
    """As in ``norm_linear.cu``."""

    _fields_ = [*((n, ctypes.c_int) for n in ("rows", "x_row", "gate_row")), ("eps", ctypes.c_float)]


def serves(x: Tensor, gate: Tensor | None, matrix: Tensor) -> bool:
    """Whether there are kernels for x (..., c), gate (..., c) and matrix (m, c); rows are counted in 32 bits."""
    known = x.dtype in INPUTS and (gate is None or gate.dtype in INPUTS)
    few = matrix.shape[1] in (4, 8) and matrix.shape[0] % 4 == 0 and matrix.numel() <= LARGEST
    return known and few and 0 < x.numel() < 2**30


def _rows(x: Tensor) -> Tensor:
    """(..., c) as (rows, c) with adjacent channels, where a row can be read at once."""
    x = x.reshape(-1, x.shape[-1])
    size = x.element_size()
    unit = min(16, x.shape[1] * size & -(x.shape[1] * size))  # the power of two that divides a row's bytes
    whole = x.stride(1) == 1 and x.stride(0) * size % unit == 0 and x.data_ptr() % unit == 0
    return x if whole else x.clone(memory_format=torch.contiguous_format)


def _definitions(x: Tensor, gate: Tensor | None, matrix: Tensor, kind: torch.dtype, maps: int) -> dict[str, int]:
    outputs, channels = matrix.shape
    kinds = {"INPUT": INPUTS[x.dtype], "GATE": INPUTS[x.dtype if gate is None else gate.dtype], "RESULT": INPUTS[kind]}
    return {"CHANNELS": channels, "OUTPUTS": outputs, **kinds, "GATED": int(gate is not None), "MAPS": maps}


def norm_linear_forward(
    x: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    matrix: Tensor,
    kind: torch.dtype,
    maps: int = 1,
) -> Tensor:
    """See ``triton_norm_linear.norm_linear_forward``; the product is float32's, and for c and m see ``serves``."""
    y = x.new_empty(*x.shape[maps > 1 : -1], len(matrix), dtype=kind)
    definitions = _definitions(x, gate, matrix, kind, maps)
    with torch.cuda.device_of(x):
        x = _rows(x)
        gates = x if gate is None else _rows(gate)
        sizes = Sizes(len(x) // maps, x.stride(0), gates.stride(0), eps)
        parameters = (m.contiguous() for m in (scale, shift, matrix))
        blocks = min(FORWARD_BLOCKS, ceil_div(sizes.rows, THREADS))
        launch(FILES, definitions, "norm_linear_forward", blocks, THREADS, 0, x, gates, *parameters, y, sizes)
    return y


def norm_linear_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, matrix: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of ``norm_linear_forward`` for ``dy`` (..., m).

    Returns:
        Of x and gate, of their types and contiguous; of scale, shift and matrix, in float32.
    """
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    definitions = _definitions(x, gate, matrix, dy.dtype, 1)
    with torch.cuda.device_of(x):
        x, dy = _rows(x), _rows(dy.contiguous())
        gates = x if gate is None else _rows(gate)
        sizes = Sizes(len(x), x.stride(0), gates.stride(0), eps)
        parameters = (m.contiguous() for m in (scale, shift, matrix))
        blocks = min(BACKWARD_BLOCKS, ceil_div(len(x), THREADS))
        parts = x.new_empty(blocks, len(matrix) + 2, matrix.shape[1], dtype=torch.float32)
        shared = (1 + THREADS // 32) * parts[0].numel() * 4  # parameters, and the warps' sums of their gradients
        arguments = dy, x, gates, *parameters, dx, dgate, parts, sizes
        launch(FILES, definitions, "norm_linear_backward", blocks, THREADS, shared, *arguments)
        total = parts.sum(0)
    return dx, dgate, total[-2].clone(), total[-1].clone(), total[:-2].clone()
