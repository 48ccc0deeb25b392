"""CBAM's kernels for inference on the CPU against PyTorch."""

import pytest
import torch
from tolerances import FORWARD, relative_error

from nnunetv2_dermomamba.network.attention import CBAM
from nnunetv2_dermomamba.ops.cpu_gates import gate_channels, pool_positions

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
