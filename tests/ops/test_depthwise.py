"""The depthwise convolution's kernels against PyTorch's own in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch.nn import functional as F
from triton_interpreter import interpreted_without_gpu

pytest.importorskip("triton")

from nnunetv2_dermomamba.ops.depthwise import DepthwiseConv2d
from nnunetv2_dermomamba.ops.triton_depthwise import depthwise_backward, depthwise_forward

pytestmark = interpreted_without_gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some of the channels": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
    "some of the channels, last": lambda x: torch.cat([x, x], 1).permute(0, 2, 3, 1).contiguous()
    .permute(0, 3, 1, 2)[:, x.shape[1] :],
}  # fmt: skip


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def expected(x, weight, bias, dilation, dy):
    leaves = [m.double().requires_grad_() for m in (x, weight, bias)]
    y = F.conv2d(leaves[0], *leaves[1:], padding="same", dilation=dilation, groups=x.shape[1])
    y.backward(dy.double())
    return y.detach(), [m.grad for m in leaves]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((1, 7), 1), ((7, 1), 3), ((3, 3), 2), ((9, 9), 1), ((1, 1), 1), ((3, 5), 7)]
)
def test_equals_pytorchs_own(kernel, dilation, layout):
    x = LAYOUTS[layout](draw(2, 5, 9, 14))
    weight, bias, dy = draw(5, 1, *kernel), draw(5), draw(2, 5, 9, 14)
    y, gradients = expected(x, weight, bias, dilation, dy)
    result = depthwise_forward(x, weight, bias, dilation)
    assert result.stride() == torch.empty_like(x).stride()
    assert relative_error(result, y) < FORWARD[torch.float32]
    ours = depthwise_backward(dy, x, weight, dilation)
    assert ours[0].stride() == result.stride()
    assert all(gradient.is_contiguous() for gradient in ours[1:])  # what the fake implementation promises
    for one, theirs in zip(ours, gradients, strict=True):
        assert relative_error(one, theirs) < GRADIENT[torch.float32]


def test_more_channels_and_positions_than_a_program_takes():
    x = draw(1, 20, 20, 31).contiguous(memory_format=torch.channels_last)
    weight, bias, dy = draw(20, 1, 3, 3), draw(20), draw(1, 20, 20, 31)
    y, gradients = expected(x, weight, bias, 1, dy)
    assert relative_error(depthwise_forward(x, weight, bias, 1), y) < FORWARD[torch.float32]
    for ours, theirs in zip(depthwise_backward(dy, x, weight, 1), gradients, strict=True):
        assert relative_error(ours, theirs) < GRADIENT[torch.float32]


@pytest.mark.gpu
def test_layer_on_a_gpu_is_pytorchs_own():
    layer = DepthwiseConv2d(6, (3, 3), 2).to(DEVICE)
    x = draw(2, 6, 12, 10).requires_grad_()
    dy = draw(2, 6, 12, 10)
    y, gradients = expected(x.detach(), layer.weight.detach(), layer.bias.detach(), 2, dy)
    compiled = torch.compile(layer, fullgraph=True)(x)
    compiled.backward(dy)
    assert relative_error(compiled.detach(), y) < FORWARD[torch.float32]
    for ours, theirs in zip((x.grad, layer.weight.grad, layer.bias.grad), gradients, strict=True):
        assert relative_error(ours, theirs) < GRADIENT[torch.float32]
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    torch.library.opcheck(
        torch.ops.dermomamba.depthwise.default, (x.detach(), layer.weight.detach(), layer.bias.detach(), 2)
    )
