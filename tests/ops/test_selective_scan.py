"""Every backend that this machine can run against the naive twin in float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from random_cases import Case, case_1d, case_2d
from tolerances import FORWARD, GRADIENT, relative_error

from nnunetv2_dermomamba.ops import BACKENDS, backends, describe_choice, selective_scan, selective_scan_2d, why_not
from nnunetv2_dermomamba.ops.composed import selective_scan_2d_composed
from nnunetv2_dermomamba.ops.naive import selective_scan_naive

CASES = 1000  # in 1D and again in 2D
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
RUNNABLE = [(b.name, d) for b in BACKENDS for d in DEVICES if why_not(b, d, torch.float32) is None]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Uninitialised memory is NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def reference(function, tensors, *arguments):
    leaves = [t.detach().requires_grad_() for t in tensors]
    y = function(*leaves, *arguments)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return y.detach(), cotangent, torch.autograd.grad(y, leaves, cotangent)


def check(case: Case, function, scan, runs: list[tuple[str, str]], *arguments) -> None:
    # The inputs as float32 has them: what is compared is the arithmetic, not the rounding of the inputs.
    rounded = [t.to(torch.float32) for t in case.tensors]
    expected, cotangent, gradients = reference(function, [t.to(torch.float64) for t in rounded], *arguments)
    for backend, device in runs:
        name = f"{backend} on {device}, case {case.name}"
        leaves = [t.to(device).requires_grad_() for t in rounded]
        y = scan(*leaves, *arguments, backend=backend)
        assert torch.isfinite(y).all(), name
        assert relative_error(y.cpu(), expected) <= FORWARD[torch.float32], name
        results = torch.autograd.grad(y, leaves, cotangent.to(device, torch.float32))
        for index, (result, gradient) in enumerate(zip(results, gradients, strict=True)):
            assert torch.isfinite(result).all(), f"{name}, gradient {index}"
            assert relative_error(result.cpu(), gradient) <= GRADIENT[torch.float32], f"{name}, gradient {index}"


def runs_of(seed: int) -> list[tuple[str, str]]:
    """Kernels see every case, the portable PyTorch backend every fourth."""
    return [run for run in RUNNABLE if run[0] != "torch" or seed % 4 == 0]


@pytest.mark.parametrize("tenth", range(10))
def test_1d_equals_naive_twin(tenth: int) -> None:
    for seed in range(tenth, CASES, 10):
        case = case_1d(seed)
        check(case, selective_scan_naive, selective_scan, runs_of(seed), case.softplus)


@pytest.mark.parametrize("tenth", range(10))
def test_2d_equals_naive_twin(tenth: int) -> None:
    for seed in range(tenth, CASES, 10):
        check(case_2d(seed), selective_scan_2d_composed, selective_scan_2d, runs_of(seed))


def test_another_process_finds_the_compiled_kernels(tmp_path: Path) -> None:
    code = (
        "import torch\n"
        "from nnunetv2_dermomamba.ops import cpu_kernels, selective_scan_2d\n"
        "shapes = [(1, 3, 3, 8), (4, 33, 8), (4, 8, 1), (4, 8), (32, 16), (32,)]\n"
        "selective_scan_2d(*(-torch.rand(shape) for shape in shapes), backend='numba')\n"
        "stats = cpu_kernels.forward_2d.stats\n"
        "print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))\n"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    assert [run.stdout.split()[-2:] for run in runs] == [["0", "1"], ["1", "0"]]


def test_longer_than_any_chunk() -> None:
    length = 4097
    rng = torch.Generator().manual_seed(length)
    u, delta = (torch.randn(1, 4, length, generator=rng, dtype=torch.float64) for _ in range(2))
    A = -torch.arange(1.0, 17, dtype=torch.float64).repeat(4, 1) / 16
    B, C = (torch.randn(1, 2, 16, length, generator=rng, dtype=torch.float64) for _ in range(2))
    D, bias = torch.randn(4, generator=rng, dtype=torch.float64), torch.full((4,), -4.0, dtype=torch.float64)
    case = Case(f"length {length}", [u, delta, A, B, C, D, bias])
    check(case, selective_scan_naive, selective_scan, RUNNABLE, True)


@pytest.mark.parametrize("state", [2, 3, 8, 9, 12, 22])
def test_any_number_of_states(state: int) -> None:
    rng = torch.Generator().manual_seed(state)
    x = torch.randn(2, 5, 29, 9, generator=rng, dtype=torch.float64)
    x_proj = torch.randn(4, 1 + 2 * state, 9, generator=rng, dtype=torch.float64) / 3
    dt_proj = torch.randn(4, 9, 1, generator=rng, dtype=torch.float64)
    bias, D = torch.full((4, 9), -3.0, dtype=torch.float64), torch.ones(36, dtype=torch.float64)
    A = -torch.arange(1.0, state + 1, dtype=torch.float64).repeat(36, 1)
    case = Case(f"{state} states", [x, x_proj, dt_proj, bias, A, D])
    check(case, selective_scan_2d_composed, selective_scan_2d, RUNNABLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("backend", "device"), RUNNABLE)
def test_half_precision_in_float32_inside(backend: str, device: str, dtype: torch.dtype) -> None:
    for seed in range(20):
        case = case_2d(seed)
        x, *weights = (t.to(device, torch.float32) for t in case.tensors)
        half = x.to(dtype).requires_grad_()
        y = selective_scan_2d(half, *weights, backend=backend)
        expected = selective_scan_2d(half.detach().float(), *weights, backend=backend)
        assert y.dtype == torch.float32
        assert relative_error(y.cpu(), expected.cpu()) <= FORWARD[torch.float32], case.name
        (gradient,) = torch.autograd.grad(y.sum(), half)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all(), case.name


@pytest.mark.parametrize("backend", ["numba", "torch"])
def test_gradcheck(backend: str) -> None:
    case = case_2d(3)
    leaves = [torch.randn(1, 3, 4, 2, dtype=torch.float64)]
    leaves += [torch.randn(4, 1 + 2 * 3, 2, dtype=torch.float64), torch.randn(4, 2, 1, dtype=torch.float64)]
    leaves += [torch.randn(4, 2, dtype=torch.float64), -torch.rand(8, 3, dtype=torch.float64)]
    leaves += [torch.randn(8, dtype=torch.float64)]
    assert case.tensors
    leaves = [t.requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(lambda *a: selective_scan_2d(*a, backend=backend), leaves)
    u, delta, A, B, C, D, bias = (t[..., :9] if t.ndim > 2 else t for t in case_1d(2).tensors)
    leaves = [t.detach().clone().requires_grad_() for t in (u, delta - delta.mean(), A, B, C, D, bias * 0 - 1)]
    assert torch.autograd.gradcheck(lambda *a: selective_scan(*a, True, backend=backend), leaves, atol=1e-4)


@pytest.mark.parametrize(("backend", "device"), [r for r in RUNNABLE if r[0] != "torch"])
def test_opcheck(backend: str, device: str) -> None:
    name = backend.replace("-", "_")
    case = case_1d(5)
    backends.choose_backend(device, torch.float32, backend)
    tensors = [t.to(device, torch.float32).contiguous().requires_grad_() for t in case.tensors]
    torch.library.opcheck(getattr(torch.ops.dermomamba, f"{name}_scan_1d").default, (*tensors, True))
    if next(b for b in BACKENDS if b.name == backend).fused:
        tensors = [t.to(device, torch.float32).contiguous().requires_grad_() for t in case_2d(5).tensors]
        scan = getattr(torch.ops.dermomamba, f"{name}_scan_2d").default
        torch.library.opcheck(scan, (*tensors, True))
        torch.library.opcheck(scan, (*(t.detach() for t in tensors), False))  # without states


def test_optional_arguments_may_be_absent() -> None:
    u, delta, A, B, C, _, _ = (t.float() for t in case_1d(4).tensors)
    expected = selective_scan_naive(*(t.double() for t in (u, delta, A, B, C)), delta_softplus=True)
    for backend in ("numba", "torch"):
        y = selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
        assert relative_error(y, expected) <= FORWARD[torch.float32]


def test_single_group_may_have_no_group_axis() -> None:
    u, delta, A, B, C, D, bias = (t.float() for t in case_1d(0).tensors)
    y = selective_scan(u, delta, A, B[:, :1], C[:, :1], D, bias, True)
    torch.testing.assert_close(selective_scan(u, delta, A, B[:, 0], C[:, 0], D, bias, True), y)


def test_misfit_shapes_are_named() -> None:
    u, delta, A, B, C, D, bias = case_1d(0).tensors
    with pytest.raises(ValueError, match="do not fit"):
        selective_scan(u, delta[..., :-1] if delta.shape[-1] > 1 else delta[:0], A, B, C, D, bias)
    with pytest.raises(ValueError, match="D and delta_bias must have the shape"):
        selective_scan(u, delta, A, B, C, D[:-1], bias)
    x, *weights = case_2d(0).tensors
    with pytest.raises(ValueError, match=r"expected \(B, H, W, d\)"):
        selective_scan_2d(x[..., :0], *weights)


def test_double_backward_is_refused_clearly() -> None:
    x, *weights = (t.float() for t in case_2d(1).tensors)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan_2d(x, *weights).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_compiles_without_graph_break() -> None:
    tensors = [t.float().requires_grad_() for t in case_2d(7).tensors]
    compiled = torch.compile(selective_scan_2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), selective_scan_2d(*tensors))


def test_requested_backend_serves_or_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *weights = (t.float() for t in case_2d(2).tensors)
    with pytest.raises(RuntimeError, match=r"'triton' cannot serve.*serves cuda tensors, not cpu"):
        selective_scan_2d(x, *weights, backend="triton")
    with pytest.raises(ValueError, match="choose one of cuda, triton, mamba-ssm, numba, torch"):
        selective_scan_2d(x, *weights, backend="fast")
    monkeypatch.setenv("DERMOMAMBA_BACKEND", "mamba-ssm")
    with pytest.raises(RuntimeError, match="'mamba-ssm' cannot serve"):
        selective_scan_2d(x, *weights)
    monkeypatch.setenv("DERMOMAMBA_BACKEND", "torch")
    selective_scan_2d(x, *weights)
    assert describe_choice("cpu") == "Selective scan backend: torch (requested by DERMOMAMBA_BACKEND)"


def test_absent_backend_is_passed_over_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.setattr(backends, "_import_module", lambda module: "ImportError: no numba" if "cpu" in module else None)
    backends._choose.cache_clear()
    try:
        reason = backends.why_not(next(b for b in BACKENDS if b.name == "numba"), "cpu", torch.float32)
        assert reason == "cannot be imported (ImportError: no numba)"
    finally:
        backends._choose.cache_clear()


def test_import_needs_neither_triton_nor_mamba_ssm() -> None:
    code = (
        "import sys\n"
        "for name in ('triton', 'mamba_ssm', 'selective_scan_cuda', 'tilelang'): sys.modules[name] = None\n"
        "import nnunetv2_dermomamba.network, nnunetv2_dermomamba.ops\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.gpu
def test_cuda_graph_captures_the_scan() -> None:
    tensors = [t.cuda().float() for t in case_2d(8).tensors]
    expected = selective_scan_2d(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = selective_scan_2d(*tensors)
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, expected)
