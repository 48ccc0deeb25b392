"""The GPU's kernels of ``norm_linear`` against PyTorch's own in float64; without a GPU in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import nn
from torch.nn import functional as F
from triton_interpreter import interpreted_without_gpu

pytest.importorskip("triton")

from nnunetv2_dermomamba.ops.norm_linear import norm_linear
from nnunetv2_dermomamba.ops.triton_norm_linear import norm_linear_backward, norm_linear_forward

pytestmark = interpreted_without_gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
SHAPES = [((3, 5, 7, 4), 16), ((1, 130, 8), 4), ((2, 3, 12), 6), ((40, 32), 128), ((1, 1, 6), 24), ((19, 64), 256)]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def inputs(shape: tuple[int, ...], outputs: int, gated: bool) -> tuple[torch.Tensor | None, ...]:
    channels = shape[-1]
    gate = 3 * draw(*shape[:-1], 2 * channels)[..., channels:] if gated else None  # as of a projection cut in two
    return 2 + 3 * draw(*shape), gate, draw(channels), draw(channels), draw(outputs, channels) * channels**-0.5


def expected(x, gate, scale, shift, matrix, dy):
    leaves = [None if m is None else m.double().requires_grad_() for m in (x, gate, scale, shift, matrix)]
    x, gate, scale, shift, matrix = leaves
    z = F.layer_norm(x, scale.shape, scale, shift, EPS)
    y = F.linear(z if gate is None else z * F.silu(gate), matrix)
    y.backward(dy.double())
    return y.detach(), [None if m is None else m.grad for m in leaves]


@pytest.mark.parametrize(("shape", "outputs"), SHAPES)
@pytest.mark.parametrize("gated", [False, True])
def test_equals_pytorchs_own(shape, outputs, gated):
    x, gate, scale, shift, matrix = inputs(shape, outputs, gated)
    dy = draw(*shape[:-1], outputs)
    y, gradients = expected(x, gate, scale, shift, matrix, dy)
    result = norm_linear_forward(x, gate, scale, shift, EPS, matrix, torch.float32)
    assert relative_error(result, y) < FORWARD[torch.float32]
    ours = norm_linear_backward(dy, x, gate, scale, shift, EPS, matrix)
    for one, theirs in zip(ours, gradients, strict=True):
        assert (one is None) == (theirs is None)
        if one is not None:
            assert one.is_contiguous()  # what the fake implementation promises
            assert relative_error(one, theirs) < GRADIENT[torch.float32]


@pytest.mark.parametrize("gated", [False, True])
def test_several_maps_are_added_first(gated):
    x, gate, scale, shift, matrix = inputs((4, 3, 5, 7, 8), 4, gated)
    gate = gate[0] if gated else None
    result = norm_linear_forward(x, gate, scale, shift, EPS, matrix, torch.float32, maps=4)
    assert relative_error(result, norm_linear_forward(x.sum(0), gate, scale, shift, EPS, matrix, torch.float32)) < 1e-5


def test_rows_without_variance_stay_finite():
    x = torch.full((5, 8), 7.0, device=DEVICE)
    ones, matrix, dy = torch.ones(8, device=DEVICE), draw(4, 8), draw(5, 4)
    y = norm_linear_forward(x, None, ones, ones, EPS, matrix, torch.float32)
    torch.testing.assert_close(y, matrix.sum(1).expand(5, 4))
    assert all(m is None or m.isfinite().all() for m in norm_linear_backward(dy, x, None, ones, ones, EPS, matrix))


def test_half_precision_factors_and_float32_sums():
    x, gate, scale, shift, matrix = inputs((50, 16), 8, True)
    y = norm_linear_forward(x.half(), gate.half(), scale, shift, EPS, matrix, torch.float16)
    z = F.layer_norm(x.half().float(), (16,), scale, shift, EPS) * F.silu(gate.half().float())
    reference = z.half().double() @ matrix.half().double().t()
    assert y.dtype == torch.float16
    assert relative_error(y, reference) < 1e-3  # half a unit in float16's last place is 5e-4
    gradients = norm_linear_backward(draw(50, 8).half(), x.half(), gate.half(), scale, shift, EPS, matrix)
    assert [m.dtype for m in gradients] == [torch.float16] * 2 + [torch.float32] * 3


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
def test_layer_on_a_gpu_is_pytorchs_own(gated):
    x, gate, scale, shift, matrix = inputs((4, 6, 16), 32, gated)
    norm, linear = nn.LayerNorm(16, eps=EPS).to(DEVICE), nn.Linear(16, 32, bias=False).to(DEVICE)
    norm.load_state_dict({"weight": scale, "bias": shift})
    linear.load_state_dict({"weight": matrix})
    dy = draw(4, 6, 32)
    y, gradients = expected(x, gate, scale, shift, matrix, dy)
    leaves = [x.requires_grad_()] + ([] if gate is None else [gate.requires_grad_()])
    compiled = torch.compile(norm_linear, fullgraph=True)(x, norm, linear, gate)
    compiled.backward(dy)
    assert relative_error(compiled.detach(), y) < FORWARD[torch.float32]
    ours = [m.grad for m in (*leaves, norm.weight, norm.bias, linear.weight)]
    for one, theirs in zip(ours, [m for m in gradients if m is not None], strict=True):
        assert relative_error(one, theirs) < GRADIENT[torch.float32]
    with torch.autocast("cuda", torch.bfloat16):
        assert norm_linear(x, norm, linear, gate).dtype == torch.bfloat16
    arguments = (x.detach(), None if gate is None else gate.detach(), scale, shift, EPS, matrix, torch.float32, 1)
    torch.library.opcheck(torch.ops.dermomamba.norm_linear.default, arguments)
