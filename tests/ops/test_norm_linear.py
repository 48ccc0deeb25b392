"""LayerNorm, gate and linear map in one kernel against PyTorch's own."""

from collections.abc import Callable

import pytest
import torch
from tolerances import GRADIENT, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops.norm_linear import norm_linear, norm_linear_halves

SHAPES = [(1, 1, 1, 4), (3, 5, 13, 6), (2, 8, 8, 8), (1, 130, 64), (2, 7, 300), (2, 2100, 4), (0, 3, 8)]


def case(shape: tuple[int, ...], kind: torch.dtype) -> tuple[Tensor, Tensor, nn.LayerNorm, nn.Linear]:
    """x, a gate that is half of a wider map, and layers."""
    torch.manual_seed(0)
    channels = shape[-1]
    norm, linear = nn.LayerNorm(channels, dtype=kind), nn.Linear(channels, 2 * channels, bias=False, dtype=kind)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + 5 * torch.randn(shape, dtype=kind)).requires_grad_()
    gate = (10 * torch.randn(*shape[:-1], 2 * channels, dtype=kind)).requires_grad_()
    return x, gate, norm, linear


def by_pytorch(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear, gate: Tensor | None) -> Tensor:
    return linear(norm(x) if gate is None else norm(x) * F.silu(gate))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_kernel_equals_pytorch(shape: tuple[int, ...], gated: bool) -> None:
    x, gate, norm, linear = case(shape, torch.float32)
    gate = gate[..., shape[-1] :] if gated else None
    with torch.inference_mode():
        y = norm_linear(x, norm, linear, gate)
        halves = norm_linear_halves(x, norm, linear)
        plain = by_pytorch(x.double(), norm.double(), linear.double(), None)
        expected = by_pytorch(x.double(), norm, linear, gate if gate is None else gate.double())
    torch.testing.assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat(halves, -1), plain.float(), rtol=1e-5, atol=1e-5)
    assert all(half.is_contiguous() for half in halves)


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Of a weighted sum whose weights lie in memory in another order than y."""
    torch.manual_seed(1)
    return torch.autograd.grad(y, of, torch.randn(y.mT.shape, dtype=torch.float64).to(y.dtype).mT)


@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_equal_pytorchs(shape: tuple[int, ...], gated: bool, kind: torch.dtype) -> None:
    def results(call: Callable[..., Tensor], kind: torch.dtype) -> tuple[Tensor, ...]:
        x, gate, norm, linear = case(shape, torch.float32)  # the same numbers for every type
        x, gate = (m.detach().to(kind).requires_grad_() for m in (x, gate))
        norm, linear = norm.to(kind), linear.to(kind)
        y = call(x, norm, linear, gate[..., shape[-1] :] if gated else None)
        return gradients(y, x, norm.weight, norm.bias, linear.weight, *([gate] if gated else []))

    ours, theirs = results(norm_linear, kind), results(by_pytorch, torch.float64)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine, other) <= GRADIENT[kind]


def test_gradients_of_one_half() -> None:
    x, _, norm, linear = case((2, 70, 6), torch.float64)
    parameters = x, norm.weight, norm.bias, linear.weight
    ours = gradients(norm_linear_halves(x, norm, linear)[1], *parameters)
    theirs = gradients(by_pytorch(x, norm, linear, None)[..., 6:], *parameters)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_gradients_do_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, norm, linear = case((3, 5000, 4), torch.float32)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        y = norm_linear(x, norm, linear, gate[..., :4])
        results.append(gradients(y, x, gate, norm.weight, norm.bias, linear.weight))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("of_x", "of_norm", "of_linear"), [(8, 6, 8), (6, 6, 8), (8, 8, 6)])
def test_sizes_that_do_not_match_are_pytorchs_to_refuse(of_x: int, of_norm: int, of_linear: int) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        norm_linear(torch.zeros(3, of_x), nn.LayerNorm(of_norm), nn.Linear(of_linear, 4, bias=False))


@pytest.mark.parametrize("size", [(6,), (5, 6), (3, 5, 1)])
def test_a_gate_may_broadcast(size: tuple[int, ...]) -> None:
    x, _, norm, linear = case((3, 5, 6), torch.float64)
    gate = torch.randn(size, dtype=torch.float64)
    torch.testing.assert_close(norm_linear(x, norm, linear, gate), by_pytorch(x, norm, linear, gate))


def test_a_norm_may_have_no_parameters() -> None:
    x, _, _, linear = case((3, 8), torch.float64)
    norm = nn.LayerNorm(8, elementwise_affine=False)
    torch.testing.assert_close(norm_linear(x, norm, linear), linear(norm(x)))


def test_a_second_derivative_is_refused() -> None:
    x, _, norm, linear = case((2, 8), torch.float64)
    (dx,) = torch.autograd.grad(norm_linear(x, norm, linear).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


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
