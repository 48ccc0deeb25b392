"""The selective scan in plain PyTorch, for devices without a kernel (MPS, XPU) and as the portable reference.

The sequence is walked slab by slab. Within a slab, ``CHUNK`` steps run one after another, each for all of the slab's
chunks at once: first from zero states, which gives what every chunk adds; then a scan over the few chunks gives their
true start states; then again from those. The backward pass recomputes one slab at a time.

Memory bound: about six tensors of ``batch x dim x SLAB x state`` floats, whatever the length (268 MB each for a batch
of 16, 64 channels and 16 states); forward alone needs ``CHUNK`` times less.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .library import accumulation_type

CHUNK = 64
SLAB = 4096


def _walk(decay_log: Tensor, drive: Tensor, C: Tensor | None, h: Tensor) -> tuple[Tensor | None, Tensor]:
    """``CHUNK`` steps for all chunks at once: tensors (batch, dim, chunks, CHUNK, N), states without CHUNK."""
    ys = []
    for t in range(drive.shape[3]):
        h = torch.exp(decay_log[..., t, :]) * h + drive[..., t, :]
        if C is not None:
            ys.append((h * C[..., t, :]).sum(-1))
    return (torch.stack(ys, dim=3) if C is not None else None), h


def _slab(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """One slab from its start state ``h`` (batch, dim, N): y (batch, dim, length) and the end state."""
    length, groups = u.shape[2], B.shape[1]
    padding = -length % CHUNK  # padded steps have delta = 0: decay 1, drive 0, so the end state is right

    def chunked(m: Tensor) -> Tensor:
        return F.pad(m, (0, padding)).unflatten(-1, (-1, CHUNK))

    B, C = (chunked(m).permute(0, 1, 3, 4, 2).repeat_interleave(u.shape[1] // groups, dim=1) for m in (B, C))
    delta = chunked(delta)[..., None]
    decay_log = delta * A[:, None, None, :]
    drive = delta * chunked(u)[..., None] * B
    _, ends = _walk(decay_log, drive, None, torch.zeros_like(drive[..., 0, :]))
    whole = torch.exp(decay_log.sum(3))
    starts = []
    for chunk in range(ends.shape[2]):
        starts.append(h)
        h = whole[:, :, chunk] * h + ends[:, :, chunk]
    y, _ = _walk(decay_log, drive, C, torch.stack(starts, dim=2))
    assert y is not None
    return y.flatten(2)[..., :length], h


def _step_sizes(delta: Tensor, delta_bias: Tensor | None, delta_softplus: bool) -> Tensor:
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    return torch.logaddexp(delta, torch.zeros_like(delta)) if delta_softplus else delta


def scan_1d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """1D scan; arguments as ``naive.selective_scan_naive`` with B and C (batch, groups, state, length).

    Differentiable by PyTorch's own autograd, one slab at a time through checkpointing.
    """
    kind = accumulation_type(u)
    u, delta, B, C = (m.to(kind) for m in (u, delta, B, C))
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for start in range(0, u.shape[2], SLAB):
        part = slice(start, start + SLAB)
        step = _step_sizes(delta[..., part], delta_bias, delta_softplus)
        arguments = (u[..., part], step, A, B[..., part], C[..., part], h)
        y, h = checkpoint(_slab, *arguments, use_reentrant=False) if torch.is_grad_enabled() else _slab(*arguments)
        ys.append(y if D is None else y + D[:, None] * u[..., part])
    return torch.cat(ys, dim=2)
