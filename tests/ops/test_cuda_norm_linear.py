"""The CUDA kernels of ``norm_linear`` against PyTorch's own in float64: on the GPU, elsewhere emulated."""

from __future__ import annotations

import shutil

import pytest
import torch
from tolerances import FORWARD, GRADIENT, relative_error
from torch import Tensor, nn
from torch.nn import functional as F

from nnunetv2_dermomamba.ops import cuda_norm_linear
from nnunetv2_dermomamba.ops import norm_linear as operator
from nnunetv2_dermomamba.ops.cuda_norm_linear import norm_linear_backward, norm_linear_forward, serves

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EPS = 1e-6
KINDS = [torch.float32, torch.float16, torch.bfloat16]
IN, OUT = (4, 16, False), (8, 4, True)
"""Channels c and m, and whether there is a gate, of the first stage's projections."""
pytestmark = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")


@pytest.fixture(autouse=True)
def emulated_launches(monkeypatch, emulate):
    """Few blocks walk over rows."""
    monkeypatch.setattr(cuda_norm_linear, "FORWARD_BLOCKS", 5)
    monkeypatch.setattr(cuda_norm_linear, "BACKWARD_BLOCKS", 3)
    emulate(cuda_norm_linear)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE, dtype)


def inputs(rows: tuple[int, ...], case, x_kind=torch.float32, gate_kind=torch.float32) -> list[Tensor | None]:
    """x, gate, scale, shift and matrix; the gate is the second half of a projection."""
    channels, outputs, gated = case
    gate = 3 * draw(*rows, 2 * channels) if gated else None
    gate = None if gate is None else gate.to(gate_kind)[..., channels:]
    x = (2 + 3 * draw(*rows, channels)).to(x_kind)
    return [x, gate, 1 + draw(channels), draw(channels), draw(outputs, channels) * channels**-0.5]


def reference(x, gate, scale, shift, matrix, eps=EPS):
    z = F.layer_norm(x, scale.shape, scale, shift, eps)
    return F.linear(z if gate is None else z * F.silu(gate), matrix)


def check(tensors, kind=torch.float32):
    x, gate, scale, shift, matrix = tensors
    leaves = [None if m is None else m.double().requires_grad_() for m in tensors]
    expected = reference(*leaves)
    dy = draw(*expected.shape, dtype=kind)
    expected.backward(dy.double())

    def rounded(kind):  # a result is rounded once
        return 0.0 if kind == torch.float32 else torch.finfo(kind).eps

    y = norm_linear_forward(x, gate, scale, shift, EPS, matrix, kind)
    assert y.dtype == kind
    assert y.is_contiguous()
    assert y.shape == expected.shape
    assert relative_error(y, expected.detach()) < FORWARD[torch.float32] + rounded(kind)
    gradients = norm_linear_backward(dy, x, gate, scale, shift, EPS, matrix)
    for ours, leaf, tensor in zip(gradients, leaves, tensors, strict=True):
        assert (ours is None) == (leaf is None)
        if leaf is not None:
            assert ours.dtype == tensor.dtype
            assert ours.shape == tensor.shape
            assert ours.is_contiguous()
            assert relative_error(ours, leaf.grad) < GRADIENT[torch.float32] + rounded(tensor.dtype)


@pytest.mark.parametrize("case", [IN, OUT])
@pytest.mark.parametrize("rows", [(1,), (7,), (3, 100), (2, 50, 50)])
def test_equals_pytorchs_own(rows, case):
    check(inputs(rows, case))


@pytest.mark.parametrize("case", [(4, 4, True), (4, 12, False), (8, 8, True)])
def test_other_sizes(case):
    check(inputs((300,), case))
    check(inputs((300,), case, torch.float16, torch.float16), torch.float16)


@pytest.mark.parametrize("case", [IN, OUT])
@pytest.mark.parametrize("result", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_types_of_x_and_of_gate_and_result_are_independent(kind, result, case):
    check(inputs((3, 100), case, kind, result), result)


@pytest.mark.parametrize("case", [(4, 16, True), OUT])
def test_any_order_in_memory(case):
    x, gate, *parameters = inputs((20, 30), case)
    check([x.transpose(0, 1), gate.transpose(0, 1), *parameters])
    check([x.mT.contiguous().mT, gate, *parameters])  # channels are not adjacent
    channels = case[0]
    odd = draw(600, channels + 1)[:, 1:].unflatten(0, (20, 30))  # rows that cannot be read at once
    shifted = draw(600 * channels + 1)[1:].view(20, 30, channels)
    check([odd, shifted, *parameters])


@pytest.mark.parametrize("case", [IN, OUT])
def test_several_maps_are_added_first(case):
    x, gate, *parameters = inputs((4, 3, 100), case)
    gate = None if gate is None else gate[0].half()
    y = norm_linear_forward(x, gate, *parameters[:2], EPS, parameters[2], torch.float32, maps=4)
    expected = reference(x.double().sum(0), None if gate is None else gate.double(), *(p.double() for p in parameters))
    assert y.shape == expected.shape
    assert relative_error(y, expected) < FORWARD[torch.float32]


@pytest.mark.parametrize("case", [IN, OUT])
def test_rows_without_variance_stay_finite(case):
    channels, outputs, _ = case
    x, ones, matrix = torch.full((5, channels), 7.0, device=DEVICE), draw(channels) * 0 + 1, draw(outputs, channels)
    y = norm_linear_forward(x, None, ones, ones, EPS, matrix, torch.float32)
    torch.testing.assert_close(y, matrix.sum(1).expand(5, outputs))
    gradients = norm_linear_backward(draw(5, outputs), x, None, ones, ones, EPS, matrix)
    assert all(m is None or m.isfinite().all() for m in gradients)


def test_large_gates_are_closed_or_open():
    x, gate, *parameters = inputs((3, 100), OUT)
    check([x, gate.sign() * 200, *parameters])


def test_nan_stays_in_its_row():
    x, _, scale, shift, matrix = inputs((70,), IN)
    x[3, 2] = float("nan")
    y = norm_linear_forward(x, None, scale, shift, EPS, matrix, torch.float32)
    assert y[3].isnan().all()
    assert y.isnan().sum() == 16


@pytest.mark.parametrize("case", [IN, OUT])
def test_results_repeat(case):
    x, gate, scale, shift, matrix = inputs((2, 50, 50), case)
    dy = draw(2, 50, 50, case[1])
    first, *others = (norm_linear_backward(dy, x, gate, scale, shift, EPS, matrix) for _ in range(3))
    for other in others:
        assert all(a is None or torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_serves_few_channels():
    x, matrix = torch.empty(3, 8, device="meta"), torch.empty(8, 8, device="meta")
    assert serves(x, None, matrix)
    assert serves(x.half(), x.bfloat16(), matrix)
    assert not serves(x, None, torch.empty(6, 8, device="meta"))
    assert not serves(x, None, torch.empty(16, 8, device="meta"))
    assert not serves(x[:, :6], None, matrix[:, :6])
    assert not serves(x, x.double(), matrix)
    assert not serves(x[:0], None, matrix)
    assert not serves(torch.empty(2**27, 8, device="meta"), None, matrix)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_the_chosen_backends_kernels_serve(monkeypatch, backend):
    triton_norm_linear = pytest.importorskip("nnunetv2_dermomamba.ops.triton_norm_linear")
    monkeypatch.setattr(operator, "choose_backend", lambda device, dtype: backend)
    x, matrix = torch.empty(3, 8, device="meta"), torch.empty(4, 8, device="meta")
    assert operator._gpu_kernels(x, None, matrix) is (cuda_norm_linear if backend == "cuda" else triton_norm_linear)
    assert operator._gpu_kernels(x[:, :6], None, matrix[:, :6]) is triton_norm_linear


@pytest.mark.gpu
@pytest.mark.parametrize("case", [IN, OUT])
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_layer_on_a_gpu_is_what_the_portable_backend_computes(monkeypatch, kind, case):
    channels, outputs, _ = case
    x, gate, scale, shift, matrix = inputs((2, 40, 36), case)
    norm, linear = nn.LayerNorm(channels, eps=EPS).to(DEVICE), nn.Linear(channels, outputs, bias=False).to(DEVICE)
    norm.load_state_dict({"weight": scale, "bias": shift})
    linear.load_state_dict({"weight": matrix})
    tolerance = GRADIENT[torch.float32] if kind == torch.float32 else 16 * torch.finfo(kind).eps
    call = operator.norm_linear
    results = []
    for run, backend in ((call, "torch"), (call, "cuda"), (torch.compile(call, fullgraph=True), "cuda")):
        monkeypatch.setenv("DERMOMAMBA_BACKEND", backend)
        leaves = [m.detach().clone().requires_grad_() for m in (x, gate) if m is not None]
        with torch.autocast("cuda", torch.float16, enabled=kind == torch.float16):
            y = run(leaves[0], norm, linear, leaves[1] if gate is not None else None)
        (y.float() * draw(*y.shape).sin()).sum().backward()
        results.append([y.detach(), *(m.grad for m in (*leaves, norm.weight, norm.bias, linear.weight))])
        norm.zero_grad()
        linear.zero_grad()
    for ours in results[1:]:
        for one, theirs in zip(ours, results[0], strict=True):
            assert relative_error(one, theirs) < tolerance
    arguments = x.requires_grad_(), gate, scale, shift, EPS, matrix, torch.float32, 1
    torch.library.opcheck(torch.ops.dermomamba.norm_linear.default, arguments)
