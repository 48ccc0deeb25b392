"""What the benchmarks compare: nnU-Net's own U-Net and DermoMamba, each with its loss and optimizer, and timing."""

from __future__ import annotations

import itertools
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import Tensor, nn

from nnunetv2_dermomamba.cuda_graph import CapturedPass
from nnunetv2_dermomamba.loss import GuideFusionLoss
from nnunetv2_dermomamba.network import DermoMamba
from nnunetv2_dermomamba.ops import ENVIRONMENT_VARIABLE
from nnunetv2_dermomamba.trainers.optimization import build_adamw

PATCH = (192, 256)
# What nnU-Net 2.8 plans for RGB images of 192 x 256 (20.6 M parameters).
STAGES = 6
UNET_ARGUMENTS = {
    "n_stages": STAGES,
    "features_per_stage": [32, 64, 128, 256, 512, 512],
    "conv_op": "torch.nn.modules.conv.Conv2d",
    "kernel_sizes": [[3, 3]] * STAGES,
    "strides": [[1, 1]] + [[2, 2]] * (STAGES - 1),
    "n_conv_per_stage": [2] * STAGES,
    "n_conv_per_stage_decoder": [2] * (STAGES - 1),
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}


def plain_conv_unet(deep_supervision: bool) -> nn.Module:
    """nnU-Net's own network of the 192 x 256 plan, two classes."""
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    imports = ["conv_op", "norm_op", "dropout_op", "nonlin"]
    return get_network_from_plans(name, UNET_ARGUMENTS, imports, 3, 2, True, deep_supervision)


def dermomamba() -> nn.Module:
    """Ours, two classes."""
    return DermoMamba(3, 2, PATCH)


def nnunet_loss(compile_dice: bool) -> nn.Module:
    """nnU-Net's Dice and cross entropy with its deep-supervision weights; Dice compiled as nnU-Net does on CUDA."""
    loss = DC_and_CE_loss({"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False}, {}, 1, 1,
                          dice_class=MemoryEfficientSoftDiceLoss)  # fmt: skip
    if compile_dice:
        loss.dc = torch.compile(loss.dc)
    weights = np.array([1 / 2**i for i in range(STAGES - 1)])
    weights[-1] = 0
    return DeepSupervisionWrapper(loss, weights / weights.sum())


def lesion_batch(batch: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of noise with a brighter ellipse each, and their label maps (B, 1, H, W)."""
    rng = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in PATCH), indexing="ij")
    centre = (torch.rand(batch, 2, 1, 1, generator=rng) - 0.5) * 0.8
    radius = 0.2 + 0.4 * torch.rand(batch, 2, 1, 1, generator=rng)
    inside = (((y - centre[:, 0]) / radius[:, 0]) ** 2 + ((x - centre[:, 1]) / radius[:, 1]) ** 2) < 1
    image = torch.randn(batch, 3, *PATCH, generator=rng) + inside[:, None]
    return image.to(device), inside[:, None].to(device, torch.int16)


def training_step(network: nn.Module, loss: nn.Module, optimizer: torch.optim.Optimizer, clip: float,
                  graph: bool = False) -> Callable[[Tensor, Tensor | list[Tensor]], Tensor]:  # fmt: skip
    """One step as the trainers' ``train_step``: autocast and loss scaling on CUDA, gradient clipping.

    ``graph``: forward pass, loss and backward pass as a CUDA graph, as DermoMamba's trainers do it.
    """
    cuda = next(network.parameters()).is_cuda
    scaler = torch.amp.GradScaler("cuda" if cuda else "cpu", enabled=cuda)

    def forward_backward(data: Tensor, target: Tensor | list[Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda") if cuda else nullcontext():
            value = loss(network(data), target)
        scaler.scale(value).backward()
        return value.detach()

    captured_pass = CapturedPass(forward_backward)

    def step(data: Tensor, target: Tensor | list[Tensor]) -> Tensor:
        value = (captured_pass if graph and cuda else forward_backward)(data, target)
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(network.parameters(), clip)
        scaler.step(optimizer)
        scaler.update()
        return value

    step.scaler = scaler  # type: ignore[attr-defined]
    return step


def unet_step(batch: int, device: torch.device, compiled: bool) -> Callable[[], Tensor]:
    """Stock nnU-Net: PlainConvUNet with deep supervision, its loss, SGD with Nesterov momentum."""
    network = plain_conv_unet(deep_supervision=True).to(device)
    network = torch.compile(network) if compiled else network
    optimizer = torch.optim.SGD(network.parameters(), 1e-2, weight_decay=3e-5, momentum=0.99, nesterov=True)
    data, target = lesion_batch(batch, device)
    targets = [target[..., :: 2**i, :: 2**i].contiguous() for i in range(STAGES - 1)]
    return partial(training_step(network, nnunet_loss(compiled), optimizer, 12), data, targets)


def dermomamba_step(batch: int, device: torch.device, compiled: bool) -> Callable[[], Tensor]:
    """Ours: DermoMamba, Guide Fusion Loss, AdamW."""
    network = dermomamba().to(device)
    optimizer = build_adamw(network, 1e-3, 1e-2, device)
    network = torch.compile(network) if compiled else network
    data, target = lesion_batch(batch, device)
    return partial(training_step(network, GuideFusionLoss(batch_dice=True), optimizer, 1, graph=True), data, target)


def median_ms(step: Callable[[], object], device: torch.device, seconds: float = 3.0) -> float:
    """Median time of a call after two warm-ups; on CUDA between events, without waiting in between."""
    for _ in range(2 if device.type == "cpu" else 8):
        step()
    if device.type == "cpu":
        times, end = [], time.perf_counter() + seconds
        while len(times) < 5 or time.perf_counter() < end:
            start = time.perf_counter()
            step()
            times.append(1e3 * (time.perf_counter() - start))
        return float(np.median(times))
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(41)]
    for event in events[:-1]:
        event.record()
        step()
    events[-1].record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in itertools.pairwise(events)]))


def graph_ms(function: Callable[[], object], device: torch.device) -> float:
    """Median time of replaying a call as a CUDA graph: what the device itself spends."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return median_ms(graph.replay, device)


def in_turn(steps: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU time in ms of every call, in turn after two warm-ups: another load on the CPU falls on all alike."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if index >= 2:
                times[name].append((1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)))
    return times


def cpu_table(batch: int, steps: dict[str, Callable[[], object]], rounds: int) -> None:
    """Medians of the calls in turn, and of the first's time over the second's in the same round."""
    times = in_turn(steps, rounds)
    for name, pairs in times.items():
        wall, cpu = np.median(pairs, axis=0)
        print(f"batch {batch:3} {name:14} {wall:.1f} ms, CPU time {cpu:.1f} ms")
    ours, theirs = (np.array(pairs) for pairs in times.values())
    wall, cpu = np.median(ours / theirs, axis=0)
    load = os.getloadavg()[0]
    print(f"batch {batch:3} ratio {wall:.2f}, of CPU time {cpu:.2f}; {rounds} rounds, load {load:.1f}", flush=True)


@contextmanager
def portable_scan() -> Iterator[None]:
    """Inside, the selective scan is the portable PyTorch one, whichever backend was asked for outside."""
    asked_for = os.environ.get(ENVIRONMENT_VARIABLE)
    os.environ[ENVIRONMENT_VARIABLE] = "torch"
    try:
        yield
    finally:
        del os.environ[ENVIRONMENT_VARIABLE]
        if asked_for is not None:
            os.environ[ENVIRONMENT_VARIABLE] = asked_for


def peak_resident_mib() -> float:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def provenance(device: torch.device) -> str:
    """Machine, versions, commit and date, for the head of a table."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.processor() or platform.machine()}"
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown commit"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit}, {date.today()}"
