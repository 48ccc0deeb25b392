"""CBAM's kernels for inference on the CPU against PyTorch."""

import pytest
import torch
from tolerances import FORWARD, relative_error
from torch.nn import functional as F

from nnunetv2_dermomamba.network.attention import CBAM
from nnunetv2_dermomamba.network.stages import DecoderStage
from nnunetv2_dermomamba.ops.cpu_gates import gate_and_add, gate_channels, pool_positions

SHAPES = [(1, 32, 1, 1), (2, 32, 5, 7), (1, 64, 70, 65), (3, 16, 9, 130)]


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


@pytest.mark.parametrize(("low", "gate"), [((1, 8, 2, 2), (1, 1, 4, 6)), ((1, 8, 2, 3), (1, 1, 1, 1))])
def test_sizes_that_do_not_match_are_refused(low, gate):
    with pytest.raises(ValueError, match="do not match"):
        gate_and_add(torch.zeros(1, 8, 4, 6), torch.zeros(gate), torch.zeros(low))


def test_decoder_in_inference_is_the_one_with_gradients():
    torch.manual_seed(0)
    stage, cbam = DecoderStage(16).eval(), CBAM(16).eval()
    x, skip = torch.randn(2, 16, 5, 7), torch.randn(2, 16, 10, 14)
    with torch.no_grad():
        result = stage(x, *cbam.factors(skip))
    assert relative_error(result, stage(x, *cbam.factors(skip)).detach()) <= FORWARD[torch.float32]


@pytest.mark.parametrize("shape", SHAPES)
def test_inference_is_the_one_with_gradients(draw, shape):
    torch.manual_seed(0)
    cbam, x = CBAM(shape[1]).eval(), draw(*shape)
    with torch.no_grad():
        result = cbam(x)
    assert relative_error(result, cbam(x).detach()) <= FORWARD[torch.float32]


def test_nan_stays():
    cbam, x = CBAM(32).eval(), torch.zeros(1, 32, 4, 4)
    x[0, 3, 1, 2] = torch.nan
    with torch.no_grad():
        assert cbam(x).isnan().any()
