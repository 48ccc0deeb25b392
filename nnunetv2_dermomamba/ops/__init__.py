"""The selective scan of Mamba networks in 1D and 2D, on CPU and GPU, without mamba-ssm.

``selective_scan`` has mamba-ssm's argument names; ``selective_scan_2d`` is the four-direction scan of a map with its
projections, which 2D Mamba networks call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backends import BACKENDS, ENVIRONMENT_VARIABLE, LOADED, choose_backend, describe_choice, why_not

__all__ = [
    "BACKENDS",
    "ENVIRONMENT_VARIABLE",
    "choose_backend",
    "describe_choice",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_2d_maps",
    "why_not",
]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Selective scan of sequences: ``h_t = exp(delta_t A) h_(t-1) + delta_t B_t u_t``, ``y_t = <C_t, h_t> + D u_t``.

    Source: Gu and Dao, "Mamba", 2023; argument names as in mamba-ssm. Computes in float32 (float64 for float64 ``u`` on
    backends that can) whatever the input types.

    Args:
        u: (batch, dim, length), float16, bfloat16, float32 or float64.
        delta: (batch, dim, length), step sizes before bias and softplus.
        A: (dim, state), real; float32.
        B: (batch, groups, state, length) or (batch, state, length); channels fall into ``groups`` equal runs.
        C: as ``B``.
        D: (dim,) or None.
        delta_bias: (dim,) or None.
        delta_softplus: whether softplus follows the bias.
        backend: name of a backend; None chooses automatically (see ``backends``).

    Returns:
        (batch, dim, length) float32 (float64 for float64 input).

    Raises:
        ValueError: shapes do not fit, or the backend is unknown.
        RuntimeError: the requested backend cannot serve.
    """
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    batch, dim, length = u.shape
    groups, state = B.shape[1:3]
    if delta.shape != u.shape or A.shape != (dim, state) or B.shape != C.shape or dim % groups:
        raise ValueError(
            f"selective_scan: u {tuple(u.shape)}, delta {tuple(delta.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, "
            f"C {tuple(C.shape)} do not fit; expected (batch, dim, length) twice, (dim, state) and "
            "(batch, groups, state, length) twice, with dim a multiple of groups"
        )
    if B.shape != (batch, groups, state, length):
        raise ValueError(f"selective_scan: B {tuple(B.shape)} does not fit u {tuple(u.shape)}")
    if any(vector is not None and vector.shape != (dim,) for vector in (D, delta_bias)):
        raise ValueError(f"selective_scan: D and delta_bias must have the shape ({dim},) of u's channels")
    scan = LOADED[choose_backend(u.device.type, u.dtype, backend)].scan_1d
    u, delta, A, B, C = (m.contiguous() for m in (u, delta, A, B, C))
    return scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def selective_scan_2d(
    x: Tensor,
    x_proj_weight: Tensor,
    dt_projs_weight: Tensor,
    dt_projs_bias: Tensor,
    A: Tensor,
    Ds: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Four-direction selective scan of a map with its dt, B and C projections (VMamba's SS2D core).

    Per direction k: ``dt, B, C = x_proj_weight[k] x``, ``delta = softplus(dt_projs_weight[k] dt + dt_projs_bias[k])``,
    then the scan of ``selective_scan`` in that direction's order; the four results are added. Computes in float32
    (float64 for float64 ``x`` on backends that can).

    Args:
        x: (B, H, W, d) map, channels last, float16, bfloat16, float32 or float64.
        x_proj_weight: (4, R + 2 N, d): rows give dt (R), B (N) and C (N).
        dt_projs_weight: (4, d, R).
        dt_projs_bias: (4, d).
        A: (4 d, N), negative.
        Ds: (4 d,).
        backend: name of a backend; None chooses automatically (see ``backends``).

    Returns:
        (B, H, W, d) float32 (float64 for float64 input).

    Raises:
        ValueError: shapes do not fit, or the backend is unknown.
        RuntimeError: the requested backend cannot serve.
    """
    _check_2d(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    scan = LOADED[choose_backend(x.device.type, x.dtype, backend)].scan_2d
    return scan(x.contiguous(), x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)


def selective_scan_2d_maps(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> Tensor:
    """Maps whose sum is ``selective_scan_2d``'s: in inference by the CUDA kernels four, else one.

    Returns:
        (4 or 1, B, H, W, d), for ``norm_linear`` to add.
    """
    apart = LOADED[choose_backend(x.device.type, x.dtype)].directions_2d
    if apart is None or torch.is_grad_enabled():
        return selective_scan_2d(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)[None]
    _check_2d(x, x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)
    return apart(x.contiguous(), x_proj_weight, dt_projs_weight, dt_projs_bias, A, Ds)


def _check_2d(
    x: Tensor, x_proj_weight: Tensor, dt_projs_weight: Tensor, dt_projs_bias: Tensor, A: Tensor, Ds: Tensor
) -> None:
    dim, state, rank = x.shape[-1], A.shape[1], dt_projs_weight.shape[-1]
    if (
        x.ndim != 4
        or x_proj_weight.shape != (4, rank + 2 * state, dim)
        or dt_projs_weight.shape != (4, dim, rank)
        or dt_projs_bias.shape != (4, dim)
        or A.shape != (4 * dim, state)
        or Ds.shape != (4 * dim,)
    ):
        raise ValueError(
            f"selective_scan_2d: x {tuple(x.shape)}, x_proj_weight {tuple(x_proj_weight.shape)}, dt_projs_weight "
            f"{tuple(dt_projs_weight.shape)}, dt_projs_bias {tuple(dt_projs_bias.shape)}, A {tuple(A.shape)}, Ds "
            f"{tuple(Ds.shape)} do not fit; expected (B, H, W, d), (4, R + 2 N, d), (4, d, R), (4, d), (4 d, N), (4 d,)"
        )
