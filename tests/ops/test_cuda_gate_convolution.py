"""The CUDA kernels of the spatial gate's convolution against PyTorch's in float64: on the GPU, elsewhere emulated."""

from __future__ import annotations

import shutil

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_dermomamba.network.attention import CBAM
from nnunetv2_dermomamba.ops import cuda_gate_convolution
from nnunetv2_dermomamba.ops.cuda_gate_convolution import Plan, gate_backward, gate_forward
from nnunetv2_dermomamba.ops.gate_convolution import gate_convolution, spatial_gate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")


@pytest.fixture(autouse=True)
def emulated_launches(emulate):
    emulate(cuda_gate_convolution)


@pytest.fixture(params=[1, 10**6], ids=["many tiles", "few tiles"])
def many(request, monkeypatch):
    """Many: four rows a thread, one block a channel walks over all tiles; few: one row, a block for every tile."""
    monkeypatch.setattr(cuda_gate_convolution, "MANY", request.param)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def check(x, weight, forward=FORWARD[torch.float32], gradient=GRADIENT[torch.float32]):
    leaves = [m.double().requires_grad_() for m in (x, weight)]
    expected = F.conv2d(*leaves, padding=3)
    dy = draw(*expected.shape, dtype=x.dtype)
    expected.backward(dy.double())
    y = gate_forward(x, weight)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert relative_error(y, expected.detach()) < forward
    gradients = gate_backward(dy, x, weight)
    assert [g.dtype for g in gradients] == [x.dtype, torch.float32]
    for ours, theirs in zip(gradients, leaves, strict=True):
        assert ours.shape == theirs.shape
        assert relative_error(ours, theirs.grad) < gradient


def weight_of(scale: float = 7.0) -> Tensor:
    return draw(1, 2, 7, 7) / scale


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 19), (18, 1), (5, 3), (12, 16), (33, 70), (70, 36)])
def test_equals_pytorchs_own(size, batch):
    check(draw(batch, 2, *size), weight_of())


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(5, 3), (12, 16), (33, 70)])
def test_half_precision_is_rounded_once(kind, size):
    tolerance = torch.finfo(kind).eps
    check(draw(2, 2, *size, dtype=kind), weight_of(), tolerance, tolerance)


@pytest.mark.usefixtures("many")
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (12, 16), (33, 70)])
def test_the_whole_gate_in_inference(kind, size):
    maximum, mean = (m.transpose(1, 2) for m in draw(2, 3, *reversed(size), dtype=kind))
    norm = torch.nn.BatchNorm2d(1, eps=1e-3, device=DEVICE).eval()
    for tensor, value in zip((*norm.parameters(), *norm.buffers()), (1.5, -0.3, 0.2, 0.7, 9), strict=True):
        tensor.detach().fill_(value)
    gate = spatial_gate(maximum, mean, weight_of(), norm)
    summary = torch.stack([maximum, mean], dim=1).double()
    expected = torch.sigmoid(norm.double()(F.conv2d(summary, weight_of().double(), padding=3)))
    assert gate.dtype == kind
    assert relative_error(gate, expected.detach()) < max(FORWARD[torch.float32], torch.finfo(kind).eps)


@pytest.mark.usefixtures("many")
def test_any_order_in_memory():
    check(draw(2, 9, 8, 2).permute(0, 3, 1, 2), weight_of())
    check(draw(2, 2, 8, 9).transpose(2, 3), weight_of())
    check(draw(2 * 2 * 9 * 8 + 1)[1:].view(2, 2, 9, 8), weight_of())  # no address of four values


def test_large_maps_have_four_rows_a_thread_and_few_parts():
    large, small = (Plan(torch.empty(batch, 2, 192, 256, device="meta")) for batch in (64, 1))
    assert (large.rows, large.tiles, large.walkers) == (4, 64 * 24, cuda_gate_convolution.MANY)
    assert (small.rows, small.tiles, small.walkers) == (1, 96, 96)
    assert max(*large.shared, *small.shared) <= 48 * 1024


def test_results_repeat():
    x, dy, weight = draw(3, 2, 33, 70), draw(3, 1, 33, 70), weight_of()
    first, *others = (gate_backward(dy, x, weight) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_is_a_proper_operator():
    inputs = draw(2, 2, 9, 7).requires_grad_(), weight_of().requires_grad_()
    torch.library.opcheck(torch.ops.dermomamba.gate_convolution.default, inputs)


def test_weights_of_half_precision_have_gradients_of_it():
    x, weight = draw(2, 2, 9, 7, dtype=torch.float16).requires_grad_(), weight_of().half().requires_grad_()
    expected = F.conv2d(x.detach().double(), weight.detach().double(), padding=3)
    y = gate_convolution(x, weight)
    y.sum().backward()
    assert relative_error(y, expected) < torch.finfo(torch.float16).eps
    assert x.grad.dtype == weight.grad.dtype == torch.float16


def test_the_whole_gate_is_a_proper_operator():
    maps, numbers = (draw(2, 9, 7), draw(2, 9, 7)), [torch.ones(1, device=DEVICE) for _ in range(4)]
    torch.library.opcheck(torch.ops.dermomamba.spatial_gate.default, (*maps, weight_of(), numbers, 1e-5))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_inference_on_a_gpu_is_what_the_portable_backend_computes(monkeypatch, kind):
    torch.manual_seed(0)
    cbam, x = CBAM(16).to(DEVICE).eval(), draw(2, 16, 40, 36).contiguous(memory_format=torch.channels_last)
    results = []
    for call, backend in ((cbam, "torch"), (cbam, "cuda"), (torch.compile(cbam, fullgraph=True), "cuda")):
        monkeypatch.setenv("DERMOMAMBA_BACKEND", backend)
        with torch.inference_mode(), torch.autocast("cuda", torch.float16, enabled=kind == torch.float16):
            results.append(call(x))
    tolerance = FORWARD[torch.float32] if kind == torch.float32 else 4 * torch.finfo(kind).eps
    for ours in results[1:]:
        assert relative_error(ours, results[0]) < tolerance


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_gate_on_a_gpu_is_what_the_portable_backend_computes(monkeypatch, kind):
    torch.manual_seed(0)
    cbam, x = CBAM(16).to(DEVICE), draw(2, 16, 40, 36).contiguous(memory_format=torch.channels_last)
    tolerance = GRADIENT[torch.float32] if kind == torch.float32 else 16 * torch.finfo(kind).eps
    results = []
    for call, backend in ((cbam, "torch"), (cbam, "cuda"), (torch.compile(cbam, fullgraph=True), "cuda")):
        monkeypatch.setenv("DERMOMAMBA_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.float16, enabled=kind == torch.float16):
            y = call(leaf)
        (y.float() * x.sin()).sum().backward()
        results.append([y.detach(), leaf.grad, cbam.spatial_conv.weight.grad.clone()])
        cbam.zero_grad()
    for ours in results[1:]:
        for one, theirs in zip(ours, results[0], strict=True):
            assert relative_error(one, theirs) < tolerance
