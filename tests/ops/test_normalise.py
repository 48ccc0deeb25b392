"""BatchNorm and InstanceNorm by the sums of a CUDA kernel against PyTorch's: on the GPU, elsewhere emulated."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import Tensor, nn

from nnunetv2_dermomamba.ops import cuda_channel_sums, normalise
from nnunetv2_dermomamba.ops.normalise import batch_norm, batch_norm_of_running, channel_sums, instance_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")


@pytest.fixture(autouse=True)
def emulated_launches(emulate):
    emulate(cuda_channel_sums)


def draw(*shape: int, dtype: torch.dtype = torch.float16, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def maps(batch: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Channels of different means and deviations, channels last."""
    x = draw(batch, height, width, channels, dtype=torch.float32)
    scale, shift = (draw(channels, dtype=torch.float32, seed=seed) for seed in (1, 2))
    return (x * (0.1 + scale.abs()) + 5 * shift).to(dtype).permute(0, 3, 1, 2)


def affine(norm: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(norm.parameters()):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(seed))
    return norm.to(DEVICE)


def sums_of(a: Tensor, b: Tensor, shift: Tensor) -> Tensor:
    """In float64, (groups, 2, channels)."""
    a, b = (m.double().permute(0, 2, 3, 1).reshape(len(shift), -1, m.shape[1]) for m in (a, b))
    return torch.stack([a.sum(1), (a * (b - shift.double()[:, None])).sum(1)], dim=1)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("all_maps", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (3, 16, 7, 9), (1, 32, 50, 100), (70, 64, 5, 13), (2, 512, 10, 30)])
def test_sums(shape, all_maps, kind):
    a, b = maps(*shape, kind), maps(*shape, kind).flip(2) + 3
    shift = draw(1 if all_maps else shape[0], shape[1], dtype=torch.float32)
    difference = (b.float().unflatten(0, (len(shift), -1)) - shift[:, None, :, None, None]).flatten(0, 1)
    for left, ours in ((a, channel_sums(a, b, shift)), (difference, channel_sums(None, b, shift))):
        assert ours.dtype == torch.float32
        assert relative_error(ours.double().sum(1), sums_of(left, b, shift)) < FORWARD[torch.float32]


def test_sums_of_any_order_in_memory():
    b, shift = draw(2, 16, 13, 5), torch.zeros(2, 16, device=DEVICE)
    for x in (b, maps(2, 64, 13, 5)[:, 16:32], maps(2, 16, 13, 5).transpose(2, 3)):
        assert relative_error(channel_sums(x, x, shift).sum(1), sums_of(x, x, shift)) < FORWARD[torch.float32]


def test_sums_repeat_and_are_a_proper_operator():
    a, b, shift = maps(2, 16, 30, 10), maps(2, 16, 30, 10), draw(2, 16, dtype=torch.float32)
    assert torch.equal(channel_sums(a, b, shift), channel_sums(a, b, shift))
    torch.library.opcheck(torch.ops.dermomamba.channel_sums.default, (a, b, shift))
    torch.library.opcheck(torch.ops.dermomamba.channel_sums.default, (None, b, shift))


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor, call) -> None:
    """Result, rounded once, and gradients, of which that of x is rounded once."""
    once = torch.finfo(x.dtype).eps / 2
    dy = draw(*x.shape, seed=3).to(x.dtype)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = call(leaf, ours), theirs(wide)
    assert y.dtype == x.dtype
    assert relative_error(y, expected.detach()) < once
    y.backward(dy)
    expected.backward(dy.double())
    assert relative_error(leaf.grad, wide.grad) < once
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative_error(one.grad, other.grad) < GRADIENT[torch.float32]


@pytest.mark.parametrize("shape", [(1, 8, 2, 1), (3, 16, 13, 11), (2, 64, 40, 33)])
def test_instance_norm(shape):
    norm = affine(nn.InstanceNorm2d(shape[1], affine=True))
    compare(norm, copy.deepcopy(norm).double(), maps(*shape), instance_norm)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 8, 1, 1), (3, 16, 13, 11), (2, 64, 40, 33)])
def test_batch_norm_and_its_running_statistics(monkeypatch, shape, kind):
    norm = affine(nn.BatchNorm2d(shape[1]))
    theirs = copy.deepcopy(norm).double()
    monkeypatch.setattr(normalise, "serves", lambda x: True)
    x = maps(*shape, dtype=kind)
    for _ in range(2):
        norm.zero_grad()
        theirs.zero_grad()
        compare(norm, theirs, x, lambda x, norm: batch_norm(x, norm, torch.zeros(shape[1], device=DEVICE)))
    assert norm.num_batches_tracked == 2
    for ours, expected in ((norm.running_mean, theirs.running_mean), (norm.running_var, theirs.running_var)):
        assert relative_error(ours, expected) < GRADIENT[torch.float32]


@pytest.mark.parametrize("served", [False, True])
def test_an_offset_goes_into_the_running_mean(monkeypatch, served):
    monkeypatch.setattr(normalise, "serves", lambda x: served)
    kind = torch.float16 if served else torch.float32
    x, offset = maps(3, 16, 13, 11, dtype=kind), draw(16, dtype=torch.float32, seed=5)
    norm = affine(nn.BatchNorm2d(16))
    theirs = copy.deepcopy(norm).double()
    expected = theirs(x.double() + offset.double()[:, None, None])
    assert relative_error(batch_norm(x, norm, offset), expected.detach()) < torch.finfo(torch.float16).eps
    assert relative_error(norm.running_mean, theirs.running_mean) < GRADIENT[torch.float32]
    assert relative_error(norm.running_var, theirs.running_var) < GRADIENT[torch.float32]
    norm.eval()
    theirs.eval()
    ours = batch_norm(x.float(), norm, offset)
    assert relative_error(ours, theirs(x.double() + offset.double()[:, None, None])) < GRADIENT[torch.float32]


def test_constant_channels_and_nan():
    x = maps(2, 16, 13, 11)
    x[:, 0] = 60000.0
    x[:, 1] = torch.nan
    y = instance_norm(x, affine(nn.InstanceNorm2d(16, affine=True)))
    assert (y[:, 0] == y[0, 0, 0, 0]).all()
    assert y[:, 1].isnan().all()
    assert y[:, 2:].isfinite().all()


def test_plain_pytorch_where_it_does_not_serve():
    norm, cumulative = nn.BatchNorm2d(16), nn.BatchNorm2d(16, momentum=None)
    x, none = torch.randn(3, 16, 5, 5), torch.zeros(16)
    assert torch.equal(batch_norm(x, norm, none), copy.deepcopy(norm)(x))
    assert torch.equal(batch_norm(x, cumulative, none), copy.deepcopy(cumulative)(x))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_compiled_on_a_gpu(kind):
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.InstanceNorm2d(32, affine=True), nn.BatchNorm2d(32)

        def forward(self, x: Tensor) -> Tensor:
            assert normalise.serves(x) == torch.compiler.is_compiling()
            x = instance_norm(x, self.one) if normalise.serves(x) else self.one(x)
            return batch_norm(torch.relu(x), self.two, x.new_zeros(32))

    both = affine(Both())
    theirs, x = copy.deepcopy(both).double(), maps(4, 32, 96, 128, kind)
    compiled = torch.compile(both, fullgraph=True)
    tolerance = 4 * torch.finfo(kind).eps  # rounded in between
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, expected = compiled(leaf), theirs(wide)
    dy = draw(*x.shape, seed=3).to(kind)
    y.backward(dy)
    expected.backward(dy.double())
    assert relative_error(y, expected.detach()) < tolerance
    assert relative_error(leaf.grad, wide.grad) < tolerance
    for one, other in zip(both.parameters(), theirs.parameters(), strict=True):
        assert relative_error(one.grad, other.grad) < tolerance
    assert relative_error(both.two.running_var, theirs.two.running_var) < tolerance


def trained_batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = affine(nn.BatchNorm2d(channels))
    norm.running_mean.copy_(draw(channels, dtype=torch.float32))
    norm.running_var.copy_(draw(channels, dtype=torch.float32, seed=1).square())
    return norm.eval()


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
def test_batch_norm_of_running_statistics_by_its_formula(kind):
    norm, x = trained_batch_norm(16), maps(3, 16, 5, 7, kind)
    written_out = normalise._of_running(x, norm, norm.running_mean, norm.running_var)
    assert written_out.dtype == kind
    assert written_out.stride() == x.stride()
    expected = copy.deepcopy(norm).double()(x.double())
    assert relative_error(written_out, expected) < FORWARD.get(kind, torch.finfo(kind).eps)


@pytest.mark.gpu
def test_batch_norm_of_running_statistics_compiled_on_a_gpu():
    norm, x = trained_batch_norm(32), maps(3, 32, 40, 33)
    with torch.inference_mode():
        y = torch.compile(batch_norm_of_running)(x, norm)
        assert relative_error(y, norm(x)) < torch.finfo(torch.float16).eps
