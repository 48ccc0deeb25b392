"""The CPU's depthwise kernels against PyTorch's own in float64."""

from __future__ import annotations

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch.nn import functional as F

from nnunetv2_dermomamba.network.cross_scale import DILATIONS, AxialDepthwise, CrossScaleMambaBlock
from nnunetv2_dermomamba.ops.cpu_depthwise import axial_depthwise, depthwise_backward, depthwise_forward
from nnunetv2_dermomamba.ops.depthwise import DepthwiseConv2d

LAYOUTS = {
    "channels first": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "some of the channels, last": lambda x: torch.cat([x, x], 1).permute(0, 2, 3, 1).contiguous()
    .permute(0, 3, 1, 2)[:, x.shape[1] :],
}  # fmt: skip


def draw(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=kind)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 4, 9, 14), (3, 5, 7, 1), (1, 16, 1, 3), (2, 24, 12, 5), (1, 1, 3, 2)])
@pytest.mark.parametrize(
    ("kernel", "dilation"), [((1, 7), 1), ((7, 1), 3), ((3, 3), 2), ((9, 9), 1), ((1, 1), 1), ((3, 5), 7)]
)
def test_equals_pytorchs_own(kernel, dilation, shape, layout, kind):
    x, dy = (LAYOUTS[layout](draw(*shape, kind=kind)) for _ in range(2))
    weight, bias = draw(shape[1], 1, *kernel, kind=kind), draw(shape[1], kind=kind)
    leaves = [m.double().requires_grad_() for m in (x, weight, bias)]
    expected = F.conv2d(*leaves, padding="same", dilation=dilation, groups=shape[1])
    expected.backward(dy.double())
    y = depthwise_forward(x, weight, bias, dilation)
    assert y.stride() == torch.empty_like(x).stride()
    assert relative_error(y, expected.detach()) < FORWARD[kind]
    ours = depthwise_backward(dy, x, weight, dilation)
    assert ours[0].stride() == y.stride()
    for gradient, leaf in zip(ours, leaves, strict=True):
        assert gradient.dtype == kind
        assert relative_error(gradient, leaf.grad) < GRADIENT[kind]


def test_layer_in_training():
    layer, x, dy = DepthwiseConv2d(6, (3, 3), 2), draw(2, 6, 12, 10).requires_grad_(), draw(2, 6, 12, 10)
    torch.library.opcheck(
        torch.ops.dermomamba.depthwise.default,
        (x, layer.weight, layer.bias, 2),
        test_utils=["test_schema", "test_faketensor", "test_autograd_registration"],
    )
    y = layer(x)
    assert "dermomamba" in y.grad_fn.name()
    y.backward(dy)
    gradients = [x.grad, layer.weight.grad, layer.bias.grad]
    x.grad, layer.weight.grad, layer.bias.grad = None, None, None
    plain = F.conv2d(x, layer.weight, layer.bias, padding="same", dilation=2, groups=6)
    plain.backward(dy)
    for ours, theirs in zip(gradients, (x.grad, layer.weight.grad, layer.bias.grad), strict=True):
        assert relative_error(ours, theirs) < GRADIENT[torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 4, 9, 14), (3, 5, 30, 3), (2, 8, 1, 1)])
def test_axial_chains(shape):
    branches = [AxialDepthwise(shape[1], dilation) for dilation in DILATIONS]
    chunks = list(draw(shape[0], 4 * shape[1], *shape[2:]).chunk(4, dim=1))[:3]
    with torch.no_grad():
        result = axial_depthwise(chunks, [[b.conv_w, b.conv_h, b.conv] for b in branches])
        expected = torch.cat([b.double()(chunk.double()) for b, chunk in zip(branches, chunks, strict=True)])
    assert relative_error(result, expected) < FORWARD[torch.float32]


def test_block_in_inference_is_the_one_in_training():
    block, x = CrossScaleMambaBlock(16).eval(), draw(2, 16, 9, 14)
    trained = block(x)
    with torch.inference_mode():
        assert relative_error(block(x), trained.detach()) < FORWARD[torch.float32]
