# mypy: disable-error-code="no-untyped-def"
"""What the two Triton scans of a map share: paths, projections' products and the weights that they multiply by.

The low-rank dt projection is folded outside, ``W_delta = dt_projs_weight @ x_proj_weight[:R]``: at the ranks in use
(R = ceil(d / 32)) one dense product of d x d is as cheap as two thin ones padded to the tensor cores' size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SMALL = 2**20
"""Below this many positions a float32 product with a reciprocal that is off by 2 ulp, rounded down, is exact."""


@triton.jit
def map_position(path, height, width, column, IS_SMALL: tl.constexpr):
    """Position in the row-major map of the ``path``-th cell of the row-major, or (``column`` 1) column-major, path."""
    if IS_SMALL:  # noqa: SIM108
        across = ((path.to(tl.float32) + 0.5) * (1.0 / height)).to(tl.int32)
    else:
        across = path // height
    transposed = (path - across * height) * width + across
    return tl.where(column > 0, transposed, path)


@triton.jit
def load_map(ptr, position, valid, col, d: tl.constexpr):
    """Channels ``col`` of the map's positions in float32, 0 where there are none."""
    mask = valid[:, None] & (col < d)[None, :]
    return tl.load(ptr + position[:, None] * d + col[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_turned(ptr, first, ROWS: tl.constexpr, KD: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns ``first ... first + COLUMNS`` of the weights' first ``ROWS`` rows, turned: ``[COLUMNS, ROWS]``."""
    return tl.load(ptr + tl.arange(0, ROWS)[None, :] * KD + (first + tl.arange(0, COLUMNS))[:, None])


@triton.jit
def _high(a, EXACT: tl.constexpr):
    """The part of ``a`` that a tf32 product takes in whole."""
    return a if EXACT else (a.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def dot(a, b, acc, A_EXACT: tl.constexpr = False, B_EXACT: tl.constexpr = False):
    """``a b + acc`` to float32's precision from three tf32 products; ``tf32x3`` spends more on NaN than on products.

    A factor that came in half precision is EXACT: tf32 holds it in whole, and one product less is the same result.
    """
    a_high = _high(a, A_EXACT)
    b_high = _high(b, B_EXACT)
    if not A_EXACT:
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
    if not B_EXACT:
        acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
    return tl.dot(a_high, b_high, acc, input_precision="tf32")


def fold(x_proj_weight: Tensor, dt_projs_weight: Tensor, KD: int, NP: int) -> Tensor:
    """(4, KD + 2 NP, KD): rows of W_delta, B and C, zero-padded. Summed by elements: TF32 settings do not touch it."""
    d, rank = dt_projs_weight.shape[1:]
    state = (x_proj_weight.shape[1] - rank) // 2
    weight = x_proj_weight.new_zeros(4, KD + 2 * NP, KD)
    weight[:, :d, :d] = (dt_projs_weight[..., None] * x_proj_weight[:, None, :rank]).sum(2)
    weight[:, KD : KD + state, :d] = x_proj_weight[:, rank : rank + state]
    weight[:, KD + NP : KD + NP + state, :d] = x_proj_weight[:, rank + state :]
    return weight


def unfold(dweight: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, KD: int, NP: int) -> tuple[Tensor, Tensor]:
    """Gradients of x_proj_weight and dt_projs_weight from that of their ``fold``, (4, KD + 2 NP, KD)."""
    d, rank = dt_projs_weight.shape[1:]
    state = (x_proj_weight.shape[1] - rank) // 2
    dweight = dweight[:, :, :d]
    dfold = dweight[:, :d]
    dB = dweight[:, KD : KD + state]
    dC = dweight[:, KD + NP : KD + NP + state]
    ddt = (dfold[:, :, None] * dt_projs_weight[..., None]).sum(1)
    dlift = (dfold[:, :, None] * x_proj_weight[:, None, :rank]).sum(3)
    return torch.cat([ddt, dB, dC], dim=1), dlift
