"""The CUDA kernels against the step-by-step scan in float64: on the GPU where there is one, elsewhere emulated."""

import ctypes
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from scan_checks import DEVICE, check, cotangent, in_float64, maps, sequences
from tolerances import FORWARD, relative_error

from nnunetv2_dermomamba.ops import (
    cuda_block,
    cuda_channel_sums,
    cuda_convolution,
    cuda_depthwise,
    cuda_gate_convolution,
    cuda_norm_linear,
    cuda_scan_1d,
    cuda_scan_2d,
    nvrtc,
    selective_scan,
    selective_scan_2d,
)
from nnunetv2_dermomamba.ops.composed import selective_scan_2d_composed
from nnunetv2_dermomamba.ops.naive import selective_scan_naive

SUB = cuda_block.SUB
emulated = pytest.mark.skipif(DEVICE.type == "cpu" and shutil.which("g++") is None, reason="needs CUDA or g++")


@pytest.fixture(autouse=True)
def emulated_launches(monkeypatch, emulate):
    """Chunks of several sub-blocks."""
    monkeypatch.setattr(cuda_block, "FULL", 256)
    monkeypatch.setattr(cuda_scan_2d, "LONG", 3)
    emulate(cuda_scan_1d, cuda_scan_2d)


def check_1d(inputs, softplus=True):
    leaves = in_float64(inputs)
    reference = selective_scan_naive(**leaves, delta_softplus=softplus)
    dy = cotangent(reference.shape)
    y, states = cuda_scan_1d.scan_1d_forward(*inputs.values(), softplus)
    groups, state = inputs["B"].shape[1:3]
    assert cuda_scan_1d.serves_1d(inputs["u"], groups, state)
    assert list(states.shape) == cuda_scan_1d.states_shape_1d(inputs["u"], state, groups)
    check(y, cuda_scan_1d.scan_1d_backward(dy, *inputs.values(), softplus, states), reference, dy, leaves)


def check_2d(inputs):
    leaves = in_float64(inputs)
    reference = selective_scan_2d_composed(**leaves)
    dy = cotangent(reference.shape)
    y, states = cuda_scan_2d.scan_2d_forward(*inputs.values())
    rank, state = inputs["dt_projs_weight"].shape[2], inputs["A"].shape[1]
    assert cuda_scan_2d.serves_2d(inputs["x"], rank, state)
    assert list(states.shape) == cuda_scan_2d.states_shape_2d(inputs["x"], rank, state)
    check(y, cuda_scan_2d.scan_2d_backward(dy, *inputs.values(), states), reference, dy, leaves)


@emulated
@pytest.mark.parametrize("length", [1, 2, SUB - 1, SUB, SUB + 1, 61])
def test_1d_lengths_around_a_sub_block(length):
    check_1d(sequences(1, 3, length, 1, 4))


@emulated
@pytest.mark.parametrize("channels", [8, 16, 32, 64, 128])
def test_1d_whole_blocks_of_every_width(channels):
    check_1d(sequences(1, 2 * channels, 4 * SUB + 4, 2, 16))


@emulated
@pytest.mark.parametrize(("dim", "groups", "state"), [(1, 1, 1), (12, 3, 16), (24, 2, 5), (130, 1, 2)])
def test_1d_any_channels_groups_and_states(dim, groups, state):
    check_1d(sequences(2, dim, 35, groups, state))


@emulated
def test_1d_sequence_of_several_blocks():
    inputs = sequences(1, 8, 1100, 1, 16)
    assert cuda_scan_1d.Plan(inputs["u"], 1, 16, True).spans > 1
    check_1d(inputs)


@emulated
def test_few_sequences_have_chunks_of_one_sub_block(monkeypatch):
    monkeypatch.setattr(cuda_block, "FULL", 1 << 16)
    assert cuda_scan_1d.Plan(torch.empty(1, 8, 200), 1, 16, True).sizes.subs == 1
    check_1d(sequences(1, 8, 200, 1, 16))
    check_2d(maps(1, 16, 17, 8, 1, 16))


@emulated
@pytest.mark.parametrize("warps", [1, 2, 16])
def test_more_chunks_than_a_warp_combines_at_once(monkeypatch, warps):
    monkeypatch.setattr(cuda_block, "FULL", 1 << 16)
    monkeypatch.setattr(cuda_scan_1d, "COMBINING_WARPS", warps)
    assert cuda_scan_1d.Plan(torch.empty(2, 24, 1100), 3, 16, True).chunks > 64
    check_1d(sequences(2, 24, 1100, 3, 16))


@emulated
def test_summaries_of_wide_blocks_and_maps_of_a_batch():
    check_1d(sequences(1, 64, 300, 1, 16))
    check_2d(maps(2, 18, 18, 64, 2, 16))
    check_2d(maps(3, 40, 31, 8, 1, 16))


@emulated
def test_1d_without_skip_bias_and_softplus():
    inputs = sequences(1, 8, 40, 1, 16)
    inputs |= {"delta": inputs["delta"].abs(), "D": None, "delta_bias": None}
    check_1d(inputs, softplus=False)


@emulated
@pytest.mark.parametrize("argument", [-50.0, 50.0])
def test_1d_extreme_decays_and_steps(argument):
    inputs = sequences(1, 4, 40, 1, 4)
    inputs["A"][::2] = -1e3
    inputs["delta"] += argument
    check_1d(inputs)


@emulated
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_1d_half_precision_input_is_computed_in_float32(kind):
    inputs = sequences(1, 8, 36, 1, 16)
    half = {k: v.to(kind) if k in ("u", "delta", "B", "C") else v for k, v in inputs.items()}
    rounded = {k: v.float() for k, v in half.items()}
    assert torch.equal(
        cuda_scan_1d.scan_1d_forward(*half.values(), True)[0], cuda_scan_1d.scan_1d_forward(*rounded.values(), True)[0]
    )


@emulated
@pytest.mark.parametrize(
    ("height", "width", "d", "rank", "state"),
    [(1, 1, 1, 1, 1), (1, 33, 3, 1, 4), (35, 1, 2, 2, 3), (3, 4, 12, 1, 16), (5, 3, 20, 2, 2), (2, 9, 100, 8, 5)],
)
def test_2d_any_shapes(height, width, d, rank, state):
    check_2d(maps(1, height, width, d, rank, state))


@emulated
@pytest.mark.parametrize(("channels", "rank"), [(8, 1), (16, 1), (32, 1), (64, 2), (128, 4)])
def test_2d_whole_blocks_of_every_width(channels, rank):
    check_2d(maps(2 if channels == 8 else 1, 5, 9, channels, rank, 16))


@emulated
def test_2d_map_of_several_blocks():
    inputs = maps(1, 40, 31, 8, 1, 16)
    assert cuda_scan_2d.Plan(inputs["x"], 1, 16).spans > 1
    check_2d(inputs)


@emulated
@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_2d_half_precision_input_is_computed_in_float32(kind):
    half = maps(1, 3, 7, 16, 1, 16)
    half["x"] = half["x"].to(kind)
    wide = half | {"x": half["x"].float()}
    results = []
    for inputs in (half, wide):
        y, states = cuda_scan_2d.scan_2d_forward(*inputs.values())
        results.append([y, *cuda_scan_2d.scan_2d_backward(cotangent(y.shape), *inputs.values(), states)])
    check_2d(wide)
    results[1][1] = results[1][1].to(kind)  # the gradient of x has its type
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, other) < FORWARD[torch.float32]


@emulated
def test_2d_extreme_decays_and_steps():
    inputs = maps(1, 2, 20, 4, 1, 4)
    inputs["A"][::3] = -1e3
    inputs["dt_projs_bias"][::2] = 50.0  # also in reverse, where positions that do not exist come first
    inputs["dt_projs_bias"][1::2] = -50.0
    check_2d(inputs)


@emulated
def test_zero_input_gives_finite_gradients():
    inputs = {k: torch.zeros_like(v) for k, v in maps(1, 2, 3, 4, 1, 4).items()}
    y, states = cuda_scan_2d.scan_2d_forward(*inputs.values())
    gradients = cuda_scan_2d.scan_2d_backward(torch.ones_like(y), *inputs.values(), states)
    assert all(torch.isfinite(m).all() for m in (y, *gradients))


@emulated
def test_2d_repeats_bit_for_bit():
    inputs = maps(1, 9, 17, 8, 1, 16)
    first, second = (cuda_scan_2d.scan_2d_forward(*inputs.values()) for _ in range(2))
    dy = torch.ones_like(first[0])
    pairs = (cuda_scan_2d.scan_2d_backward(dy, *inputs.values(), m[1]) for m in (first, second))
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


def test_2d_needs_shared_memory_for_a_block(monkeypatch):
    x = torch.empty(1, 16, 20, 128, device=DEVICE)
    limit = cuda_scan_2d._backward_bytes(cuda_block.Block(128))
    monkeypatch.setattr(cuda_scan_2d, "max_shared", lambda like: limit)
    assert cuda_scan_2d.serves_2d(x, 1, 4)
    monkeypatch.setattr(cuda_scan_2d, "max_shared", lambda like: limit - 1)
    assert not cuda_scan_2d.serves_2d(x, 1, 4)


@emulated
def test_2d_a_chunk_of_an_odd_number_of_sub_blocks():
    inputs = maps(1, 5, 9, 64, 1, 16)
    assert cuda_scan_2d.Plan(inputs["x"], 1, 16).subs == 3
    check_2d(inputs)


@emulated
@pytest.mark.parametrize(("channels", "rank"), [(32, 1), (64, 2)])
def test_2d_whole_paths_of_a_batch(monkeypatch, channels, rank):
    inputs = maps(2, 9, 8, channels, rank, 16)
    assert cuda_scan_2d.Plan(inputs["x"], rank, 16).chunks > 1
    monkeypatch.setattr(cuda_block, "WHOLE_SEQUENCES", 8 * 2 * channels)
    assert cuda_scan_2d.Plan(inputs["x"], rank, 16).chunks == 1
    check_2d(inputs)


@emulated
@pytest.mark.parametrize(
    ("batch", "height", "width", "d", "state"),
    [(2, 5, 9, 8, 16), (1, 40, 31, 8, 16), (1, 13, 17, 16, 16), (3, 7, 9, 12, 5), (1, 33, 1, 3, 16), (1, 1, 1, 1, 1)],
)
@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_2d_paths_of_few_channels_walked_without_summaries(monkeypatch, batch, height, width, d, state, kind):
    monkeypatch.setattr(cuda_scan_2d, "WHOLE_PATHS", 1)
    inputs = maps(batch, height, width, d, 1, state)
    inputs["x"] = inputs["x"].to(kind).float()
    assert cuda_scan_2d.Plan(inputs["x"], 1, state).walks_paths
    check_2d(inputs)
    half = inputs | {"x": inputs["x"].to(kind)}
    y = [cuda_scan_2d.scan_2d_forward(*m.values())[0] for m in (inputs, half)]
    assert relative_error(*y) < FORWARD[torch.float32]


@emulated
def test_2d_directions_add_up():
    inputs = maps(2, 5, 9, 8, 1, 16)
    apart = cuda_scan_2d.scan_2d_directions(*inputs.values())
    assert apart.shape == (4, *inputs["x"].shape)
    assert relative_error(apart.sum(0), cuda_scan_2d.scan_2d_forward(*inputs.values())[0]) < FORWARD[torch.float32]


@emulated
@pytest.mark.parametrize("channels", [8, 20, 32])
def test_2d_gradients_of_one_direction_after_the_other(monkeypatch, channels):
    inputs = maps(2, 11, 13, channels, 1, 16)
    inputs["x"] = inputs["x"].half().float()
    half = inputs | {"x": inputs["x"].half()}
    monkeypatch.setattr(cuda_scan_2d, "MANY_BLOCKS", 2)
    assert cuda_scan_2d.Plan(inputs["x"], 1, 16).directions == 1
    check_2d(inputs)
    y, states = cuda_scan_2d.scan_2d_forward(*inputs.values())
    dy = cotangent(y.shape)
    dx, rounded = (cuda_scan_2d.scan_2d_backward(dy, *m.values(), states)[0] for m in (inputs, half))
    assert rounded.dtype == torch.float16
    assert relative_error(dx.half(), rounded) < 1e-6


@emulated
def test_2d_states_that_nobody_wants_are_not_written():
    inputs = maps(1, 5, 9, 8, 1, 16)
    y, states = cuda_scan_2d.scan_2d_forward(*inputs.values(), keep=False)
    assert states.numel() == 0
    assert torch.equal(y, cuda_scan_2d.scan_2d_forward(*inputs.values())[0])


@pytest.mark.parametrize(("rank", "state", "d"), [(9, 16, 8), (1, 17, 8), (1, 16, 129)])
def test_2d_other_calls_are_left_to_triton(rank, state, d):
    assert cuda_scan_2d.serves_2d(torch.empty(1, 4, 4, 8, device=DEVICE), 8, 16)
    assert not cuda_scan_2d.serves_2d(torch.empty(1, 4, 4, d, device=DEVICE), rank, state)


def test_1d_more_states_are_left_to_triton():
    u = torch.empty(1, 4, 4, device=DEVICE)
    assert cuda_scan_1d.serves_1d(u, 1, 16)
    assert not cuda_scan_1d.serves_1d(u, 1, 17)


def nvrtc_alone():
    """NVRTC without the driver, as PyTorch's CUDA wheels bring it; None without them."""
    for file in sorted(Path(torch.__file__).parents[1].glob("nvidia/*/lib/libnvrtc.so.*")):
        return ctypes.CDLL(str(file))
    return None


@pytest.mark.skipif(nvrtc_alone() is None, reason="needs NVRTC, which comes with PyTorch for CUDA")
@pytest.mark.parametrize("channels", [8, 128])
def test_sources_compile_for_gpus_without_any_header(channels):
    scan = [f"-DD={channels}"]
    few_channels = ["CHANNELS=8", "OUTPUTS=4", "GATE=1", "RESULT=1", "GATED=1", "MAPS=1"]
    any_kind, half = (0, 1, 2), (1, 2)
    for files, more, kinds in (
        (cuda_scan_1d.FILES, [*scan, "-DSOFTPLUS=1"], any_kind),
        (cuda_scan_2d.FILES, scan, any_kind),
        (cuda_depthwise.FILES, ["-DTILE=32"], any_kind),
        (cuda_gate_convolution.FILES, ["-DROWS=4"], any_kind),
        (cuda_norm_linear.FILES, [f"-D{name}" for name in few_channels], any_kind),
        (cuda_convolution.FILES, ["-DFROM=16", "-DTO=32"], half),
        (cuda_channel_sums.FILES, ["-DCHANNELS=32"], half),
    ):
        for kind in kinds:
            options = [f"-DINPUT={kind}", f"-DWHOLE={kind % 2}", "-std=c++17", *more]
            options.append(f"--gpu-architecture=sm_{(80, 90, 90)[kind]}")
            code = nvrtc.compile_source(nvrtc_alone(), nvrtc.read_sources(files), options)
            assert code[:4] == b"\x7fELF"


@pytest.mark.skipif(nvrtc_alone() is None, reason="needs NVRTC, which comes with PyTorch for CUDA")
def test_a_source_that_does_not_compile_says_where():
    with pytest.raises(RuntimeError, match=r"did not compile.*line 1|did not compile.*\(1\)"):
        nvrtc.compile_source(nvrtc_alone(), "nonsense", ["--gpu-architecture=sm_90"])


@pytest.mark.skipif(nvrtc_alone() is None, reason="needs NVRTC, which comes with PyTorch for CUDA")
def test_compiled_code_is_kept_and_compiled_again_where_asked(monkeypatch, tmp_path):
    source, options = 'extern "C" __global__ void nothing() {}', ("--gpu-architecture=sm_90",)
    monkeypatch.setattr(nvrtc, "library", nvrtc_alone)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    code = nvrtc._compiled(source, options)
    (file,) = (tmp_path / "cache" / "nnunetv2_dermomamba").iterdir()
    assert file.read_bytes() == code
    file.write_bytes(b"damaged")
    assert nvrtc._compiled(source, options) == b"damaged"
    assert nvrtc._compiled(source, options, again=True) == file.read_bytes() == code
    blocked = tmp_path / "a file"
    blocked.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    assert nvrtc._compiled(source, options) == code


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="CUDA graphs need CUDA")
@pytest.mark.parametrize("d", [8, 64])
def test_2d_in_a_cuda_graph(d):
    inputs = maps(2, 9, 17, d, 1, 16)
    expected, states = cuda_scan_2d.scan_2d_forward(*inputs.values())
    cuda_scan_2d.scan_2d_backward(expected, *inputs.values(), states)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, states = cuda_scan_2d.scan_2d_forward(*inputs.values())
        cuda_scan_2d.scan_2d_backward(y, *inputs.values(), states)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="threads of the driver's need CUDA")
def test_a_thread_without_a_context_gets_the_devices():
    inputs = maps(1, 3, 5, 8, 1, 16)
    expected = cuda_scan_2d.scan_2d_forward(*inputs.values())[0]
    with ThreadPoolExecutor(1) as pool:
        y = pool.submit(lambda: cuda_scan_2d.scan_2d_forward(*inputs.values())[0]).result()
    assert torch.equal(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the backend needs CUDA")
def test_views_that_start_anywhere_and_mixed_types_are_served():
    """What the kernels want in one type and aligned, the backend brings into that form."""
    inputs = sequences(1, 8, 36, 1, 16)
    expected = selective_scan(**inputs, delta_softplus=True, backend="torch")
    shifted = {k: torch.cat([v.new_zeros(1), v.flatten()])[1:].view_as(v) for k, v in inputs.items()}
    torch.testing.assert_close(
        selective_scan(**shifted, delta_softplus=True, backend="cuda"), expected, rtol=1e-4, atol=1e-4
    )
    mixed = inputs | {"D": inputs["D"].double(), "B": inputs["B"].half(), "C": inputs["C"].bfloat16()}
    rounded = {k: v.float() for k, v in mixed.items()}
    torch.testing.assert_close(
        selective_scan(**mixed, delta_softplus=True, backend="cuda"),
        selective_scan(**rounded, delta_softplus=True, backend="torch"),
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the backend needs CUDA")
@pytest.mark.parametrize(("states", "rank", "d"), [(17, 1, 8), (16, 9, 8), (16, 1, 130)])
def test_calls_that_the_kernels_are_not_made_for_are_triton_s(states, rank, d):
    inputs = maps(1, 3, 5, d, rank, states)
    torch.testing.assert_close(
        selective_scan_2d(**inputs, backend="cuda"), selective_scan_2d(**inputs, backend="torch"), rtol=1e-4, atol=1e-4
    )
