"""InstanceNorm, leaky ReLU and residual in one kernel against PyTorch's own."""

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import instance_norm
from nnunetv2_dermomamba.ops.instance_norm import instance_norm_leaky_add

SHAPES = [(1, 16, 20, 30), (3, 5, 7, 13), (5, 8, 1, 2), (1, 3, 100, 1), (2, 16, 130, 140)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def case(shape: tuple[int, ...], layout: torch.memory_format) -> list[Tensor]:
    """x, the norm's weight and bias, other and factor."""
    torch.manual_seed(0)
    x, other = ((30 + torch.randn(shape)).contiguous(memory_format=layout) for _ in range(2))
    return [x, torch.randn(shape[1]), torch.randn(shape[1]), other, torch.tensor([1.3])]


def by_kernel(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    norm = nn.InstanceNorm2d(x.shape[1], affine=True)
    del norm.weight, norm.bias  # or they could be parameters only, which have no gradients of their own
    norm.weight, norm.bias = weight, bias
    return instance_norm_leaky_add(x, norm, 0.01, other, factor)


def by_pytorch(x: Tensor, weight: Tensor, bias: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return factor * other + F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias), 0.01)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_kernel_equals_pytorch(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    inputs = case(shape, layout)
    with torch.inference_mode():
        y, expected = by_kernel(*inputs), by_pytorch(*(m.double() for m in inputs))
    assert relative_error(y, expected) < FORWARD[torch.float32]


# Of two positions, whose normalised values are 1 and -1, gradients cancel: PyTorch's own float32 is off by 1e-4.
@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("shape", [(5, 8, 1, 4) if shape[2:] == (1, 2) else shape for shape in SHAPES])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_pytorchs(shape: tuple[int, ...], layout: torch.memory_format, kind: torch.dtype) -> None:
    results = []
    for function, of in ((by_kernel, kind), (by_pytorch, torch.float64)):
        inputs = [m.to(of).requires_grad_() for m in case(shape, layout)]
        y = function(*inputs)
        torch.manual_seed(1)
        results.append(torch.autograd.grad(y, inputs, torch.randn(shape, dtype=torch.float64).to(of)))
    for mine, other in zip(*results, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine, other) < GRADIENT[kind]


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
