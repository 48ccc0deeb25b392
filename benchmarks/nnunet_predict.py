"""What `nnUNetv2_predict -device cpu` adds to the network's own time: ``python benchmarks/nnunet_predict.py MODEL``.

MODEL is nnU-Net's results folder of a trainer. Noise of the patch size is predicted by the command, few images and many
in turn; the difference over the number of images more is the time per image without start-up. The network alone runs
the same window with the same mirroring, before and after.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from contenders import provenance
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from PIL import Image

FEW = 4


def draw(folder: Path, count: int, shape: list[int]) -> Path:
    """A folder of ``count`` images."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(rng.integers(0, 255, (*shape, 3), dtype=np.uint8)).save(folder / f"case{number:04d}_0000.png")
    return folder


def command_seconds(model: Path, source: Path, target: Path) -> float:
    """Wall-clock seconds of the command for a folder."""
    code = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as p; p()"
    fold = next(model.glob("fold_*")).name.removeprefix("fold_")
    arguments = ["-i", source, "-o", target, "-m", model, "-f", fold, "-device", "cpu"]
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def network_seconds(model: Path, shape: list[int]) -> float:
    """Median wall-clock seconds of the network alone for one window and its mirror images."""
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), None)
    network, data = predictor.network.eval(), torch.randn(1, 3, *shape)
    views = 2 ** len(predictor.allowed_mirroring_axes or ())
    times = []
    with torch.inference_mode():
        for _ in range(10):
            start = time.perf_counter()
            for _ in range(views):
                network(data)
            times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def main() -> None:
    """Parse arguments, print both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    shape = json.loads((arguments.model / "plans.json").read_text())["configurations"]["2d"]["patch_size"]
    print(provenance(torch.device("cpu")), f"{shape[0]} x {shape[1]}")
    alone, whole = [], []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few, many = (draw(folder / str(count), count, shape) for count in (FEW, FEW + arguments.count))
        for index in range(arguments.rounds):
            alone.append(network_seconds(arguments.model, shape))
            times = [command_seconds(arguments.model, source, folder / f"out{index}{source.name}")
                     for source in (few, many)]  # fmt: skip
            whole.append((times[1] - times[0]) / arguments.count)
    network, command = float(np.median(alone)), float(np.median(whole))
    print(f"network alone {network:.3f} s an image, nnUNetv2_predict {command:.3f} s, ratio {command / network:.2f}")


if __name__ == "__main__":
    main()
