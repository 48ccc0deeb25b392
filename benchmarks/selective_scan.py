"""Time the selective scan's backends against each other: ``python benchmarks/selective_scan.py``.

A correctness gate comes first. GPU rows: CUDA graph replays of forward + backward, medians, all backends in one run.
Without a GPU: the CPU's backends at the network's five stages, one image; the whole network against nnU-Net's U-Net is
timed by ``benchmarks/inference.py`` and ``benchmarks/training.py --device cpu``.
"""

from __future__ import annotations

import argparse
import math
import platform
import time
from collections.abc import Callable

import torch
from contenders import graph_ms
from torch import Tensor

from nnunetv2_dermomamba.ops import BACKENDS, selective_scan, selective_scan_2d, why_not
from nnunetv2_dermomamba.ops.composed import selective_scan_2d_composed
from nnunetv2_dermomamba.ops.naive import selective_scan_naive

STATE = 16
# Expanded channels, dt rank, height, width of the network's five stages at 192 x 256.
STAGES = [(8, 1, 192, 256), (16, 1, 96, 128), (32, 1, 48, 64), (64, 2, 24, 32), (128, 4, 12, 16)]


def map_inputs(batch: int, d: int, rank: int, height: int, width: int, device: torch.device) -> dict[str, Tensor]:
    """Random map and parameters, the latter with the network's initial values."""
    step = torch.exp(torch.rand(4, d, device=device) * math.log(100) + math.log(0.001))
    return {
        "x": torch.randn(batch, height, width, d, device=device),
        "x_proj_weight": torch.randn(4, rank + 2 * STATE, d, device=device) * d**-0.5,
        "dt_projs_weight": (torch.rand(4, d, rank, device=device) * 2 - 1) * rank**-0.5,
        "dt_projs_bias": step + torch.log(-torch.expm1(-step)),
        "A": -torch.arange(1.0, STATE + 1, device=device).repeat(4 * d, 1),
        "Ds": torch.ones(4 * d, device=device),
    }


def sequence_inputs(batch: int, dim: int, length: int, groups: int, device: torch.device) -> dict[str, Tensor]:
    """Random inputs of the 1D op."""
    return {
        "u": torch.randn(batch, dim, length, device=device),
        "delta": torch.randn(batch, dim, length, device=device) - 3,
        "A": -torch.arange(1.0, STATE + 1, device=device).repeat(dim, 1),
        "B": torch.randn(batch, groups, STATE, length, device=device),
        "C": torch.randn(batch, groups, STATE, length, device=device),
        "D": torch.ones(dim, device=device),
        "delta_bias": torch.zeros(dim, device=device),
    }


def steps(call: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Callable, Callable]:
    """(forward, forward + backward with respect to every input) as calls without arguments."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    cotangent = torch.randn_like(call(**inputs))

    def both() -> object:
        return torch.autograd.grad(call(**leaves), list(leaves.values()), cotangent)

    return lambda: call(**inputs), both


def peak_memory(step: Callable[[], object]) -> float:
    """Bytes allocated at most during ``step``, over what was there before."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def error(result: Tensor, reference: Tensor) -> float:
    return float((result.detach().double() - reference.detach().double()).norm() / reference.detach().double().norm())


def gate(device: torch.device, backend: str) -> None:
    """Stop unless the backend's results and gradients equal the float64 step-by-step scan's."""
    cases = [
        (
            lambda **t: selective_scan_2d(**t, backend=backend),
            selective_scan_2d_composed,
            map_inputs(2, d, r, h, w, device),
        )
        for d, r, h, w in [
            (8, 1, 13, 21),
            (16, 1, 16, 9),
            (32, 1, 7, 11),
            (64, 2, 12, 8),
            (128, 4, 6, 8),
            (12, 1, 5, 7),
            (8, 1, 72, 64),  # chunks of the longest kind
            (16, 1, 24, 32),
            (32, 1, 72, 64),
        ]
    ]
    cases += [
        (
            lambda **t: selective_scan(**t, delta_softplus=True, backend=backend),
            lambda **t: selective_scan_naive(**t, delta_softplus=True),
            sequence_inputs(2, dim, length, groups, device),
        )
        for dim, length, groups in [(32, 301, 4), (128, 131, 4), (512, 67, 4), (300, 67, 1)]
    ]
    for call, reference, inputs in cases:
        fast = {k: v.clone().requires_grad_() for k, v in inputs.items()}
        slow = {k: v.double().requires_grad_() for k, v in inputs.items()}
        y, expected = call(**fast), reference(**slow)
        cotangent = torch.randn_like(y)
        grads = torch.autograd.grad(y, list(fast.values()), cotangent)
        references = torch.autograd.grad(expected, list(slow.values()), cotangent.double())
        shape = tuple(next(iter(inputs.values())).shape)
        worst = max(error(*pair) for pair in zip(grads, references, strict=True))
        print(f"gate {backend} {shape}: forward {error(y, expected):.1e}, gradients {worst:.1e}", flush=True)
        if not (error(y, expected) < 1e-5 and worst < 1e-4):
            raise SystemExit(f"{backend} is wrong at {shape}")


def gpu_tables(batch: int, backends: list[str]) -> None:
    """Times of the 1D op and of the fused 2D scan at the network's five stages, and peak memory at stage 0."""
    device = torch.device("cuda")
    for name in ("1D op", "2D scan with projections"):
        print(f"\n{name}, batch {batch}, float32, ms: forward / forward + backward")
        sums = {b: [0.0, 0.0] for b in backends}
        for stage, (d, rank, height, width) in enumerate(STAGES):
            row = [f"stage {stage} d {d:3} {height:3} x {width:3}"]
            for backend in backends:
                if name == "1D op":
                    inputs = sequence_inputs(batch, 4 * d, height * width, 4, device)
                    pair = steps(lambda **t: selective_scan(**t, delta_softplus=True, backend=backend), inputs)  # noqa: B023
                else:
                    inputs = map_inputs(batch, d, rank, height, width, device)
                    pair = steps(lambda **t: selective_scan_2d(**t, backend=backend), inputs)  # noqa: B023
                times = [graph_ms(step, device) for step in pair]
                sums[backend] = [a + b for a, b in zip(sums[backend], times, strict=True)]
                row.append(f"{backend} {times[0]:7.3f} / {times[1]:7.3f}")
                if stage == 0:
                    row.append(f"peak {peak_memory(pair[1]) / 2**20:6.0f} MiB")
                del inputs, pair
                torch.cuda.empty_cache()
            print("  ".join(row), flush=True)
        print("sum  " + "  ".join(f"{b} {s[0]:.3f} / {s[1]:.3f}" for b, s in sums.items()))
        first = sums[backends[0]]
        for other in backends[1:]:
            print(f"{other} over {backends[0]}: {sums[other][0] / first[0]:.2f} / {sums[other][1] / first[1]:.2f}")


def length_table(backend: str) -> None:
    """Cost against length, 1 k to 1 M positions, and the slope of a line through it in log-log."""
    print(f"\n{backend}, 1D op, batch 1, 32 channels, 4 groups: ms of forward + backward against length")
    points = []
    for power in range(10, 21, 2):
        inputs = sequence_inputs(1, 32, 2**power, 4, torch.device("cuda"))
        both = steps(lambda **t: selective_scan(**t, delta_softplus=True, backend=backend), inputs)[1]
        points.append((math.log(2**power), math.log(graph_ms(both, torch.device("cuda")))))
        print(f"{2**power:8} {math.exp(points[-1][1]):8.3f}", flush=True)
    mx, my = (sum(p[i] for p in points) / len(points) for i in range(2))
    slope = sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)
    last = (points[-1][1] - points[-2][1]) / (points[-1][0] - points[-2][0])
    print(f"slope {slope:.3f}; over the last two points {last:.3f}")


def cpu_table(batch: int, backends: list[str]) -> None:
    """Times of the 2D scan at the network's five stages for each backend, medians of five calls."""
    device = torch.device("cpu")
    print(f"\n2D scan with projections on the CPU, batch {batch}, float32, ms: forward / forward + backward")
    sums = {backend: [0.0, 0.0] for backend in backends}
    for stage, (d, rank, height, width) in enumerate(STAGES):
        row = [f"stage {stage} d {d:3} {height:3} x {width:3}"]
        for backend in backends:
            inputs = map_inputs(batch, d, rank, height, width, device)
            pair = steps(lambda **t: selective_scan_2d(**t, backend=backend), inputs)  # noqa: B023
            times = [wall_time(step) for step in pair]
            sums[backend] = [a + b for a, b in zip(sums[backend], times, strict=True)]
            row.append(f"{backend} {times[0]:8.2f} / {times[1]:8.2f}")
        print("  ".join(row), flush=True)
    print("sum  " + "  ".join(f"{backend} {s[0]:.1f} / {s[1]:.1f}" for backend, s in sums.items()))


def wall_time(step: Callable[[], object], repeats: int = 5) -> float:
    """Median milliseconds of a call on the CPU, after one warm-up."""
    step()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return sorted(times)[repeats // 2]


def main() -> None:
    """Parse arguments, run the gate, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, help="maps (default: 48 on CUDA, 3 on the CPU: 3 chunks an image)")
    args = parser.parse_args()
    torch.manual_seed(0)
    if not torch.cuda.is_available():
        print(f"{platform.machine()} CPU, {torch.get_num_threads()} threads, torch {torch.__version__}")
        gate(torch.device("cpu"), "numba")
        cpu_table(args.batch or 3, ["numba", "torch"])
        return
    device = torch.device("cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    backends = []
    for name in ("cuda", "triton", "mamba-ssm"):
        if (reason := why_not(next(b for b in BACKENDS if b.name == name), device.type, torch.float32)) is None:
            backends.append(name)
        else:
            print(f"{name} is not measured: it {reason}")
    for name in backends:
        if name != "mamba-ssm":
            gate(device, name)
    gpu_tables(args.batch or 48, backends)
    length_table(backends[0])


if __name__ == "__main__":
    main()
