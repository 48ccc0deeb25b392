"""Time the whole training step against stock nnU-Net's: ``python benchmarks/training.py [--device cuda]``.

First a correctness gate: the step's gradients equal those of the eager network with the portable PyTorch scan.
Then medians of steps (network, loss, backward, clipping, optimizer) of DermoMamba with the Guide Fusion Loss and AdamW,
and of nnU-Net's PlainConvUNet with its own loss and SGD, in one run; on CUDA both compiled, under fp16 autocast.
"""

from __future__ import annotations

import argparse
import gc
import math
import time

import torch
from contenders import (
    PATCH,
    cpu_table,
    dermomamba,
    dermomamba_step,
    lesion_batch,
    median_ms,
    portable_scan,
    provenance,
    training_step,
    unet_step,
)
from torch import Tensor, nn

from nnunetv2_dermomamba.loss import GuideFusionLoss
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.trainers.optimization import build_adamw

GATE = 1e-3
DRAWS = 5
MOST_LEFT = 64 << 20
"""Bytes on the GPU when a network's measurement begins, of which nothing is said: workspaces of libraries."""


def gradient_of(parameter: Tensor) -> Tensor:
    """What ``backward`` left; zeros where it left nothing."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def gradients(network: nn.Module, call: nn.Module, data: Tensor, target: Tensor) -> tuple[float, Tensor]:
    """Loss of ``call``, which is ``network`` or that compiled, and all its gradients in one vector."""
    network.zero_grad()
    loss = GuideFusionLoss()(call(data), target)
    loss.backward()
    return float(loss.detach()), torch.cat([gradient_of(p).flatten() for p in network.parameters()])


def gate(device: torch.device, compiled: bool) -> None:
    """Stop unless loss and gradients without autocast equal the eager network's with the portable scan on this device.

    In float32 rounding puts pre-activations of the deepest maps (6 x 8 positions) on the other side of a ReLU's kink,
    which moves all gradients before it: between float32 and float64 on a CPU by up to 2e-2, for an input scaled by
    1 + 1e-7 likewise. What is wrong is wrong in every draw of weights and images: up to DRAWS are tried until one
    agrees to GATE. If none does, all must agree to what that scaling does to the portable scan's gradients. Losses
    must agree always.

    On the CPU in float64, at half the patch's sides, since the portable scan takes minutes there.
    """
    patch = PATCH if device.type == "cuda" else (PATCH[0] // 2, PATCH[1] // 2)
    kind = torch.float64 if device.type == "cpu" else torch.float32
    reference, network = (DermoMamba(3, 2, patch).to(device, kind) for _ in range(2))
    call = torch.compile(network) if compiled else network
    torch.backends.cudnn.allow_tf32 = False
    beyond_rounding = False
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        weights = DermoMamba(3, 2, patch).state_dict()
        network.load_state_dict(weights)
        data, target = (t[..., : patch[0], : patch[1]].contiguous() for t in lesion_batch(2, device, seed))
        data = data.to(kind)
        results = []
        with portable_scan():
            for scale in (1, 1 + 1e-7):
                reference.load_state_dict(weights)
                results.append(gradients(reference, reference, data * scale, target))
        (expected, theirs), (_, scaled) = results
        loss, ours = gradients(network, call, data, target)
        error, rounding = (float((m - theirs).norm() / theirs.norm()) for m in (ours, scaled))
        print(f"gate, draw {seed}: losses differ by {abs(loss - expected):.1e}, gradients by {error:.1e}, those of an "
              f"input scaled by 1 + 1e-7 by {rounding:.1e}", flush=True)  # fmt: skip
        if not abs(loss - expected) < GATE:
            raise SystemExit("wrong loss: nothing is timed")
        if error < GATE:
            break
        beyond_rounding |= not error < rounding
    else:
        if beyond_rounding:
            raise SystemExit("wrong gradients: nothing is timed")
    torch.backends.cudnn.allow_tf32 = True


def release() -> None:
    """Free what the network before left on the GPU: compiled code holds on to it."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def table(device: torch.device, batches: list[int], compiled: bool) -> None:
    """Step times and peak memory, ours over nnU-Net's; on the CPU both in turn."""
    if device.type == "cpu":
        for batch in batches:
            steps = {"DermoMamba": dermomamba_step, "PlainConvUNet": unet_step}
            cpu_table(batch, {name: build(batch, device, compiled) for name, build in steps.items()}, 8)
        return
    print(f"{'batch':>5} {'DermoMamba ms':>14} {'PlainConvUNet ms':>17} {'ratio':>6}", end="")
    print(f" {'GiB':>6} {'GiB':>6} {'ratio':>6}  first call s")
    for batch in batches:
        times, memory, first = [], [], []
        for build in (dermomamba_step, unet_step):
            release()
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            step = build(batch, device, compiled)
            start = time.perf_counter()
            float(step())
            first.append(time.perf_counter() - start)
            times.append(median_ms(step, device))
            # of all steps, the graph's capture among them: what a graph keeps does not count as allocated later
            memory.append((torch.cuda.max_memory_allocated(device) - before) / 2**30)
            if before > MOST_LEFT:
                print(f"{before / 2**20:.0f} MiB were left from before: memory may be more than it says")
            del step
        print(f"{batch:5} {times[0]:14.2f} {times[1]:17.2f} {times[0] / times[1]:6.2f}", end="")
        print(f" {memory[0]:6.2f} {memory[1]:6.2f} {memory[0] / memory[1]:6.2f}  {first[0]:.0f}, {first[1]:.0f}",
              flush=True)  # fmt: skip


def stability(device: torch.device, steps: int, batch: int) -> None:
    """Train from scratch under fp16 autocast on 200 batches; count non-finite losses and skipped steps."""
    torch.manual_seed(0)
    release()
    network = dermomamba().to(device)
    optimizer = build_adamw(network, 1e-3, 1e-2, device)
    step = training_step(torch.compile(network), GuideFusionLoss(batch_dice=True), optimizer, 1.0, graph=True)
    batches = [lesion_batch(batch, device, seed) for seed in range(min(steps, 200))]  # the CPU draws them: once each
    losses, scales = [], []
    for index in range(steps):
        losses.append(step(*batches[index % len(batches)]))
        scales.append(step.scaler.get_scale())
    values = torch.stack(losses)
    skipped = [i for i in range(1, steps) if scales[i] < scales[i - 1]]
    bad = int((~torch.isfinite(values)).sum())
    finite = all(torch.isfinite(t).all() for t in network.state_dict().values() if t.is_floating_point())
    print(f"{steps} steps: {bad} non-finite losses, skipped steps {skipped}, weights finite: {finite}, "
          f"loss {float(values[:20].mean()):.4f} -> {float(values[-20:].mean()):.4f}", flush=True)  # fmt: skip
    if bad or not finite or not math.isfinite(float(values[-1])):
        raise SystemExit("training is not stable under fp16 autocast")


def main() -> None:
    """Parse arguments, run the gate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 2 on the CPU, 16 and 64 on CUDA)")
    parser.add_argument("--stability", type=int, metavar="STEPS", help="also train this many steps under fp16 autocast")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    compiled = device.type == "cuda" and not arguments.eager
    print(provenance(device))
    gate(device, compiled)
    table(device, arguments.batch or ([16, 64] if device.type == "cuda" else [2]), compiled)
    if arguments.stability:
        stability(device, arguments.stability, 16)


if __name__ == "__main__":
    main()
