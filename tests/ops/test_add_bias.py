"""Bias of maps: its gradient by the sums of a CUDA kernel, on the GPU, elsewhere emulated."""

from __future__ import annotations

import shutil

import pytest
import torch
from tolerances import relative_error
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import add_bias as module
from nnunetv2_dermomamba.ops import cuda_channel_sums
from nnunetv2_dermomamba.ops.add_bias import add_bias

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")


@pytest.fixture(autouse=True)
def emulated_launches(emulate):
    emulate(cuda_channel_sums)


def inputs(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(3, 13, 11, 16, generator=generator).to(DEVICE, kind).permute(0, 3, 1, 2) for _ in range(2))
    return x.requires_grad_(), torch.randn(16, generator=generator).to(DEVICE).requires_grad_(), dy


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("served", [False, True])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_result_and_gradients(monkeypatch, kind, served, compiled) -> None:
    monkeypatch.setattr(module, "serves", lambda x: served)
    x, bias, dy = inputs(kind)
    y = (torch.compile(add_bias, backend="aot_eager", fullgraph=True) if compiled else add_bias)(x, bias)
    assert y.dtype == kind
    assert torch.equal(y, x + bias.to(kind)[:, None, None])
    dx, dbias = torch.autograd.grad(y, (x, bias), dy)
    assert torch.equal(dx, dy)
    assert dbias.dtype == torch.float32
    expected = dy.double().sum((0, 2, 3))
    assert relative_error(dbias, expected) < (1e-6 if served else 10 * torch.finfo(kind).eps)


def test_a_sum_beyond_float16_is_finite(monkeypatch) -> None:
    monkeypatch.setattr(module, "serves", lambda x: True)
    x, bias, dy = inputs(torch.float16)
    (dbias,) = torch.autograd.grad(add_bias(x, bias), (bias,), torch.full_like(dy, 1000))
    assert torch.equal(dbias, torch.full_like(bias, 429_000))


@pytest.mark.gpu
def test_compiled_on_a_gpu() -> None:
    x, bias, dy = inputs(torch.float16)
    y = torch.compile(lambda x, bias: F.gelu(add_bias(x, bias)))(x, bias)
    gradients = torch.autograd.grad(y, (x, bias), dy)
    wide = [m.detach().double().requires_grad_() for m in (x, bias)]
    expected = torch.autograd.grad(F.gelu(wide[0] + wide[1][:, None, None]), wide, dy.double())
    for gradient, reference in zip(gradients, expected, strict=True):
        assert relative_error(gradient, reference) < 2e-3
