"""SS2D, the 2D selective-scan layer, and the VSS block around it (Liu et al., "VMamba", 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nnunetv2_dermomamba.ops import selective_scan_2d_maps
from nnunetv2_dermomamba.ops.depthwise import DepthwiseConv2d
from nnunetv2_dermomamba.ops.depthwise_silu import depthwise_silu
from nnunetv2_dermomamba.ops.fused_depthwise import taps_of
from nnunetv2_dermomamba.ops.norm_linear import norm_linear, norm_linear_halves
from nnunetv2_dermomamba.ops.recompute import recompute
from nnunetv2_dermomamba.ops.side_by_side import serves, ss2d_side_by_side

STATE = 16
"""States per channel, N (VMamba's default)."""
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
"""Initial step sizes are log-uniform between the first two and not below the third (Mamba's defaults)."""


class SS2D(nn.Module):
    """Four-direction selective scan between two projections, gated.

    The scan's own parameters (``A_logs``, ``Ds``, ``dt_projs_weight``, ``dt_projs_bias``) are initialised here and are
    not to be reset by a generic initialiser; ``A_logs`` and ``Ds`` take no weight decay.

    Args:
        dim: channels c; the scan runs on d = 2 c channels with a dt rank of R = ceil(c / 16).

    Shape:
        (B, H, W, c) to (B, H, W, c), channels last.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = DepthwiseConv2d(inner, (3, 3))
        projections = [nn.Linear(inner, rank + 2 * STATE, bias=False).weight for _ in range(4)]
        self.x_proj_weight = nn.Parameter(torch.stack([weight.detach() for weight in projections]))
        self.dt_projs_weight = nn.Parameter(torch.empty(4, inner, rank).uniform_(-(rank**-0.5), rank**-0.5))
        dt = torch.exp(torch.empty(4, inner).uniform_(math.log(DT_MIN), math.log(DT_MAX))).clamp(min=DT_FLOOR)
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_logs = nn.Parameter(torch.arange(1.0, STATE + 1).log().repeat(4 * inner, 1))
        self.Ds = nn.Parameter(torch.ones(4 * inner))
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor, norm: nn.LayerNorm | None = None) -> Tensor:
        """``norm``, if any, comes first."""
        return recompute(lambda x: self._forward(x, norm), x)

    def _forward(self, x: Tensor, norm: nn.LayerNorm | None) -> Tensor:
        x, gate = self.in_proj(x).chunk(2, dim=-1) if norm is None else norm_linear_halves(x, norm, self.in_proj)
        y = selective_scan_2d_maps(depthwise_silu(x, self.conv), *self._scan_parameters())
        return norm_linear(y, self.out_norm, self.out_proj, gate, summed=True)

    def _scan_parameters(self) -> tuple[Tensor, ...]:
        A = -torch.exp(self.A_logs.float())
        return self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, A, self.Ds

    def operands(self, x: Tensor) -> list[Tensor]:
        """What ``ss2d_side_by_side`` takes."""
        maps = self.in_proj(x).chunk(2, dim=-1)
        of_output = self.out_norm.weight, self.out_norm.bias, self.out_proj.weight
        return [*maps, taps_of([self.conv]), *self._scan_parameters(), *(m.float() for m in of_output)]


def side_by_side(layers: Sequence[SS2D], maps: Sequence[Tensor]) -> list[Tensor]:
    """Of each layer what it makes of its map; in inference by CUDA kernels all at once."""
    if not serves(maps[0], [layer.conv.in_channels for layer in layers]):
        return [layer(x) for layer, x in zip(layers, maps, strict=True)]
    operands = [m for layer, x in zip(layers, maps, strict=True) for m in layer.operands(x)]
    return ss2d_side_by_side(operands, [layer.out_norm.eps for layer in layers])


class VSSBlock(nn.Module):
    """``x + SS2D(LayerNorm(x))``, channels last; no drop path.

    Shape:
        (B, H, W, dim) to (B, H, W, dim).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.ss2d = SS2D(dim)

    def forward(self, x: Tensor) -> Tensor:  # noqa: D102
        return x + self.ss2d(x, self.norm)
