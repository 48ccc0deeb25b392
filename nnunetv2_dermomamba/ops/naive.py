"""The selective scan as its definition reads: step by step, in any float type. For tests; far too slow for images.

Source: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, equations 2a, 2b and
algorithm 2; argument names as in mamba-ssm's ``selective_scan_ref``. With ``composed.selective_scan_2d_composed`` it is
the twin of the 2D scans too.
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
