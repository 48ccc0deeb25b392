# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of ``norm_linear``: LayerNorm, gate and linear map of a block of rows without leaving registers.

The backward pass normalises again instead of keeping what it normalised: memory holds the inputs and nothing else.
Statistics, gate and sums are float32; the product is of the result's type, as autocast's would be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nnunetv2_dermomamba.ops.triton_common import ceil_div, programs_at_once

VALUES = 4096  # of a program, about: what its threads hold without spilling
PROGRAMS = 8  # a processor, of the backward pass with small matrices


@triton.jit
def _dot(a, b, acc, kind: tl.constexpr):
    return tl.dot(a.to(kind), b.to(kind), acc, input_precision="ieee")


@triton.jit
def _normalise(x_ptr, x_row, row, column, rows, eps, C: tl.constexpr, MAPS: tl.constexpr = 1):
    """Rows, of the sum of ``MAPS`` maps, scaled to mean 0 and variance 1; 0 where padded.

    What they were divided by is ``1 / rstd``.
    """
    inside = (row < rows)[:, None] & (column < C)[None, :]
    x = tl.load(x_ptr + row[:, None] * x_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
    for n in tl.static_range(1, MAPS):
        at = (n * rows.to(tl.int64) + row)[:, None] * x_row + column[None, :]
        x += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where((column < C)[None, :], x - (tl.sum(x, axis=1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / C + eps)
    return x * rstd[:, None], rstd, inside


@triton.jit
def _load_matrix(ptr, C: tl.constexpr, M: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr):
    """The matrix (M, C) as ``[MP, CP]``, 0 where padded."""
    m = tl.arange(0, MP)[:, None]
    c = tl.arange(0, CP)[None, :]
    return tl.load(ptr + m * C + c, mask=(m < M) & (c < C), other=0.0)


@triton.jit
def forward_kernel(
    x_ptr, gate_ptr, scale_ptr, shift_ptr, matrix_ptr, y_ptr, rows, x_row, gate_row, eps,
    C: tl.constexpr, M: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, GATED: tl.constexpr,
    MAPS: tl.constexpr
):  # fmt: skip
    """``y = matrix (norm(x) silu(gate))`` of ``P`` rows."""
    row = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    column = tl.arange(0, CP)
    out = tl.arange(0, MP)
    scale = tl.load(scale_ptr + column, mask=column < C, other=0.0)
    shift = tl.load(shift_ptr + column, mask=column < C, other=0.0)
    x, _, inside = _normalise(x_ptr, x_row, row, column, rows, eps, C, MAPS)
    z = x * scale[None, :] + shift[None, :]
    if GATED:
        gate = tl.load(gate_ptr + row[:, None] * gate_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
        z *= gate * tl.sigmoid(gate)
    matrix = tl.trans(_load_matrix(matrix_ptr, C, M, CP, MP))
    y = _dot(z, matrix, tl.zeros([P, MP], tl.float32), y_ptr.dtype.element_ty)
    tl.store(y_ptr + row[:, None] * M + out[None, :], y, mask=(row < rows)[:, None] & (out < M)[None, :])


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, gate_ptr, scale_ptr, shift_ptr, matrix_ptr, dx_ptr, dgate_ptr, part_ptr,
    rows, x_row, gate_row, eps,
    C: tl.constexpr, M: tl.constexpr, CP: tl.constexpr, MP: tl.constexpr, P: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """Gradients of x and gate, and the program's partial sums of those of matrix, scale and shift, in that order."""
    kind: tl.constexpr = dy_ptr.dtype.element_ty
    column = tl.arange(0, CP)
    out = tl.arange(0, MP)
    scale = tl.load(scale_ptr + column, mask=column < C, other=0.0)
    shift = tl.load(shift_ptr + column, mask=column < C, other=0.0)
    matrix = _load_matrix(matrix_ptr, C, M, CP, MP)
    dmatrix = tl.zeros([MP, CP], tl.float32)
    dscale = tl.zeros([P, CP], tl.float32)
    dshift = tl.zeros([P, CP], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, P), tl.num_programs(0)):
        row = (block * P + tl.arange(0, P)).to(tl.int64)
        x, rstd, inside = _normalise(x_ptr, x_row, row, column, rows, eps, C)
        n = x * scale[None, :] + shift[None, :]
        at = dy_ptr + row[:, None] * M + out[None, :]
        dy = tl.load(at, mask=(row < rows)[:, None] & (out < M)[None, :], other=0.0)
        dz = _dot(dy, matrix, tl.zeros([P, CP], tl.float32), kind)
        if GATED:
            gate = tl.load(gate_ptr + row[:, None] * gate_row + column[None, :], mask=inside, other=0.0).to(tl.float32)
            sigmoid = tl.sigmoid(gate)
            silu = gate * sigmoid
            dgate = dz * n * (sigmoid + silu * (1.0 - sigmoid))
            tl.store(dgate_ptr + row[:, None] * C + column[None, :], dgate, mask=inside)
            dmatrix = _dot(tl.trans(dy), n * silu, dmatrix, kind)
            dz *= silu
        else:
            dmatrix = _dot(tl.trans(dy), n, dmatrix, kind)
        dscale += dz * x
        dshift += dz
        dx = dz * scale[None, :]
        dx -= (tl.sum(dx, axis=1) / C)[:, None] + x * (tl.sum(dx * x, axis=1) / C)[:, None]
        tl.store(dx_ptr + row[:, None] * C + column[None, :], dx * rstd[:, None], mask=inside)
    part = part_ptr + tl.program_id(0) * ((M + 2) * C)
    known = (out < M)[:, None] & (column < C)[None, :]
    tl.store(part + out[:, None] * C + column[None, :], dmatrix, mask=known)
    tl.store(part + M * C + column, tl.sum(dscale, axis=0), mask=column < C)
    tl.store(part + (M + 1) * C + column, tl.sum(dshift, axis=0), mask=column < C)


def _constants(channels: int, outputs: int, gated: bool) -> dict[str, int]:
    CP, MP = (max(16, triton.next_power_of_2(n)) for n in (channels, outputs))  # what a tl.dot wants
    rows = min(64, VALUES // max(CP, MP))
    warps = 8 if CP * MP >= 2048 else 4
    return {"C": channels, "M": outputs, "CP": CP, "MP": MP, "P": rows, "GATED": gated, "num_warps": warps}


def _rows(x: Tensor) -> Tensor:
    """(..., c) as (rows, c) with adjacent channels."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


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
    """``matrix (norm(x) silu(gate))``.

    Args:
        x: (..., c), float16, bfloat16 or float32, c at most ``norm_linear.WIDEST_IN``.
        gate: (..., c) likewise, or None.
        scale: (c,) of the LayerNorm, float32.
        shift: (c,).
        eps: of the LayerNorm.
        matrix: (m, c), float32, contiguous, m at most ``norm_linear.WIDEST_OUT``.
        kind: type of the result and of the factors of the product.
        maps: with more than one, x is (maps, ..., c), and their sum is meant.

    Returns:
        (..., m), contiguous.
    """
    outputs, channels = matrix.shape
    y = x.new_empty(*x.shape[maps > 1 : -1], outputs, dtype=kind)
    x = _rows(x)
    rows = len(x) // maps
    gates = x if gate is None else _rows(gate)
    constants = _constants(channels, outputs, gate is not None)
    if constants["CP"] * constants["MP"] <= 512:
        constants["num_warps"] = 1  # measured: what rows have to share is little
    with torch.cuda.device_of(x):
        forward_kernel[(ceil_div(rows, constants["P"]),)](
            x, gates, scale, shift, matrix, y, rows, x.stride(0), gates.stride(0), eps, **constants, MAPS=maps
        )
    return y


def norm_linear_backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float, matrix: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients of ``norm_linear_forward`` for contiguous ``dy`` (..., m).

    Returns:
        Of x and gate, of their types and contiguous; of scale, shift and matrix, in float32.
    """
    outputs, channels = matrix.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dgate = None if gate is None else torch.empty_like(gate, memory_format=torch.contiguous_format)
    x = _rows(x)
    gates = x if gate is None else _rows(gate)
    constants = _constants(channels, outputs, gate is not None)
    programs = programs_at_once(x, PROGRAMS if constants["num_warps"] == 4 else 1)
    programs = min(programs, ceil_div(len(x), constants["P"]))
    parts = x.new_empty(programs, outputs + 2, channels, dtype=torch.float32)
    with torch.cuda.device_of(x):
        backward_kernel[(programs,)](
            dy, x, gates, scale, shift, matrix, dx, dx if dgate is None else dgate, parts,
            len(x), x.stride(0), gates.stride(0), eps, **constants
        )  # fmt: skip
    total = parts.sum(0)
    return dx, dgate, total[-2].clone(), total[-1].clone(), total[:-2].clone()
