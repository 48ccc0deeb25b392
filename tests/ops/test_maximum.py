"""The maximum with a gradient of its own against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from triton_interpreter import interpreted_without_gpu

from nnunetv2_dermomamba.ops.maximum import maximum

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def draw(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=dtype).requires_grad_()


@pytest.mark.parametrize("dim", [1, 2, 3, -1])
def test_equals_pytorchs_own(dim):
    x, other = draw(), draw()
    result, expected = maximum(x, dim), other.max(dim).values
    assert torch.equal(result, expected)
    weight = torch.randn_like(expected)
    (result * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(x.grad, other.grad)


def test_gradient_of_equal_values_goes_to_one_of_them():
    x = torch.ones(2, 4, 3, requires_grad=True)
    maximum(x, 1).sum().backward()
    assert torch.equal(x.grad.sum(1), torch.ones(2, 3))
    assert set(x.grad.unique().tolist()) == {0, 1}


def test_without_gradient_it_is_amax():
    x = draw(torch.float16).detach()
    assert torch.equal(maximum(x, 1), x.amax(1))


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_is_a_proper_operator(dtype, dim):
    torch.library.opcheck(torch.ops.dermomamba.maximum.default, (draw(dtype), dim))


def test_compiled_along_rows_it_is_the_same():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: maximum(x * 2.0, 3), backend="aot_eager", fullgraph=True)
    x, other = draw(torch.float32), draw(torch.float32)
    with torch.no_grad():
        x[0, 0, 0, :2] = other[0, 0, 0, :2] = 9.0  # the first of two
    result, expected = compiled(x), maximum(other * 2.0, 3)
    assert torch.equal(result, expected)
    weight = torch.randn_like(expected)
    (result * weight).sum().backward()
    (expected * weight).sum().backward()
    assert torch.equal(x.grad, other.grad)


@interpreted_without_gpu
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((3, 700, 5), 1), ((2, 9000, 70), 1), ((1, 1, 3), 1), ((5, 33), 1), ((2, 3, 5, 16), 3), ((7, 512), 1)],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kernels_equal_pytorchs_own(shape, dim, dtype):
    pytest.importorskip("triton")
    from nnunetv2_dermomamba.ops.triton_maximum import maximum_along

    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    values, indices = maximum_along(x, dim)
    assert torch.equal(values, x.amax(dim))
    assert torch.equal(x.gather(dim, indices.long().unsqueeze(dim)).squeeze(dim), values)
    indices = maximum_along(torch.zeros_like(x), dim)[1]  # of equal ones the first
    assert not indices.any()
    assert not maximum_along(torch.full_like(x, float("-inf")), dim)[1].any()
