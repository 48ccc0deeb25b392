"""The CUDA kernels of 3 x 3 convolutions against PyTorch's in float64: on the GPU, elsewhere emulated."""

from __future__ import annotations

import shutil

import pytest
import torch
from tolerances import GRADIENT, relative_error
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import cuda_convolution
from nnunetv2_dermomamba.ops.convolution import CHANNELS, convolution, serves
from nnunetv2_dermomamba.ops.cuda_convolution import Plan, convolution_backward, convolution_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")
PAIRS = [(16, 16), (16, 32), (32, 16), (32, 32)]


@pytest.fixture(autouse=True)
def emulated_launches(emulate):
    emulate(cuda_convolution)


def draw(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def maps(batch: int, channels: int, height: int, width: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return draw(batch, height, width, channels, dtype=dtype).permute(0, 3, 1, 2)


def weight_of(from_: int, to: int, kind: torch.dtype = torch.float16) -> Tensor:
    """Weights that ``kind`` represents, so that their rounding is no error."""
    return (draw(to, from_, 3, 3, dtype=torch.float32) / (3 * from_**0.5)).to(kind).float()


def check(x: Tensor, weight: Tensor, dy: Tensor) -> None:
    """Results are rounded once to x's type, the weight's gradient is float32's."""
    leaves = [m.double().requires_grad_() for m in (x, weight)]
    expected = F.conv2d(*leaves, padding=1)
    expected.backward(dy.double())
    once = torch.finfo(x.dtype).eps / 2
    y = convolution_forward(x, weight)
    dx, dweight = convolution_backward(dy, x, weight)
    for ours, theirs, like in ((y, expected, dy), (dx, leaves[0].grad, x)):
        assert ours.dtype == x.dtype
        assert ours.shape == like.shape
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert relative_error(ours, theirs.detach()) < once
    assert dweight.dtype == torch.float32
    assert dweight.shape == weight.shape
    assert relative_error(dweight, leaves[1].grad) < GRADIENT[torch.float32]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (13, 1), (12, 32), (14, 35)])
@pytest.mark.parametrize("pair", PAIRS)
def test_equals_pytorchs_own(pair, size):
    from_, to = pair
    check(maps(1, from_, *size), weight_of(from_, to), maps(1, to, *size))


def test_bfloat16():
    kind = torch.bfloat16
    check(maps(2, 16, 5, 3, kind), weight_of(16, 32, kind), maps(2, 32, 5, 3, kind))


@pytest.mark.parametrize("pair", [(16, 16), (32, 16)])
def test_every_weight_counts_at_its_place(pair):
    """One weight after the other would take long: weights of one channel of results and one tap at a time."""
    from_, to = pair
    x = maps(1, from_, 5, 35)
    weight = weight_of(from_, to)
    for tap in range(9):
        of_tap = torch.zeros_like(weight)
        of_tap[tap % to, :, tap // 3, tap % 3] = weight[tap % to, :, tap // 3, tap % 3]
        y = convolution_forward(x, of_tap)
        expected = F.conv2d(x.double(), of_tap.double(), padding=1)
        assert relative_error(y, expected) < torch.finfo(x.dtype).eps


@pytest.mark.parametrize("processors", [1, 3])
def test_a_block_walks_over_several_tiles(monkeypatch, processors):
    monkeypatch.setattr(cuda_convolution, "PROCESSORS", processors)
    check(maps(2, 16, 14, 35), weight_of(16, 32), maps(2, 32, 14, 35))


def test_any_order_in_memory():
    weight = weight_of(16, 16)
    for x, dy in (
        (draw(2, 16, 9, 8), draw(2, 16, 9, 8)),
        (maps(2, 16, 8, 9).transpose(2, 3), maps(2, 32, 9, 8)[:, 8:24]),
        (draw(2 * 16 * 9 * 8 + 1)[1:].view(2, 9, 8, 16).permute(0, 3, 1, 2), maps(2, 16, 9, 8)),
    ):
        check(x, weight, dy)


def test_weights_of_any_strides():
    weight = weight_of(16, 32)
    x = maps(1, 16, 9, 8)
    assert torch.equal(
        convolution_forward(x, weight.contiguous(memory_format=torch.channels_last)), convolution_forward(x, weight)
    )


def test_overflow_is_infinite_and_nan_stays():
    x = maps(1, 16, 9, 8)
    x[0, 3, 4, 4] = torch.nan
    y = convolution_forward(x, weight_of(16, 16))
    assert torch.equal(y.isnan().any(1)[0].nonzero().unique(), torch.tensor([3, 4, 5], device=DEVICE))
    assert convolution_forward(torch.full_like(x, 6e4), weight_of(16, 16).abs()).isinf().any()


def test_results_repeat():
    x, dy, weight = maps(2, 16, 14, 35), maps(2, 32, 14, 35), weight_of(16, 32)
    first, *others = (convolution_backward(dy, x, weight) for _ in range(2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_blocks_fit_shared_memory():
    for from_, to in PAIRS:
        plan = Plan(torch.empty(64, from_, 192, 256, device="meta", dtype=torch.float16), torch.empty(to, from_, 3, 3))
        assert plan.tiles == 64 * 16 * 8
        if (from_, to) in CHANNELS:  # what GPUs of compute capability 8.6 and 8.9 allow a block
            assert max(plan.shared(from_), plan.shared(to, from_)) <= 99 * 1024
        assert 2 * (plan.shared(from_) + 1024) <= 228 * 1024  # two of Hopper, of which each takes 1 KiB more


def test_is_a_proper_operator():
    inputs = maps(2, 16, 9, 7).requires_grad_(), weight_of(16, 32).requires_grad_()
    torch.library.opcheck(torch.ops.dermomamba.convolution.default, inputs)


def test_weights_of_half_precision_have_gradients_of_it():
    x, weight = maps(2, 16, 9, 7).requires_grad_(), weight_of(16, 16).half().requires_grad_()
    expected = F.conv2d(x.detach().double(), weight.detach().double(), padding=1)
    y = convolution(x, weight)
    y.sum().backward()
    assert relative_error(y, expected) < torch.finfo(torch.float16).eps
    assert x.grad.dtype == weight.grad.dtype == torch.float16


@pytest.mark.skipif(DEVICE.type == "cuda", reason="needs a CPU")
def test_serves_no_cpu():
    assert not serves(maps(64, 16, 192, 256), weight_of(16, 16))


@pytest.mark.gpu
def test_serves_large_maps_of_half_precision_only():
    x, weight = maps(1, 16, 192, 256), weight_of(16, 16)
    assert serves(x, weight)
    assert not serves(x.float(), weight)
    assert not serves(x[:, :, :8], weight)
    assert not serves(x, weight[:, :, :1, :1])
    assert not serves(maps(1, 64, 192, 256), weight_of(64, 64))
    with torch.autocast("cuda", torch.float16):
        assert serves(x.float(), weight)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", sorted(CHANNELS))
def test_large_maps(pair):
    from_, to = pair
    check(maps(4, from_, 192, 256), weight_of(from_, to), maps(4, to, 192, 256))
