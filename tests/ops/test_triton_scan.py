"""The Triton kernels against the step-by-step scan in float64: compiled where CUDA is, interpreted elsewhere."""

import importlib
import os

import pytest
import torch
from scan_checks import DEVICE, check, cotangent, in_float64, maps, sequences
from triton_interpreter import interpreted_without_gpu

if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
pytest.importorskip("triton", minversion="3.3")

from nnunetv2_dermomamba.ops import triton_common, triton_scan, triton_scan_2d, triton_scan_2d_rows
from nnunetv2_dermomamba.ops.composed import selective_scan_2d_composed
from nnunetv2_dermomamba.ops.naive import selective_scan_naive

pytestmark = interpreted_without_gpu
T, SUB = (triton_common.CHUNK, triton_common.SUB) if DEVICE.type == "cuda" else (16, 8)
ROWS_T = triton_scan_2d_rows.SHORT_CHUNK if DEVICE.type == "cuda" else 16


@pytest.fixture(autouse=True)
def small_chunks_and_poisoned_memory(monkeypatch):
    """Chunks of several sub-blocks, short where steps are interpreted; what a kernel leaves unwritten is NaN."""
    monkeypatch.setattr(triton_common, "CHUNK", T)
    monkeypatch.setattr(triton_common, "LONG", 0)
    monkeypatch.setattr(triton_common, "SUB", SUB)
    monkeypatch.setattr(triton_scan_2d_rows, "SHORT_CHUNK", ROWS_T)
    torch.use_deterministic_algorithms(True, warn_only=True)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    yield
    torch.use_deterministic_algorithms(False)


def check_1d(inputs, softplus=True):
    leaves = in_float64(inputs)
    reference = selective_scan_naive(**leaves, delta_softplus=softplus)
    dy = cotangent(reference.shape)
    y, states = triton_scan.scan_1d_forward(*inputs.values(), softplus)
    groups, state = inputs["B"].shape[1:3]
    assert list(states.shape) == triton_scan.states_shape_1d(inputs["u"], state, groups)
    check(y, triton_scan.scan_1d_backward(dy, *inputs.values(), softplus, states), reference, dy, leaves)


def check_2d(inputs):
    leaves = in_float64(inputs)
    reference = selective_scan_2d_composed(**leaves)
    dy = cotangent(reference.shape)
    y, states = triton_scan.scan_2d_forward(*inputs.values())
    assert list(states.shape) == triton_scan.states_shape_2d(inputs["x"], 1, inputs["A"].shape[1])
    check(y, triton_scan.scan_2d_backward(dy, *inputs.values(), states), reference, dy, leaves)


@pytest.mark.parametrize("length", [1, 2, T - 1, T, T + 1, 31])
def test_1d_lengths_around_a_chunk(length):
    check_1d(sequences(1, 3, length, 1, 4))


@pytest.mark.parametrize(("dim", "groups", "state"), [(1, 1, 1), (8, 2, 5), (12, 3, 16), (130, 1, 2)])
def test_1d_any_channels_groups_and_states(dim, groups, state):
    check_1d(sequences(2, dim, T + 3, groups, state))


def test_1d_sequence_of_several_work_items():
    tile = triton_common.tile_for(32, 16, 9 * T, stretch=2)
    assert 2 * tile.span < 9 * T - 3
    check_1d(sequences(1, 32, 9 * T - 3, 1, 16))


def test_1d_without_skip_bias_and_softplus():
    inputs = sequences(1, 4, 2 * T + 1, 1, 4)
    inputs |= {"delta": inputs["delta"].abs(), "D": None, "delta_bias": None}
    check_1d(inputs, softplus=False)


@pytest.mark.parametrize("argument", [-50.0, 50.0])
def test_1d_extreme_decays_and_steps(argument):
    inputs = sequences(1, 4, 2 * T + 1, 1, 4)
    inputs["A"][::2] = -1e3
    inputs["delta"] += argument
    check_1d(inputs)


def test_1d_longer_than_its_offsets_reach_is_refused():
    u = torch.empty(1, 128, 2**24, device="meta")
    with pytest.raises(ValueError, match="too long for the triton backend"):
        triton_scan.states_shape_1d(u, 16, 1)


def test_1d_zero_input_gives_finite_gradients():
    inputs = {k: torch.zeros_like(v) for k, v in sequences(1, 4, T + 1, 1, 4).items()}
    y, states = triton_scan.scan_1d_forward(*inputs.values(), True)
    gradients = triton_scan.scan_1d_backward(torch.ones_like(y), *inputs.values(), True, states)
    assert all(torch.isfinite(m).all() for m in (y, *gradients))


def test_1d_half_precision_input_is_computed_in_float32():
    inputs = sequences(1, 4, T + 1, 1, 4)
    half = {k: v.half() if k in ("u", "delta", "B", "C") else v for k, v in inputs.items()}
    rounded = {k: v.float() for k, v in half.items()}
    assert torch.equal(
        triton_scan.scan_1d_forward(*half.values(), True)[0], triton_scan.scan_1d_forward(*rounded.values(), True)[0]
    )


@pytest.mark.parametrize(
    ("height", "width", "d", "rank", "state"),
    [(1, 1, 1, 1, 1), (1, 2 * T + 1, 3, 1, 4), (T + 3, 1, 2, 2, 3), (3, 4, 12, 1, 16), (1, 3, 16, 2, 2)],
)
def test_2d_shapes_fused(height, width, d, rank, state):
    assert d <= triton_scan_2d.NARROW
    check_2d(maps(1, height, width, d, rank, state))


@pytest.mark.parametrize(
    ("height", "width", "d", "rank", "state"),
    [
        (1, 1, 17, 1, 16),
        (1, ROWS_T - 1, 33, 2, 2),
        (ROWS_T + 1, 1, 20, 1, 5),
        (1, ROWS_T, 32, 1, 16),  # nothing is padded, one chunk
        (4, ROWS_T // 2, 32, 1, 32),  # nor here, and several; two warps
        (2, ROWS_T, 64, 2, 16),
        (3, 5, 100, 4, 1),
        (1, ROWS_T + 1, 128, 4, 4),
    ],
)
def test_2d_shapes_rows(height, width, d, rank, state):
    assert triton_scan_2d.NARROW < d <= triton_common.MAX_BLOCK
    check_2d(maps(1, height, width, d, rank, state))


def test_2d_batch_of_two_fused():
    check_2d(maps(2, 3, 5, 4, 1, 4))


@pytest.mark.parametrize(("d", "samples"), [(20, 1), (64, 2)])
def test_2d_batch_of_three_in_slices_rows(monkeypatch, d, samples):
    height, width, state = 2, 3, 4
    rows_of_a_sample = height * width * 4 * (d + 2 * state) * 4
    monkeypatch.setattr(triton_scan_2d_rows, "SLICE_BYTES", samples * rows_of_a_sample)
    plan = triton_scan_2d_rows._Plan(3, height, width, d, state)
    assert [s.stop - s.start for s in plan.slices] == ([1, 1, 1] if samples == 1 else [2, 1])
    check_2d(maps(3, height, width, d, 1, state))


@pytest.mark.parametrize("d", [4, 20])
def test_2d_positions_too_many_for_float_quotients(monkeypatch, d):
    """With 64-bit offsets and divisions of integers, as a map of millions of positions has them."""
    monkeypatch.setattr(triton_scan_2d, "SMALL", 0)
    monkeypatch.setattr(triton_scan_2d_rows, "SMALL", 0)
    check_2d(maps(1, 3, 5, d, 1, 2))


def test_2d_more_channels_than_a_program_holds():
    check_2d(maps(1, 2, 3, triton_common.MAX_BLOCK + 1, 2, 2))


@pytest.mark.parametrize(
    ("half", "d"), [(torch.float16, 8), (torch.bfloat16, 8), (torch.float16, 20), (torch.bfloat16, 64)]
)
def test_2d_half_precision_input_is_computed_in_float32(half, d):
    inputs = maps(1, 2, 3, d, 1, 16 if d < 64 else 4)
    rounded = {**inputs, "x": inputs["x"].to(half).float()}
    inputs["x"] = inputs["x"].to(half)
    y, states = triton_scan.scan_2d_forward(*inputs.values())
    expected, expected_states = triton_scan.scan_2d_forward(*rounded.values())
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    gradients = triton_scan.scan_2d_backward(y, *inputs.values(), states)
    for ours, theirs in zip(
        gradients, triton_scan.scan_2d_backward(y, *rounded.values(), expected_states), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "d"), [(T, 4), (ROWS_T, 24)])
def test_2d_extreme_decays_and_steps(width, d):
    inputs = maps(1, 2, width, d, 1, 4)
    inputs["A"][::3] = -1e3
    inputs["dt_projs_bias"][0] = 50.0
    inputs["dt_projs_bias"][1] = -50.0
    check_2d(inputs)


@pytest.mark.parametrize("d", [4, 20])
def test_2d_zero_input_gives_finite_gradients(d):
    inputs = {k: torch.zeros_like(v) for k, v in maps(1, 2, 3, d, 1, 4).items()}
    y, states = triton_scan.scan_2d_forward(*inputs.values())
    gradients = triton_scan.scan_2d_backward(torch.ones_like(y), *inputs.values(), states)
    assert all(torch.isfinite(m).all() for m in (y, *gradients))


@pytest.mark.parametrize("d", [4, 48])
def test_2d_repeats_bit_for_bit(d):
    inputs = maps(1, 2, 3, d, 1, 4)
    first, second = (triton_scan.scan_2d_forward(*inputs.values()) for _ in range(2))
    dy = torch.ones_like(first[0])
    pairs = (triton_scan.scan_2d_backward(dy, *inputs.values(), m[1]) for m in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="TF32 needs CUDA")
@pytest.mark.parametrize("d", [8, 32, 128])
def test_2d_is_precise_where_tf32_is_allowed(d):
    torch.set_float32_matmul_precision("high")
    try:
        check_2d(maps(2, 9, 17, d, 4, 16))
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("d", [8, 64])
def test_2d_in_a_cuda_graph(d):
    inputs = maps(2, 9, 17, d, 1, 16)
    expected, states = triton_scan.scan_2d_forward(*inputs.values())
    triton_scan.scan_2d_backward(expected, *inputs.values(), states)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, states = triton_scan.scan_2d_forward(*inputs.values())
        triton_scan.scan_2d_backward(y, *inputs.values(), states)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_an_old_triton_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.2.0")
    with pytest.raises(ImportError, match=r"PyTorch 2\.7"):
        importlib.reload(triton_scan)
