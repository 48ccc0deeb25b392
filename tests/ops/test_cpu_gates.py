"""CBAM's kernels for the CPU against PyTorch."""

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch.nn import functional as F

from nnunetv2_dermomamba.network.attention import CBAM
from nnunetv2_dermomamba.network.stages import DecoderStage
from nnunetv2_dermomamba.ops import ENVIRONMENT_VARIABLE, cpu_gates, cpu_instance_norm
from nnunetv2_dermomamba.ops.cpu_gates import gate_and_add, gate_channels, pool_positions

SHAPES = [(1, 32, 1, 1), (2, 32, 5, 7), (1, 64, 70, 65), (3, 16, 9, 130)]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    """So many, for maps of any size."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)
    monkeypatch.setattr(cpu_instance_norm, "SMALL", 0)
    monkeypatch.setattr(cpu_gates, "SMALL", 0)


@pytest.fixture(params=[torch.channels_last, torch.contiguous_format], ids=["channels last", "channels first"])
def draw(request):
    def make(*shape):
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(*shape, generator=generator) - 3).contiguous(memory_format=request.param)

    return make


@pytest.mark.parametrize("shape", SHAPES)
def test_pooling_over_positions(draw, shape):
    x = draw(*shape)
    maximum, mean = pool_positions(x)
    assert torch.equal(maximum, x.amax((2, 3)))
    assert relative_error(mean, x.double().mean((2, 3))) <= FORWARD[torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
def test_gated_map_and_its_summary(draw, shape):
    x, gate = draw(*shape), torch.rand(*shape[:2], 1, 1)
    gated, summary = gate_channels(x, gate)
    assert torch.equal(gated, x * gate)
    assert torch.equal(summary[:, 0], gated.amax(1))
    assert relative_error(summary[:, 1], gated.double().mean(1)) <= FORWARD[torch.float32]


@pytest.mark.parametrize("shape", [(1, 8, 2, 2), (2, 16, 6, 10), (1, 32, 128, 130)])
def test_gate_and_half_the_size_added(draw, shape):
    batch, channels, height, width = shape
    x, gate = draw(*shape), torch.rand(batch, 1, height, width)
    low = draw(batch, channels, height // 2, width // 2)
    expected = x * gate + F.interpolate(low, scale_factor=2.0, mode="nearest")
    assert relative_error(gate_and_add(x.clone(), gate, low), expected) <= FORWARD[torch.float32]


def compare_gradients(ours, theirs, *inputs):
    """Of sums with random weights; ``theirs`` in float64."""
    results = []
    for function, kind in ((ours, inputs[0].dtype), (theirs, torch.float64)):
        leaves = [m.detach().to(kind).requires_grad_() for m in inputs]
        outputs = list(function(*leaves))
        torch.manual_seed(1)
        weights = [torch.randn(m.shape, dtype=torch.float64).to(kind) for m in outputs]
        results.append(torch.autograd.grad(outputs, leaves, weights))
    for mine, other in zip(*results, strict=True):
        assert mine.shape == other.shape
        assert relative_error(mine, other) <= GRADIENT[inputs[0].dtype]


@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_pooling(draw, shape, kind, threads):
    compare_gradients(
        pool_positions,
        lambda x: (x.flatten(2).max(2)[0], x.mean((2, 3))),
        draw(*shape).to(kind),
    )


@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_gated_map(draw, shape, kind, threads):
    def theirs(x, gate):
        gated = x * gate
        return gated, torch.stack([gated.max(1)[0], gated.mean(1)], dim=1)

    compare_gradients(gate_channels, theirs, draw(*shape).to(kind), torch.rand(*shape[:2], 1, 1).to(kind))


@pytest.mark.parametrize("kind", GRADIENT)
@pytest.mark.parametrize("shape", [(1, 8, 2, 2), (2, 16, 6, 10), (1, 32, 128, 130)])
def test_gradients_of_gate_and_half_the_size(draw, shape, kind, threads):
    batch, channels, height, width = shape
    compare_gradients(
        lambda *m: (gate_and_add(*m),),
        lambda x, gate, low: (x * gate + F.interpolate(low, scale_factor=2.0, mode="nearest"),),
        draw(*shape).to(kind),
        torch.rand(batch, 1, height, width).to(kind),
        draw(batch, channels, height // 2, width // 2).to(kind),
    )


def test_of_equal_maxima_the_first_has_the_gradient():
    x = torch.ones(1, 8, 40, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(pool_positions(x)[0].sum(), x)
    assert torch.equal(dx[0, :, 0, 0], torch.ones(8))
    assert dx.sum() == 8
    (dx,) = torch.autograd.grad(gate_channels(x, torch.ones(1, 8, 1, 1))[1][:, 0].sum(), x)
    assert torch.equal(dx[0, 0], torch.ones(40, 3))
    assert dx.sum() == 120


def test_the_map_is_left_alone_where_gradients_are_recorded():
    x = torch.ones(1, 8, 2, 2).contiguous(memory_format=torch.channels_last)
    low = torch.ones(1, 8, 1, 1, requires_grad=True)
    gate_and_add(x, torch.full((1, 1, 2, 2), 0.5), low)
    assert torch.equal(x, torch.ones(1, 8, 2, 2))


def test_gradients_for_a_gate_that_does_not_lie_in_one_piece():
    x, gate = torch.randn(2, 8, 3, 4, dtype=torch.float64), torch.rand(2, 16, 1, 1, dtype=torch.float64)
    compare_gradients(lambda x, gate: gate_channels(x, gate[:, ::2])[:1], lambda x, gate: (x * gate[:, ::2],), x, gate)


@pytest.mark.parametrize(
    ("x", "gate"),
    [
        (torch.zeros(1, 12, 3, 4), torch.zeros(1, 12, 1, 1)),
        (torch.zeros(2, 8, 3, 4), torch.zeros(1, 8, 1, 1)),
        (torch.zeros(1, 8, 3, 4), torch.zeros(1, 8, 1, 1, dtype=torch.float64)),
    ],
)
def test_what_no_kernel_serves_is_refused(x, gate):
    with pytest.raises(ValueError, match=r"not match|multiple of 8"):
        gate_channels(x, gate)


@pytest.mark.parametrize(("low", "gate"), [((1, 8, 2, 2), (1, 1, 4, 6)), ((1, 8, 2, 3), (1, 1, 1, 1))])
def test_sizes_that_do_not_match_are_refused(low, gate):
    with pytest.raises(ValueError, match="do not match"):
        gate_and_add(torch.zeros(1, 8, 4, 6), torch.zeros(gate), torch.zeros(low))


@pytest.fixture
def by_pytorch(monkeypatch):
    """A function's result without kernels."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setenv(ENVIRONMENT_VARIABLE, "torch")
            return function(*arguments)

    return call


def test_decoder_is_pytorchs(by_pytorch):
    torch.manual_seed(0)
    stage, cbam = DecoderStage(16).eval(), CBAM(16).eval()
    x, skip = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 10, 14)

    def decode():
        return stage(x, *cbam.factors(skip))

    expected, with_gradients = by_pytorch(decode), decode()
    with torch.no_grad():
        result = decode()
    assert relative_error(result, expected.detach()) <= FORWARD[torch.float32]
    assert relative_error(with_gradients.detach(), expected.detach()) <= FORWARD[torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
def test_cbam_is_pytorchs(draw, by_pytorch, shape):
    torch.manual_seed(0)
    cbam, x = CBAM(shape[1]).eval(), draw(*shape)
    expected, with_gradients = by_pytorch(cbam, x), cbam(x)
    with torch.no_grad():
        result = cbam(x)
    assert relative_error(result, expected.detach()) <= FORWARD[torch.float32]
    assert relative_error(with_gradients.detach(), expected.detach()) <= FORWARD[torch.float32]


def test_gradients_of_cbam_and_decoder_are_pytorchs(by_pytorch):
    torch.manual_seed(0)
    stage, cbam = DecoderStage(16).double(), CBAM(16).double()
    x, skip = (torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True) for size in ((5, 7), (10, 14)))

    def gradients():
        y = stage(x, *cbam.factors(skip))
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).cos().view(y.shape)  # BatchNorm hides a plain sum
        return torch.autograd.grad((y * weights).sum(), [x, skip, *stage.parameters(), *cbam.parameters()])

    for mine, other in zip(gradients(), by_pytorch(gradients), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-9, atol=1e-9)


def test_no_images():
    assert CBAM(16).eval()(torch.zeros(0, 16, 4, 4)).shape == (0, 16, 4, 4)


def test_a_gate_for_all_images():
    stage, skip = DecoderStage(16).eval(), (torch.randn(2, 16, 4, 4), torch.rand(1, 1, 4, 4))
    x = torch.randn(2, 16, 2, 2)
    result, expected = stage(x, *skip), stage(x, skip[0], skip[1].expand(2, 1, 4, 4))
    torch.testing.assert_close(result, expected)


def test_nan_stays():
    cbam, x = CBAM(32).eval(), torch.zeros(1, 32, 4, 4)
    x[0, 3, 1, 2] = torch.nan
    with torch.no_grad():
        assert cbam(x).isnan().any()
