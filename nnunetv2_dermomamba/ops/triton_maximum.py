# mypy: disable-error-code="no-untyped-def"
"""Triton kernels of the maximum along an axis: PyTorch's are slow where few channels are adjacent in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_common import ceil_div

VALUES = 4096  # of a program at once
COLUMNS = 64  # of a program where another axis is adjacent in memory
PROGRAMS = 1024  # about: enough to fill a GPU
FAR = tl.constexpr(2**31 - 1)


@triton.jit
def row_kernel(x_ptr, value_ptr, index_ptr, rows, n, P: tl.constexpr, N: tl.constexpr):
    """Of rows of ``n`` adjacent values."""
    row = (tl.program_id(0) * P + tl.arange(0, P)).to(tl.int64)
    column = tl.arange(0, N)
    inside = (row < rows)[:, None] & (column < n)[None, :]
    x = tl.load(x_ptr + row[:, None] * n + column[None, :], mask=inside, other=float("-inf")).to(tl.float32)
    value = tl.max(x, axis=1)
    index = tl.min(tl.where((x == value[:, None]) & (column < n)[None, :], column[None, :], FAR), axis=1)
    tl.store(value_ptr + row, value, mask=row < rows)
    tl.store(index_ptr + row, tl.minimum(index, n - 1), mask=row < rows)


@triton.jit
def column_kernel(
    x_ptr, from_ptr, value_ptr, index_ptr, n, share, columns,
    HAS_INDEX: tl.constexpr, P: tl.constexpr, C: tl.constexpr
):  # fmt: skip
    """Of (outer, n, columns) over n, a program ``share`` of them: (outer, programs, columns).

    HAS_INDEX: where a value comes from is in ``from_ptr``; else it is its number.
    """
    outer = tl.program_id(0).to(tl.int64)
    column = tl.program_id(2) * C + tl.arange(0, C)
    first = tl.program_id(1) * share
    best = tl.full([P, C], float("-inf"), tl.float32)
    index = tl.full([P, C], 0, tl.int32) + first
    for start in range(first, first + share, P):
        row = start + tl.arange(0, P)
        inside = ((row < n) & (row < first + share))[:, None] & (column < columns)[None, :]
        at = outer * n * columns + row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=float("-inf")).to(tl.float32)
        origin = (
            tl.load(from_ptr + at, mask=inside, other=0) if HAS_INDEX else row[:, None] + tl.zeros([P, C], tl.int32)
        )
        better = x > best
        best = tl.where(better, x, best)
        index = tl.where(better, origin, index)
    value = tl.max(best, axis=0)
    index = tl.min(tl.where(best == value[None, :], index, FAR), axis=0)
    at = (outer * tl.num_programs(1) + tl.program_id(1)) * columns + column
    tl.store(value_ptr + at, value, mask=column < columns)
    tl.store(index_ptr + at, index, mask=column < columns)


def _of_rows(x: Tensor, rows: int, n: int, value: Tensor, index: Tensor) -> None:
    N = triton.next_power_of_2(n)
    P = max(1, VALUES // N)
    row_kernel[(ceil_div(rows, P),)](x, value, index, rows, n, P=P, N=N)


def _of_columns(x: Tensor, outer: int, n: int, columns: int, value: Tensor, index: Tensor) -> None:
    C = min(COLUMNS, triton.next_power_of_2(columns))
    P = VALUES // C
    blocks = ceil_div(columns, C)
    programs = max(1, min(ceil_div(n, P), PROGRAMS // (outer * blocks), P))
    share = ceil_div(n, programs)
    programs = ceil_div(n, share)
    if programs == 1:
        column_kernel[(outer, 1, blocks)](x, index, value, index, n, n, columns, HAS_INDEX=False, P=P, C=C)
        return
    values, indices = (m.new_empty(outer, programs, columns) for m in (value, index))
    column_kernel[(outer, programs, blocks)](x, indices, values, indices, n, share, columns, HAS_INDEX=False, P=P, C=C)
    column_kernel[(outer, 1, blocks)](
        values,
        indices,
        value,
        index,
        programs,
        programs,
        columns,
        HAS_INDEX=True,
        P=triton.next_power_of_2(programs),
        C=C,
    )


def maximum_along(x: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maxima of a contiguous tensor along ``dim``, and the first index of each as int32; a NaN is passed over."""
    n, outer = x.shape[dim], x.shape[:dim].numel()
    columns = x.shape[dim + 1 :].numel()
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    value, index = x.new_empty(shape), x.new_empty(shape, dtype=torch.int32)
    with torch.cuda.device_of(x):
        if columns == 1:
            _of_rows(x, outer, n, value, index)
        else:
            _of_columns(x, outer, n, columns, value, index)
    return value, index
