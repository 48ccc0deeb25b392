"""Guide Fusion Loss: exactness of the distance on this device, then times beside nnU-Net's loss.

python benchmarks/loss.py [--device cuda] [--batch 16 64] [--size 192 256]

Times are medians in ms, of the losses forward and backward. "eager" and "compiled" (CUDA only) are as a training step
calls them, launches included; "graph" replays a CUDA graph, so it is what the device itself spends.
"""

import argparse
from collections.abc import Callable

import numpy as np
import torch
from contenders import graph_ms, median_ms
from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
from scipy.ndimage import distance_transform_edt

from nnunetv2_dermomamba.loss import GuideFusionLoss, distance_to_opposite


def lesions(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    """Wobbly ellipses, (count, 1, height, width) bool; every eighth image has none."""
    random = np.random.default_rng(seed)
    rows, columns = np.indices((height, width))
    masks = np.zeros((count, 1, height, width), bool)
    for n in range(count):
        if n % 8 == 7:
            continue
        y = (rows - height * random.uniform(0.35, 0.65)) / (height * random.uniform(0.1, 0.35))
        x = (columns - width * random.uniform(0.35, 0.65)) / (width * random.uniform(0.1, 0.35))
        wobble = 1 + 0.15 * np.sin(random.integers(3, 9) * np.arctan2(y, x) + random.uniform(0, 6))
        masks[n, 0] = np.hypot(x, y) < wobble
    return torch.from_numpy(masks)


def scipy_distance(mask: np.ndarray) -> np.ndarray:
    if mask.all() or not mask.any():
        return np.full(mask.shape, np.inf, np.float32)
    return (distance_transform_edt(mask) + distance_transform_edt(~mask)).astype(np.float32)


def check_exact(device: torch.device, height: int, width: int) -> int:
    """Compare bit by bit with SciPy; returns the number of masks."""
    random = np.random.default_rng(0)
    noise = [random.random((height, width)) < density for density in (0, 1e-4, 1e-3, 0.1, 0.5, 0.999, 1)]
    odd = [random.random(shape) < 0.05 for shape in [(1, 1), (1, 700), (700, 1), (37, 211), (600, 3), (1024, 1024)]]
    masks = [*noise, *odd, *lesions(16, height, width)[:, 0].numpy()]
    for n, mask in enumerate(masks):
        result = distance_to_opposite(torch.from_numpy(mask).to(device)).cpu().numpy()
        if not np.array_equal(result, scipy_distance(mask)):
            raise SystemExit(f"the distance of mask {n}, shape {mask.shape}, is not SciPy's")
    return len(masks)


def step(loss: Callable, logits: torch.Tensor, target: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(loss(logits, target), logits)


def report(
    what: str, batch: int, device: torch.device, eager: Callable[[], object], compiled: Callable[[], object] | None
) -> None:
    times = [median_ms(eager, device), None, None]
    if device.type == "cuda":
        times[1] = median_ms(compiled, device) if compiled else None
        times[2] = graph_ms(eager, device)
    print(f"{what:28} {batch:5}", *(f"{'-' if time is None else f'{time:.3f}':>9}" for time in times), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--size", type=int, nargs=2, default=[192, 256], metavar=("HEIGHT", "WIDTH"))
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    height, width = arguments.size
    cuda = device.type == "cuda"

    name = torch.cuda.get_device_name(device) if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, PyTorch {torch.__version__}, {height} x {width}")
    print(f"distance equals SciPy's bit by bit on {check_exact(device, height, width)} masks")
    print(f"{'what':28} {'batch':>5} {'eager':>9} {'compiled':>9} {'graph':>9}")

    for batch in arguments.batch:
        mask = lesions(batch, height, width).to(device)
        target = mask.to(torch.int16)
        dtype = torch.float16 if cuda else torch.float32
        logits = torch.randn(batch, 2, height, width, device=device, dtype=dtype, requires_grad=True)
        report("distance", batch, device, lambda mask=mask: distance_to_opposite(mask), None)
        losses = {
            "Guide Fusion Loss, scalar": GuideFusionLoss("scalar"),
            "Guide Fusion Loss, pixel": GuideFusionLoss("pixel"),
            "nnU-Net's Dice + CE": DC_and_CE_loss(
                {"batch_dice": False, "smooth": 1e-5, "do_bg": False, "ddp": False},
                {},
                dice_class=MemoryEfficientSoftDiceLoss,
            ),
        }
        for what, loss in losses.items():
            torch._dynamo.reset()
            report(what, batch, device, step(loss, logits, target), step(torch.compile(loss), logits, target))


if __name__ == "__main__":
    main()
