"""The selective scan as its definition reads: step by step, in any float type. For tests; far too slow for images.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, equations 2a, 2b and
algorithm 2; argument names as in mamba-ssm's ``selective_scan_ref``. The four directions are VMamba's (Liu et al., 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_naive(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t``, ``y_t = <C_t, h_t> + D u_t``, one step at a time.

    Args:
        u: (batch, dim, length).
        delta: (batch, dim, length), the step sizes before bias and softplus.
        A: (dim, state).
        B: (batch, groups, state, length) or (batch, state, length); channels fall into ``groups`` equal runs.
        C: as ``B``.
        D: (dim,) or None.
        delta_bias: (dim,) or None.
        delta_softplus: whether ``softplus`` follows the bias.

    Returns:
        (batch, dim, length), in the type of ``u``.
    """
    dim, length = u.shape[1:]
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.logaddexp(delta, torch.zeros_like(delta))
    B, C = (m[:, None] if m.ndim == 3 else m for m in (B, C))
    B, C = (m.repeat_interleave(dim // m.shape[1], dim=1) for m in (B, C))
    h = u.new_zeros(u.shape[0], dim, A.shape[1])
    ys = []
    for t in range(length):
        h = torch.exp(delta[:, :, t, None] * A) * h + delta[:, :, t, None] * B[..., t] * u[:, :, t, None]
        ys.append((h * C[..., t]).sum(-1))
    y = torch.stack(ys, dim=2)
    return y if D is None else y + D[:, None] * u


def cross_scan(x: Tensor) -> Tensor:
    """(B, H, W, d) -> (B, 4, d, H W): row-major, column-major, and both reversed."""
    row = x.permute(0, 3, 1, 2).flatten(2)
    column = x.permute(0, 3, 2, 1).flatten(2)
    forward = torch.stack([row, column], dim=1)
    return torch.cat([forward, forward.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, d, H W) -> (B, H, W, d): undo ``cross_scan``'s orders and add the four directions."""
    row, column = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return row.unflatten(2, (height, width)).permute(0, 2, 3, 1) + column.unflatten(2, (width, height)).permute(0, 3, 2, 1)


def selective_scan_2d_naive(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> Tensor:
    """Four-direction selective scan of a map with its dt, B and C projections, through ``selective_scan_naive``.

    Args:
        x: (B, H, W, d) map, channels last.
        x_proj_weight: (4, R + 2 N, d): rows give dt (R), B (N) and C (N) of each direction.
        dt_projs_weight: (4, d, R) lifts dt to the channels.
        dt_projs_bias: (4, d), added before the softplus.
        A: (4 d, N), negative.
        Ds: (4 d,).

    Returns:
        (B, H, W, d), the sum of the four directions.
    """
    height, width = x.shape[1:3]
    state, rank = A.shape[1], dt_projs_weight.shape[2]
    xs = cross_scan(x)
    dt, B, C = torch.einsum("bkdl,kcd->bkcl", xs, x_proj_weight).split([rank, state, state], dim=2)
    delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_projs_weight)
    y = selective_scan_naive(xs.flatten(1, 2), delta.flatten(1, 2), A, B, C, Ds, dt_projs_bias.flatten(), True)
    return cross_merge(y.unflatten(1, xs.shape[1:3]), height, width)
