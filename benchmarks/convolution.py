"""3 x 3 convolutions of few channels on a GPU: this package's kernels beside cuDNN's.

python benchmarks/convolution.py [--batch 1 8 64] [--pairs 16:16 16:32 32:16 32:32]

After a gate (results against float64), medians in ms of CUDA graph replays, forward and backward (both gradients), for
float16 maps of 192 x 256, channels last; beside them what reading and writing the maps once would take at the rate of a
copy of 256 MiB, and the ratio of ours over cuDNN's. "Used" is what the network takes (``ops/convolution.py``).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from contenders import PATCH, graph_ms, provenance
from torch import Tensor
from torch.nn import functional as F

from nnunetv2_dermomamba.ops.convolution import serves
from nnunetv2_dermomamba.ops.cuda_convolution import convolution_backward, convolution_forward

GATE = 1e-3  # results are rounded to float16


def maps(batch: int, channels: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(channels)
    nhwc = torch.randn(batch, *PATCH, channels, device="cuda", generator=generator).half()
    return nhwc.permute(0, 3, 1, 2)


def bytes_a_ms() -> float:
    """Read and written by a copy."""
    source = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / graph_ms(lambda: target.copy_(source), source.device)


def cudnn(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Callable[[], Tensor], Callable[[], tuple[Tensor, ...]]]:
    """Forward and backward with float16 weights that lie as cuDNN wants them."""
    half = weight.half().contiguous(memory_format=torch.channels_last)
    options = (None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return (
        lambda: F.conv2d(x, half, padding=1),
        lambda: torch.ops.aten.convolution_backward(dy, x, half, *options, [True, True, False])[:2],
    )


def check(x: Tensor, weight: Tensor, dy: Tensor) -> None:
    few = slice(0, 2)
    leaves = [m.double().requires_grad_() for m in (x[few], weight.half())]
    expected = F.conv2d(*leaves, padding=1)
    expected.backward(dy[few].double())
    results = convolution_forward(x[few], weight), *convolution_backward(dy[few], x[few], weight)
    for ours, theirs in zip(results, (expected.detach(), *(m.grad for m in leaves)), strict=True):
        error = float((ours - theirs).norm() / theirs.norm())
        if not error <= GATE:
            raise SystemExit(f"wrong result, off by {error:.1e}: nothing is timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    pairs = ["16:16", "16:32", "32:16", "32:32"]
    parser.add_argument("--pairs", nargs="+", default=pairs, metavar="FROM:TO", help="channels, 16 or 32")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this needs a CUDA device")
    torch.backends.cudnn.benchmark = True
    device, rate = torch.device("cuda"), bytes_a_ms()
    print(f"{provenance(device)}; a copy moves {rate / 1e9:.2f} TB/s")
    print(f"{'':22}{'forward':>32}{'backward':>33}")
    heads = "".join(f"{word:>8}" for word in ("bytes", "cuDNN", "ours", "ratio"))
    print(f"{'batch, channels':22}{heads} {heads}")
    for batch in arguments.batch:
        for pair in arguments.pairs:
            from_, to = map(int, pair.split(":"))
            x, dy = maps(batch, from_), maps(batch, to)
            weight = torch.randn(to, from_, 3, 3, device=device) / (3 * from_**0.5)
            check(x, weight, dy)
            ours = lambda: convolution_forward(x, weight), lambda: convolution_backward(dy, x, weight)  # noqa: B023
            row = f"{batch:6}, {pair}{', used' if serves(x, weight) else '':7}    "
            moved = x.nbytes + dy.nbytes, 2 * x.nbytes + dy.nbytes
            for theirs, mine, count in zip(cudnn(x, weight, dy), ours, moved, strict=True):
                times = count / rate, graph_ms(theirs, device), graph_ms(mine, device)
                row += "".join(f"{time:8.3f}" for time in times) + f"{times[2] / times[1]:8.2f} "
            print(row, flush=True)


if __name__ == "__main__":
    main()
