"""InstanceNorm, leaky ReLU and residual in one kernel against PyTorch's own."""

import pytest
import torch
from tolerances import FORWARD, relative_error
from torch import nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import instance_norm
from nnunetv2_dermomamba.ops.instance_norm import instance_norm_leaky_add


@pytest.mark.parametrize("shape", [(1, 16, 20, 30), (3, 5, 7, 13), (5, 8, 1, 2), (1, 3, 100, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_kernel_equals_pytorch_and_only_serves_inference(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(shape[1], affine=True)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x, other = ((30 + torch.randn(shape)).contiguous(memory_format=layout) for _ in range(2))
    factor = torch.tensor([1.3])
    expected = 1.3 * other.double() + F.leaky_relu(norm.double()(x.double()), 0.01)
    norm = norm.float()
    assert instance_norm_leaky_add(x.clone(), norm, 0.01, other, factor).requires_grad
    with torch.inference_mode():
        assert relative_error(instance_norm_leaky_add(x, norm, 0.01, other, factor), expected) < FORWARD[torch.float32]


def test_nan_stays() -> None:
    x = torch.zeros(2, 8, 5, 5)
    x[1, 3, 2, 2] = float("nan")
    with torch.no_grad():
        y = instance_norm_leaky_add(x, nn.InstanceNorm2d(8, affine=True), 0.01, torch.zeros_like(x), torch.ones(1))
    assert y[1, 3].isnan().all()
    assert y.isnan().sum() == 25


def test_the_leaky_relu_of_compiled_training_is_pytorch_s() -> None:
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-7, 3.0, float("nan")], dtype=torch.float64, requires_grad=True)
    dy = torch.arange(1.0, 7.0, dtype=torch.float64)
    (expected, gradient), (result, own) = (
        (y, torch.autograd.grad(y, x, dy)[0]) for y in (F.leaky_relu(x, 0.01), instance_norm._LeakyReLU.apply(x, 0.01))
    )
    torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(own, gradient)
