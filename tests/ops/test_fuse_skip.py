"""A decoder's fusion with its skip as one kernel against PyTorch's operators; without a GPU in Triton's interpreter."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import Tensor
from torch.nn import functional as F
from triton_interpreter import interpreted_without_gpu

pytest.importorskip("triton")

from nnunetv2_dermomamba.network import stages
from nnunetv2_dermomamba.ops import fuse_skip as fuse_skip_module
from nnunetv2_dermomamba.ops import triton_fuse_skip
from nnunetv2_dermomamba.ops.fuse_skip import fuse_skip, serves

pytestmark = interpreted_without_gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = [(2, 32, 6, 38), (1, 64, 2, 70), (3, 128, 12, 4)]
KINDS = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
"""Triton's interpreter multiplies bfloat16's bit patterns."""
F16 = torch.float16
NAMES = ("x", "spatial_gate", "channel_gate", "weight", "low", "bias")


@pytest.fixture(autouse=True)
def whole_products():
    """PyTorch's own convolutions are of TF32 otherwise."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def inputs(batch: int, channels: int, height: int, width: int, kind: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    def draw_map(high: int, wide: int) -> Tensor:
        return draw(batch, high, wide, channels).permute(0, 3, 1, 2).to(kind)

    gates = draw(batch, 1, height, width).sigmoid().to(kind), draw(batch, channels, 1, 1).sigmoid().to(kind)
    weight = draw(channels, channels, 1, 1) * channels**-0.5
    return [draw_map(height, width), *gates, weight, draw_map(height // 2, width // 2), draw(channels)]


def formula(x, spatial_gate, channel_gate, weight, low, bias):
    return F.conv2d(x * spatial_gate * channel_gate, weight) + F.interpolate(
        low + bias[:, None, None], scale_factor=2.0
    )


@pytest.mark.parametrize(("programs", "compiled"), [(2, True), (8, False), (1000, False)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_pytorchs_own(monkeypatch, shape, kind, programs, compiled):
    monkeypatch.setattr(triton_fuse_skip, "PROGRAMS", programs)
    monkeypatch.setattr(fuse_skip_module, "BACK_PROGRAMS", programs)
    arguments = inputs(*shape, kind)
    dy = torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, kind)
    dy = dy.contiguous(memory_format=torch.channels_last)
    leaves = [m.clone().requires_grad_() for m in arguments]
    wide = [m.double().requires_grad_() for m in arguments]
    function = torch.compile(fuse_skip, backend="aot_eager", fullgraph=True) if compiled else fuse_skip
    y, expected = function(*leaves), formula(*wide)
    assert y.dtype == kind
    assert y.is_contiguous(memory_format=torch.channels_last)
    eps = torch.finfo(kind).eps
    assert relative_error(y, expected.detach()) < (FORWARD[kind] if kind == torch.float32 else eps)
    ours, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, wide, dy.double())
    for name, leaf, one, other in zip(NAMES, leaves, ours, theirs, strict=True):
        assert one.dtype == leaf.dtype
        assert one.shape == leaf.shape
        assert relative_error(one, other) < (GRADIENT[kind] if kind == torch.float32 else 4 * eps), name


def test_the_decoder_gives_the_same(monkeypatch):
    x, *gates, _, low, _ = inputs(2, 32, 8, 12, torch.float32)
    stage = stages.DecoderStage(32).to(DEVICE)
    other = copy.deepcopy(stage)
    monkeypatch.setattr(stages.fuse_skip, "serves", lambda *skip: True)
    y = stage(low, x, *gates)
    monkeypatch.setattr(stages.fuse_skip, "serves", lambda *skip: False)
    assert relative_error(y, other(low, x, *gates)) < 1e-5


def test_what_it_serves(monkeypatch):
    monkeypatch.setattr(fuse_skip_module, "own_gpu_kernels", lambda _: True)

    def skip(channels=32, kind=torch.float16, is_cuda=True):
        return SimpleNamespace(is_cuda=is_cuda, dtype=kind, shape=(2, channels, 8, 12), numel=lambda: 1)

    gates = torch.zeros(2, 1, 8, 12), torch.zeros(2, 32, 1, 1)
    assert serves(skip(), *gates)
    assert not serves(skip(is_cuda=False), *gates)
    assert not serves(skip(kind=torch.float32), *gates)
    assert not serves(skip(24), gates[0], gates[1][:, :24])
    assert not serves(skip(), *reversed(gates))
    assert not serves(skip(), gates[0])


def test_are_proper_operators():
    torch.library.opcheck(
        torch.ops.dermomamba.fuse_skip.default, [m.requires_grad_() for m in inputs(1, 32, 4, 6, F16)]
    )
    x, *gates, weight, _, _ = inputs(2, 64, 4, 6, F16)
    arguments = x.flip(0), x, *gates, weight, 3
    torch.library.opcheck(
        torch.ops.dermomamba.fuse_skip_backward.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.gpu
def test_compiled_on_a_gpu():
    arguments = inputs(2, 32, 96, 128, torch.float16)
    leaves = [m.clone().requires_grad_() for m in arguments]
    wide = [m.double().requires_grad_() for m in arguments]
    with torch.autocast("cuda"):
        y = torch.compile(lambda *m: F.gelu(fuse_skip(*m)))(*leaves)
    expected = F.gelu(formula(*wide))
    assert relative_error(y, expected.detach()) < 2 * torch.finfo(torch.float16).eps
    dy = torch.randn_like(y)
    ours, theirs = torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, wide, dy.double())
    for name, one, other in zip(NAMES, ours, theirs, strict=True):
        assert relative_error(one, other) < 4 * torch.finfo(torch.float16).eps, name
