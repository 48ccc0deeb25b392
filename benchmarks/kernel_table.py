"""Which GPU kernels take the time? ``python benchmarks/kernel_table.py [--unet] [--inference] [--batch 64] [--eager]``.

One training step of a network, or one inference, at 3 x 192 x 256 under fp16 autocast: its median time, the process's
peak memory, the kernels' summed time and the longest of them, as PyTorch's profiler sees them. Without ``--eager`` the
network is compiled, which takes minutes at the first call; the time of that call is printed, too.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable

import torch
from contenders import (
    dermomamba,
    dermomamba_step,
    lesion_batch,
    median_ms,
    plain_conv_unet,
    provenance,
    unet_step,
)
from inference import forward
from torch.profiler import ProfilerActivity, profile

STEPS = 3


def kernels(step: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Milliseconds and launches of every kernel, a step."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    launches: Counter[str] = Counter()
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name] += event.time_range.elapsed_us() / 1e3 / STEPS
            launches[event.name] += 1 / STEPS
    return times, launches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", action="store_true", help="nnU-Net's PlainConvUNet instead of DermoMamba")
    parser.add_argument("--inference", action="store_true", help="instead of a training step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--eager", action="store_true", help="do not compile")
    parser.add_argument("--rows", type=int, default=40, help="kernels that are listed")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device; on a CPU, benchmarks/training.py and inference.py give the times")
    device = torch.device("cuda")
    print(provenance(device))
    if arguments.inference:
        network = (plain_conv_unet(deep_supervision=False) if arguments.unet else dermomamba()).to(device).eval()
        network = network if arguments.eager else torch.compile(network, mode="reduce-overhead")
        step = forward(network, lesion_batch(arguments.batch, device)[0])
    else:
        build = unet_step if arguments.unet else dermomamba_step
        step = build(arguments.batch, device, not arguments.eager)
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    print(f"first call {time.perf_counter() - start:.0f} s, median {median_ms(step, device):.2f} ms, "
          f"peak {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB", flush=True)  # fmt: skip
    times, launches = kernels(step)
    print(f"{times.total():.2f} ms in {launches.total():.0f} kernels, copies and fills")
    for name, ms in times.most_common(arguments.rows):
        print(f"{ms:8.3f} ms {launches[name]:5.0f} x  {name[:110]}")


if __name__ == "__main__":
    main()
