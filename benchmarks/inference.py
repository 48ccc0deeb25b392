"""Time inference against nnU-Net's U-Net: ``python benchmarks/inference.py [--device cuda]``.

First a correctness gate: the network's output on the device at hand equals the CPU's with the portable PyTorch scan.
Then medians of forward passes at 3 x 192 x 256, each network at its best: as it is (DermoMamba then replays a CUDA
graph of its own), or compiled as a CUDA graph, with independent kernels combined or not, with weights as constants
("frozen") or not. On the CPU as they are, both networks in turn, and the peak memory of DermoMamba's inference over
the idle process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch._inductor.config
from contenders import (
    cpu_table,
    dermomamba,
    lesion_batch,
    median_ms,
    peak_resident_mib,
    plain_conv_unet,
    portable_scan,
    provenance,
)
from torch import Tensor, nn

GATE = 1e-3
COMPILED_GATE = 1e-2  # in float16, whose roundings differ from way to way


def forward(network: nn.Module, data: Tensor) -> Callable[[], Tensor]:
    """A call of the network as nnU-Net's predictor makes it: no gradients, autocast on CUDA."""

    def call() -> Tensor:
        with torch.inference_mode(), torch.autocast("cuda") if data.is_cuda else nullcontext():
            return network(data)

    return call


def gate(device: torch.device) -> None:
    """Stop unless the output in float32 on ``device`` equals the CPU's with the portable scan."""
    torch.manual_seed(0)
    reference, network = dermomamba().eval(), dermomamba().eval()
    network.load_state_dict(reference.state_dict())
    data = lesion_batch(1, torch.device("cpu"))[0]
    with torch.inference_mode():
        with portable_scan():
            expected = reference(data)
        result = network.to(device)(data.to(device)).cpu()
    error = float((result - expected).norm() / expected.norm())
    print(f"gate: output differs by {error:.1e}", flush=True)
    if not error < GATE:
        raise SystemExit("wrong output: nothing is timed")


GRAPH = {"triton.cudagraphs": True}
COMBINED = {"combo_kernels": True}  # independent small kernels as one
FROZEN = {"freezing": True}  # weights are constants, and so is what follows from them alone
WAYS: dict[str, dict[str, bool] | None] = {
    "as it is": None,
    "graph": GRAPH,
    "combined": GRAPH | COMBINED,
    "frozen": GRAPH | FROZEN,
    "frozen-combined": GRAPH | FROZEN | COMBINED,
}
"""Ways to run a network on a GPU: settings of PyTorch's compiler, or None."""


def prepared(network: nn.Module, data: Tensor, settings: dict[str, bool] | None) -> Callable[[], Tensor]:
    """A call of the network, compiled with ``settings``; its output must be the plain network's."""
    if settings is None:
        return forward(network, data)
    torch.compiler.reset()
    call = forward(torch.compile(network), data)
    with torch._inductor.config.patch(settings):  # torch.compile's own options come too late for freezing
        for _ in range(3):  # the second records the graph that the third replays
            result = call().float()
    plain = forward(network, data)().float()
    if not (result - plain).norm() < COMPILED_GATE * plain.norm():
        raise SystemExit(f"compiled with {settings} the output is wrong: nothing is timed")
    return call


def main() -> None:
    """Parse arguments, run the gate, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", help="batch sizes (default: 1 on the CPU, 1 and 64 on CUDA)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="on CUDA (default: all)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    print(provenance(device))
    networks = {"DermoMamba": dermomamba(), "PlainConvUNet": plain_conv_unet(deep_supervision=False)}
    if device.type == "cpu":
        idle = peak_resident_mib()
        forward(networks["DermoMamba"].eval(), lesion_batch(1, device)[0])()
        print(f"peak memory of one DermoMamba inference over the idle process: {peak_resident_mib() - idle:.0f} MiB")
    gate(device)
    for batch in arguments.batch or ([1, 64] if device.type == "cuda" else [1]):
        data = lesion_batch(batch, device)[0]
        if device.type == "cpu":
            cpu_table(batch, {name: forward(network.eval(), data) for name, network in networks.items()}, 20)
            continue
        best = {}
        for name, network in networks.items():
            times = {}
            for way in arguments.ways:
                times[way] = median_ms(prepared(network.to(device).eval(), data, WAYS[way]), device)
            best[name] = min(times.values())
            print(
                f"batch {batch:3} {name:14} " + "; ".join(f"{way} {ms:.3f} ms" for way, ms in times.items()), flush=True
            )
        print(f"batch {batch:3} ratio, each at its best: {best['DermoMamba'] / best['PlainConvUNet']:.2f}", flush=True)


if __name__ == "__main__":
    main()
