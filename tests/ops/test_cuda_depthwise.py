"""The CUDA kernels of depthwise convolutions against PyTorch's in float64: on the GPU, elsewhere emulated."""

from __future__ import annotations

import shutil

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_dermomamba.network.cross_scale import CrossScaleMambaBlock
from nnunetv2_dermomamba.ops import axial_depthwise, cuda_depthwise, depthwise_silu, nvrtc  # noqa: F401
from nnunetv2_dermomamba.ops.cuda_depthwise import axial_backward, axial_forward, silu_backward, silu_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")


@pytest.fixture(autouse=True)
def emulated_launches(emulate):
    emulate(cuda_depthwise)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def depthwise(x: Tensor, taps: Tensor, kernel: tuple[int, int], dilation: int) -> Tensor:
    """PyTorch's convolution of (B, C, H, W) with (taps and bias, C)."""
    weight = taps[:-1].t().reshape(x.shape[1], 1, *kernel)
    return F.conv2d(x, weight, taps[-1], padding="same", dilation=dilation, groups=x.shape[1])


def axial(x: Tensor, weights: Tensor) -> Tensor:
    branches = []
    for dilation, (chunk, taps) in enumerate(zip(x.permute(0, 3, 1, 2).chunk(3, 1), weights, strict=True), 1):
        y = depthwise(chunk, taps[:8], (1, 7), dilation)
        y = depthwise(depthwise(y, taps[8:16], (7, 1), dilation), taps[16:], (3, 3), dilation)
        branches.append(chunk + y)
    return torch.cat(branches).permute(0, 2, 3, 1)


def silu(x: Tensor, weights: Tensor) -> Tensor:
    return F.silu(depthwise(x.permute(0, 3, 1, 2), weights, (3, 3), 1)).permute(0, 2, 3, 1)


def check(kernels, reference, x, weights, forward=FORWARD[torch.float32], gradient=GRADIENT[torch.float32]):
    leaves = [m.double().requires_grad_() for m in (x, weights)]
    expected = reference(*leaves)
    dy = draw(*expected.shape, dtype=x.dtype)
    expected.backward(dy.double())
    y = kernels[0](x, weights)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert relative_error(y, expected.detach()) < forward
    gradients = kernels[1](dy, x, weights)
    assert gradients[0].dtype == x.dtype
    for ours, theirs in zip(gradients, leaves, strict=True):
        assert relative_error(ours, theirs.grad) < gradient


CASES = [
    ((axial_forward, axial_backward), axial, 3, cuda_depthwise.AXIAL_TAPS),
    ((silu_forward, silu_backward), silu, 1, cuda_depthwise.SILU_TAPS),
]


def weights_of(branches: int, taps: int, channels: int) -> Tensor:
    return draw(*([branches] if branches > 1 else []), taps, channels) / 3


@pytest.mark.parametrize("case", CASES, ids=["axial", "silu"])
@pytest.mark.parametrize("size", [(1, 1), (1, 19), (18, 1), (5, 3), (16, 16), (37, 21)])
def test_equals_pytorchs_own(case, size):
    kernels, reference, branches, taps = case
    check(kernels, reference, draw(2, *size, branches * 8), weights_of(branches, taps, 8))


@pytest.mark.parametrize("case", CASES, ids=["axial", "silu"])
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(6, 8), (35, 40)])
def test_half_precision_in_tiles_of_both_sizes(case, kind, size):
    kernels, reference, branches, taps = case
    tolerance = 4 * torch.finfo(kind).eps
    check(
        kernels,
        reference,
        draw(1, *size, branches * 4, dtype=kind),
        weights_of(branches, taps, 4),
        tolerance,
        tolerance,
    )


@pytest.mark.parametrize("case", CASES, ids=["axial", "silu"])
def test_some_channels_of_wider_maps(case):
    kernels, reference, branches, taps = case
    x = draw(2, 9, 7, branches * 4 + 4)[..., 4:]
    check(kernels, reference, x, weights_of(branches, taps, 4))
    check(kernels, reference, draw(2, 7, 9, branches * 4).transpose(1, 2), weights_of(branches, taps, 4))
    check(kernels, reference, draw(2, 1, 9, branches * 4).transpose(1, 2), weights_of(branches, taps, 4))  # one column
    check(kernels, reference, draw(3, branches * 4, 1, 1).permute(0, 2, 3, 1), weights_of(branches, taps, 4))


def allow(monkeypatch, kilobytes):
    """Shared memory of a block on some GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(nvrtc, "max_shared", lambda device: kilobytes * 1024)
    monkeypatch.setattr(cuda_depthwise, "max_shared", lambda like: kilobytes * 1024)


@pytest.mark.parametrize(("kilobytes", "tile"), [(227, 32), (99, 16)])
def test_tiles_are_as_large_as_shared_memory_allows(monkeypatch, kilobytes, tile):
    allow(monkeypatch, kilobytes)
    assert all(cuda_depthwise.fits(kind) for kind in cuda_depthwise.INPUTS)
    weights = torch.empty(3, cuda_depthwise.AXIAL_TAPS, 4)
    plan = cuda_depthwise.Plan(torch.empty(1, 40, 40, 12, dtype=torch.float16), weights)
    assert plan.tile == tile
    assert max(plan.shared) <= kilobytes * 1024


def test_too_little_shared_memory_is_noticed(monkeypatch):
    allow(monkeypatch, 48)
    assert not any(cuda_depthwise.fits(kind) for kind in cuda_depthwise.INPUTS)


@pytest.mark.parametrize("name", ["axial_depthwise", "depthwise_silu"])
def test_is_a_proper_operator(name):
    branches, taps = (3, cuda_depthwise.AXIAL_TAPS) if name == "axial_depthwise" else (1, cuda_depthwise.SILU_TAPS)
    x, weights = draw(2, 9, 7, branches * 4), weights_of(branches, taps, 4)
    torch.library.opcheck(getattr(torch.ops.dermomamba, name).default, (x.requires_grad_(), weights.requires_grad_()))


@pytest.mark.gpu
def test_block_on_a_gpu_is_what_the_portable_backend_computes(monkeypatch):
    block = CrossScaleMambaBlock(16).to(DEVICE)
    x = draw(2, 16, 40, 36).contiguous(memory_format=torch.channels_last)
    results = []
    for call, backend in ((block, "torch"), (block, "cuda"), (torch.compile(block, fullgraph=True), "cuda")):
        monkeypatch.setenv("DERMOMAMBA_BACKEND", backend)
        leaf = x.clone().requires_grad_()
        y = call(leaf)
        (y * y.detach().sin()).sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
        block.zero_grad()
    for ours in results[1:]:
        for one, theirs in zip(ours, results[0], strict=True):
            assert relative_error(one, theirs) < GRADIENT[torch.float32]
