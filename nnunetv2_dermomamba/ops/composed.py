"""The 2D scan composed of copies, projections and a 1D scan: what a fused backend must equal.

The four directions are VMamba's (Liu et al., "VMamba: Visual State Space Model", 2024): row-major, column-major, and
both reversed. Writes every direction's copy, B, C and dt to memory; backends with only a 1D kernel are served this way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .naive import selective_scan_naive


def cross_scan(x: Tensor) -> Tensor:
    """(B, H, W, d) -> (B, 4, d, H W): row-major, column-major, and both reversed."""
    row = x.permute(0, 3, 1, 2).flatten(2)
    column = x.permute(0, 3, 2, 1).flatten(2)
    forward = torch.stack([row, column], dim=1)
    return torch.cat([forward, forward.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """(B, 4, d, H W) -> (B, H, W, d): undo ``cross_scan``'s orders and add the four directions."""
    row, column = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return row.unflatten(2, (height, width)).permute(0, 2, 3, 1) + column.unflatten(2, (width, height)).permute(
        0, 3, 2, 1
    )


def selective_scan_2d_composed(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    scan: Callable[..., Tensor] = selective_scan_naive,
) -> Tensor:
    """Four-direction selective scan of a map with its dt, B and C projections, from a 1D scan.

    Args:
        x: (B, H, W, d) map, channels last.
        x_proj_weight: (4, R + 2 N, d): rows give dt (R), B (N) and C (N) of each direction.
        dt_projs_weight: (4, d, R) lifts dt to the channels.
        dt_projs_bias: (4, d), added before the softplus.
        A: (4 d, N), negative.
        Ds: (4 d,).
        scan: the 1D scan, with the signature of ``selective_scan_naive``.

    Returns:
        (B, H, W, d), the sum of the four directions.
    """
    height, width = x.shape[1:3]
    state, rank = A.shape[1], dt_projs_weight.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        xs = cross_scan(x.to(torch.promote_types(x.dtype, torch.float32)))
        dt, B, C = torch.einsum("bkdl,kcd->bkcl", xs, x_proj_weight).split([rank, state, state], dim=2)
        delta = torch.einsum("bkrl,kdr->bkdl", dt, dt_projs_weight)
        y = scan(xs.flatten(1, 2), delta.flatten(1, 2), A, B, C, Ds, dt_projs_bias.flatten(), True)
        return cross_merge(y.unflatten(1, xs.shape[1:3]), height, width)
