"""LayerNorm, gate and linear map in one kernel against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops.norm_linear import norm_linear, norm_linear_halves


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (3, 5, 13, 6), (2, 8, 8, 8), (1, 130, 64), (2, 7, 300)])
@pytest.mark.parametrize("gated", [False, True])
def test_kernel_equals_pytorch_and_only_serves_inference(shape: tuple[int, ...], gated: bool) -> None:
    torch.manual_seed(0)
    channels = shape[-1]
    norm, linear = nn.LayerNorm(channels), nn.Linear(channels, 2 * channels, bias=False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = 3 + 5 * torch.randn(shape)
    gate = 10 * torch.randn(*shape[:-1], 2 * channels)[..., channels:] if gated else None
    normalised = norm.double()(x.double())
    expected = linear.double()(normalised if gate is None else normalised * F.silu(gate.double()))
    norm, linear = norm.float(), linear.float()
    with_gradients = norm_linear(x, norm, linear, gate)
    assert with_gradients.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(norm_linear(x, norm, linear, gate), expected.float(), rtol=1e-5, atol=1e-5)
        if gate is None:
            halves = norm_linear_halves(x, norm, linear)
            torch.testing.assert_close(torch.cat(halves, -1), expected.float(), rtol=1e-5, atol=1e-5)
            assert all(half.is_contiguous() for half in halves)


def test_nan_stays() -> None:
    x = torch.zeros(2, 70, 8)
    x[1, 3, 2] = float("nan")
    with torch.no_grad():
        y = norm_linear(x, nn.LayerNorm(8), nn.Linear(8, 4, bias=False))
    assert y[1, 3].isnan().all()
    assert y.isnan().sum() == 4


def test_several_maps_are_added_first():
    x, norm, linear = torch.randn(4, 2, 3, 8), nn.LayerNorm(8), nn.Linear(8, 4, bias=False)
    torch.testing.assert_close(norm_linear(x, norm, linear, summed=True), norm_linear(x.sum(0), norm, linear))
    torch.testing.assert_close(norm_linear(x[:1], norm, linear, summed=True), norm_linear(x[0], norm, linear))
